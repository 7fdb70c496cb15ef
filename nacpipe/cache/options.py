"""The options that a cache was extracted with, and the command that they make."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from nacpipe.cache.layout import ALL_BITS
from nacpipe.text import command_line

TRAIN_IMAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractOptions:
    """The options of `nacpipe extract` that decide what a cache holds; the same options finish the cache.

    A cache keeps them as JSON in its header's information. The cache's own address is not among them: a cache can be
    moved, and a URL can hold a password.
    """

    benchmark: str
    """A benchmark's name, or a TOML file."""
    model: str
    checkpoint: Path | None = None
    """A file, a folder with one checkpoint, or a name of published weights; None means the model's own."""
    weights_transform: str | None = None
    """Whose preparation of images: published weights' by their name, or `benchmark`; None chooses by the weights."""
    layers: tuple[str, ...] = ()
    """Aliases or module paths, or NAME=PATH; none means the model's default four."""
    poolings: tuple[tuple[str, str], ...] = ()
    """(layer, pooling): instead of the table's or the guessed one."""
    data_root: Path | None = None
    """None means the benchmark's own: data, or what its file says."""
    train_images: int = TRAIN_IMAGES
    """Of id/train."""
    train_seed: int = 1
    batch_size: int = 128
    device: str = "auto"
    allow_truncated: bool = False
    decoder: str = "pillow"
    """pillow, torchvision or nvjpeg: what decodes JPEGs."""
    precision: str = "fp32"
    """fp32, tf32, bf16 or fp16: what the network computes in."""
    mantissa_bits: int = ALL_BITS
    """Bits of mantissa to keep of activations, gradients and features."""
    block_rows: int | None = None
    """Rows of a block of a new cache, a multiple of `batch_size`; None: about ten seconds of work, at most 512."""
    shard_blocks: int | None = None
    """Blocks in one stored object; None: one, and of a remote cache several."""
    gradient: bool = True
    """Whether gradients are computed and written; False: forward passes alone."""
    synthetic_val: bool = False
    """Whether `ood/val` is made of id/val's images although the benchmark has its own."""

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values: paths as text, tuples as lists."""
        return {field.name: _to_json(getattr(self, field.name)) for field in fields(ExtractOptions)}

    @staticmethod
    def from_json(value: object) -> ExtractOptions:
        """Return the record of `to_json`'s values.

        Raises:
            ValueError: a field is unknown, lacking, or of another type.
        """
        if not isinstance(value, Mapping):
            raise ValueError("options are not an object")
        value = _of_today(value)
        unknown, lacking = value.keys() - _TYPES.keys(), {"benchmark", "model"} - value.keys()
        if unknown or lacking:
            raise ValueError(f"unknown options {sorted(unknown)}, lacking options {sorted(lacking)}")
        for name, entry in value.items():
            if type(entry) not in _TYPES[name]:
                raise ValueError(f"option {name} is {str(entry)[:40]!r}")
        paths = {name: Path(value[name]) for name in ("checkpoint", "data_root") if value.get(name) is not None}
        lists = {"layers": tuple(map(str, value.get("layers", ())))}
        poolings = tuple((str(layer), str(pooling)) for layer, pooling in value.get("poolings", ()))
        return ExtractOptions(**{**value, **paths, **lists, "poolings": poolings})


_TYPES: Mapping[str, tuple[type, ...]] = {  # of the JSON values
    **dict.fromkeys(("benchmark", "model", "device", "decoder", "precision"), (str,)),
    **dict.fromkeys(("checkpoint", "weights_transform", "data_root"), (str, NoneType)),
    **dict.fromkeys(("layers", "poolings"), (list,)),
    **dict.fromkeys(("train_images", "train_seed", "batch_size", "mantissa_bits"), (int,)),
    **dict.fromkeys(("block_rows", "shard_blocks"), (int, NoneType)),
    **dict.fromkeys(("allow_truncated", "gradient", "synthetic_val"), (bool,)),
}


def _of_today(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with `precision` in place of what an earlier nacpipe recorded; the identity has the rest."""
    kept = {name: entry for name, entry in value.items() if name not in ("autocast", "channels_last")}
    autocast = value.get("autocast", "none")
    return kept if autocast == "none" else {"precision": autocast, **kept}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


FROM_PYTHON = "nacpipe.extract"  # the information `written_by` of a cache of `nacpipe.extract(network, …)`


def read_options(information: Mapping[str, Any]) -> ExtractOptions | None:
    """Return the options that a cache was extracted with, from its header's information.

    None where it records none: it was written by an earlier nacpipe, by a training loop, or by a program that records
    something else.
    """
    try:
        return ExtractOptions.from_json(information.get("options"))
    except (TypeError, ValueError):
        return None


def format_command(options: ExtractOptions, cache: str | Path) -> str:
    """Return the `nacpipe extract` command of these options, quoted for the shell; defaults are left out.

    Args:
        options: the record.
        cache: where the cache is.
    """
    words = ["extract", options.benchmark]
    for field in fields(ExtractOptions):
        value, flag = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "benchmark" or value == field.default:
            continue
        if field.name == "poolings":
            words += [word for layer, pooling in value for word in ("--pooling", f"{layer}={pooling}")]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{field.name}")
        else:
            words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return command_line(*words, "--cache", cache)


def finishing_command(information: Mapping[str, Any], cache: str | Path, train_images: int | None = None) -> str:
    """Return the command that made a cache, which also finishes it.

    Args:
        information: the header's.
        cache: where the cache is.
        train_images: of its id/train; None: as many as when it was made. More can have been extracted since.

    A cache of an earlier nacpipe holds that command as text, with the address that the cache had then; it is returned
    as it is. Text that nacpipe did not write is not returned: a person would run it.
    """
    if (options := read_options(information)) is not None:
        return format_command(options if train_images is None else replace(options, train_images=train_images), cache)
    if information.get("written_by") == FROM_PYTHON:
        return f"nacpipe.extract(network, splits, {str(cache)!r})"
    recorded = information.get("command")
    if isinstance(recorded, str) and _is_extract(recorded):
        return recorded
    return command_line("extract", "BENCHMARK", "--cache", cache)


def _is_extract(command: str) -> bool:
    """Whether text is one extract command, quoted as nacpipe quotes it."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        return False
    return words[:2] == ["nacpipe", "extract"] and shlex.join(words) == command
