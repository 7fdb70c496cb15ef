"""Networks that are not in the table: timm's, and a function in a file of your own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nacpipe.benchmarks.standard import Transform
from nacpipe.errors import InputError, MissingExtra
from nacpipe.networks.checkpoints import first_line, make_transform
from nacpipe.networks.source import note_imports
from nacpipe.networks.state_dicts import StateDict


def build_from_file(path: Path, function: str) -> nn.Module:
    """Run a Python file and return what its function, called without arguments, returns: a network with its weights.

    The file runs as a script would: modules beside it can be imported.

    Raises:
        InputError: no such file or function, it fails, or returns something else; `--debug` shows the traceback.
    """
    name = f"{path}:{function}"
    if not path.is_file():
        raise InputError(f"model {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"nacpipe_network_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    content = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = content  # dataclasses and torch.nn look themselves up there
    sys.path.insert(0, str(path.parent))
    before = frozenset(sys.modules)
    try:
        spec.loader.exec_module(content)
        if not callable(build := getattr(content, function, None)):
            raise InputError(f"model {name!r}: {path} has no function {function!r}")
        network = build()
    except InputError:
        raise
    except Exception as error:  # it is anyone's code
        raise InputError(f"model {name!r} failed with {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
        note_imports(path, before)
    if not isinstance(network, nn.Module):
        raise InputError(f"model {name!r} returns {type(network).__name__}, not a torch.nn.Module")
    return network


def build_timm(name: str, classes: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """Build one of timm's networks, with as many classes as its published weights unless told otherwise.

    Raises:
        MissingExtra: timm is not installed.
        InputError: timm does not know it.
    """
    more = {} if classes is None else {"num_classes": classes}
    try:
        network = _need_timm().create_model(name, pretrained=pretrained, **more)
    except (RuntimeError, OSError, ValueError) as error:  # timm's and its hub's
        raise InputError(f"model 'timm:{name}' cannot be made: {first_line(error)}") from error
    assert isinstance(network, nn.Module)
    return network


def read_timm(name: str) -> dict[str, StateDict]:
    """Return timm's published weights of a network, downloaded where they are not there yet."""
    return {"": dict(build_timm(name, pretrained=True).state_dict())}


def timm_transform(name: str) -> Transform:
    """Return the preparation of images that comes with timm's published weights.

    Raises:
        InputError: it is not a resize of the short side and a centre crop to a square.
    """
    timm = _need_timm()
    config = timm.data.resolve_model_data_config(build_timm(name))
    _, height, width = config["input_size"]
    if config["crop_mode"] != "center" or height != width:
        raise InputError(
            f"model 'timm:{name}' prepares images by {config['crop_mode']} to {height}×{width}, which nacpipe does not;"
            " give its weights as a file with --checkpoint FILE to use the benchmark's transform"
        )
    return make_transform(
        resize=math.floor(height / config["crop_pct"]),
        crop=height,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )


def _need_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise MissingExtra("timm:NAME needs timm; install it with: pip install 'nacpipe[timm]'") from error
