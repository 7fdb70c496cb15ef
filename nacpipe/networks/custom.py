"""Networks that are not in the table: timm's, and those of a function in a user's Python file."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nacpipe.benchmarks.standard import Transform
from nacpipe.errors import InputError, MissingExtra, first_line
from nacpipe.networks.checkpoints import make_transform
from nacpipe.networks.source import record_imports
from nacpipe.networks.state_dicts import StateDict


def build_from_file(path: Path, function: str) -> nn.Module:
    """Run a Python file and call its function, without arguments; return the network with its weights.

    The file runs like a script: it can import modules from its folder.

    Raises:
        InputError: the file or function does not exist, fails, or returns no module; `--debug` shows the traceback.
    """
    name = f"{path}:{function}"
    if not path.is_file():
        raise InputError(f"model {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"nacpipe_network_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.nn look up modules there
    sys.path.insert(0, str(path.parent))
    modules_before = frozenset(sys.modules)
    try:
        spec.loader.exec_module(module)
        if not callable(build := getattr(module, function, None)):
            raise InputError(f"model {name!r}: {path} has no function {function!r}")
        network = build()
    except InputError:
        raise
    except Exception as error:  # user code may raise any error
        raise InputError(f"model {name!r} failed with {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
        record_imports(path, modules_before)
    if not isinstance(network, nn.Module):
        raise InputError(f"model {name!r} returns {type(network).__name__}, not a torch.nn.Module")
    return network


def build_timm(name: str, classes: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """Build one of timm's networks, by default with as many classes as its published weights.

    Raises:
        MissingExtra: timm is not installed.
        InputError: timm cannot build it.
    """
    options = {} if classes is None else {"num_classes": classes}
    try:
        network = _import_timm().create_model(name, pretrained=pretrained, **options)
    except (RuntimeError, OSError, ValueError) as error:  # of timm or of its hub
        raise InputError(f"model 'timm:{name}' cannot be made: {first_line(error)}") from error
    assert isinstance(network, nn.Module)
    return network


def read_timm(name: str) -> dict[str, StateDict]:
    """Return timm's published weights of a network; they are downloaded once."""
    return {"": dict(build_timm(name, pretrained=True).state_dict())}


def timm_transform(name: str) -> Transform:
    """Return the transform of timm's published weights.

    Raises:
        InputError: the transform is not a resize of the short side and a centre crop to a square.
    """
    timm = _import_timm()
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


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise MissingExtra("timm:NAME needs timm; install it with: pip install 'nacpipe[timm]'") from error
