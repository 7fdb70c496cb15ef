"""A detector as a file for other runtimes: ONNX, or a program of torch.export. One file holds network and detector.

    detector ──▶ DetectorGraph ──▶ torch.export ──▶ .pt2
                                               └──▶ .onnx ──▶ run by onnxruntime, compared with the detector

Inputs are the network's arguments, prepared as for the cache; outputs are logits, score, percentile and is_ood, as
`Detector` gives them. The number of samples is free.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nacpipe.detector.graph import DetectorGraph
from nacpipe.errors import DetectorError, MissingExtra, first_line
from nacpipe.files import check_writable, write_whole
from nacpipe.networks.call import count_samples, map_tensors, repeat_samples, tensors_of

OUTPUTS = ("logits", "score", "percentile", "is_ood")
EXAMPLES = 64  # samples that both runtimes are given
CLOSE = 1e-5  # scores that differ by no more count as equal
LOGITS_TOLERANCE = 0.01  # of their spread: above it another network was written
MAX_BATCH = 1 << 20
METADATA = "nacpipe_detector"  # the key of a file's description, JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCheck:
    """What the written file gave beside the detector, for the same samples."""

    samples: int
    close: float
    """The share of scores that differ by at most 1e-5."""
    largest: float
    """The largest difference of two scores."""


def write_program(
    path: str | Path,
    graph: DetectorGraph,
    arguments: Any,
    description: Mapping[str, Any],
    detect: Callable[[Any], Any],
) -> RuntimeCheck:
    """Write a program of torch.export, whole or not at all: `torch.export.load(path).module()` runs it.

    Args:
        path: of the file, .pt2.
        graph: the detector, while its taps exist.
        arguments: the network's, for a few samples, on its device.
        description: identity, transform, threshold, as JSON values; in the file as `nacpipe_detector.json`.
        detect: the detector, to compare with.

    Raises:
        DetectorError: torch.export cannot follow the network, or what it wrote gives other logits.
        InputError: the file cannot be written.
    """
    check_writable(path)
    program, arguments = _trace(graph, arguments)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{METADATA}.json": json.dumps(description)})
    content.seek(0)
    module = torch.export.load(content).module()

    def run(samples: Any) -> list[Any]:
        with torch.no_grad():
            return [output.cpu().numpy() for output in module(*_positional(samples))]

    check = _compare(run, detect, arguments)
    write_whole(path, content.getvalue())
    return check


def write_onnx(
    path: str | Path,
    graph: DetectorGraph,
    arguments: Any,
    description: Mapping[str, Any],
    detect: Callable[[Any], Any],
) -> RuntimeCheck:
    """Write one ONNX file, whole or not at all, after onnxruntime has run it.

    Its inputs are named as the network's keyword arguments, or `input`, `input_1`, …; arguments as `write_program`.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        DetectorError: the network cannot be written as ONNX, onnxruntime cannot run it on this processor, or gives
            other logits.
        InputError: the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
        import torch.onnx
    except ImportError as error:
        raise MissingExtra(f"ONNX needs {error.name}; install it with: pip install 'nacpipe[onnx]'") from None
    check_writable(path)
    program, arguments = _trace(graph, arguments)
    names = [name if name and not name.isdigit() else _input_name(name) for name, _ in tensors_of(arguments)]
    try:
        with _quiet():
            made = torch.onnx.export(program, input_names=names, output_names=list(OUTPUTS), dynamo=True, verbose=False)
        assert made is not None
        made.model.metadata_props[METADATA] = json.dumps(description)
        proto = made.model_proto
        _name_batch(proto.graph)
        content = proto.SerializeToString()
    except Exception as error:  # of the exporter's many passes, and of protobuf above 2 GB
        raise DetectorError(
            f"the network cannot be written as ONNX: {_reason(error)}; --format torch-export takes more networks"
        ) from error
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own
        raise DetectorError(
            f"onnxruntime cannot run the network on this processor: {_reason(error)}; a network in a half type needs"
            " an accelerator's runtime: count its detector in float32, or use --format torch-export"
        ) from error

    def run(samples: Any) -> list[Any]:
        arrays = [tensor.cpu().numpy() for _, tensor in tensors_of(samples)]
        return list(session.run(list(OUTPUTS), dict(zip(names, arrays, strict=True))))

    check = _compare(run, detect, arguments)
    write_whole(path, content)
    return check


def _trace(graph: DetectorGraph, arguments: Any) -> tuple[torch.export.ExportedProgram, Any]:
    """Return the detector as a program of torch.export, for any number of samples, and arguments to run it with.

    A mapping's entries go by place. Where there are fewer samples than both runtimes shall be given, they are repeated.

    Raises:
        DetectorError: torch.export cannot follow the network.
    """
    if count_samples(arguments) < EXAMPLES:
        arguments = repeat_samples(arguments, EXAMPLES)
    positional, batch = _positional(arguments), torch.export.Dim("batch", min=1, max=MAX_BATCH)
    free = {"arguments": tuple(_free_batch(argument, batch) for argument in positional)}
    graph.names = tuple(arguments) if isinstance(arguments, Mapping) else None
    try:
        with _quiet(), torch.no_grad():  # a change of the mode inside would be a part of the program
            program = torch.export.export(graph.eval(), positional, dynamic_shapes=free, strict=False)
    except Exception as error:  # of the network's own code under torch.export
        advice = (
            "its forward must not look at values or at the number of samples (.item(), if x.sum() > 0, .view(8, …))"
        )
        if any(".quantized" in type(module).__module__ for module in graph.network.modules()):
            advice = (
                "it has torch.ao's packed modules: quantise the network as a program of torch.export (PT2E does), and"
                " give torch.export.unflatten(program)"
            )
        raise DetectorError(f"torch.export cannot follow the network: {_reason(error)}; {advice}") from error
    return program, arguments


def _positional(arguments: Any) -> tuple[Any, ...]:
    """The arguments in order, without names."""
    if isinstance(arguments, Mapping):
        return tuple(arguments.values())
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _free_batch(argument: Any, batch: Any) -> Any:
    """The sizes of one argument that are free: the first of every tensor."""
    if isinstance(argument, Tensor):
        return {0: batch} if argument.dim() else None
    if isinstance(argument, Mapping):
        return {key: _free_batch(entry, batch) for key, entry in argument.items()}
    if isinstance(argument, tuple | list):
        return tuple(_free_batch(entry, batch) for entry in argument)
    return None


def _name_batch(graph: Any) -> None:
    """Call the free size `batch`, for which the exporter has a name of its own."""
    own = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == own:
                size.dim_param = "batch"


def _input_name(name: str) -> str:
    return "input" if name in ("", "0") else f"input_{name}"


def _compare(run: Callable[[Any], list[Any]], detect: Callable[[Any], Any], arguments: Any) -> RuntimeCheck:
    """Run both sides on all samples at once and on the first alone.

    Raises:
        DetectorError: the file's side fails, or gives other logits.
    """
    differences = []
    for samples in (arguments, map_tensors(lambda tensor: tensor[:1], arguments)):
        wanted = [output.double().cpu().numpy() for output in detect(samples)]
        try:
            found = run(samples)
        except Exception as error:  # of the other runtime
            raise DetectorError(f"the written network fails where torch's does not: {_reason(error)}") from error
        spread = float(np.ptp(wanted[0])) or 1.0
        off = float(np.abs(found[0].astype(np.float64) - wanted[0]).max())
        if not off <= LOGITS_TOLERANCE * spread:
            raise DetectorError(
                f"the written network gives other logits than torch's: they differ by {off:.2g}, of a spread of"
                f" {spread:.2g}; nothing was written"
            )
        differences.append(np.abs(np.nan_to_num(found[1]) - np.nan_to_num(wanted[1])))
    all_of_them = np.concatenate(differences)
    return RuntimeCheck(
        samples=len(differences[0]), close=float((all_of_them <= CLOSE).mean()), largest=float(all_of_them.max())
    )


def _reason(error: BaseException) -> str:
    """The first line that says something: exporters chain errors, and begin with their progress."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and logs, which speak of their own work."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
