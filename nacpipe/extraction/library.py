"""Extraction from Python: any network, any data.

cache = nacpipe.extract(network, {"id/train": train, "id/val": val, "ood/val": other}, "x.zarr")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nacpipe.cache import Cache, open_cache
from nacpipe.cache.identity import VAL
from nacpipe.cache.layout import ALL_BITS, check_layer_names, check_split_name, is_split_path, split_order
from nacpipe.cache.options import FROM_PYTHON
from nacpipe.errors import CacheError, InputError
from nacpipe.extraction.distributed import Ranks, find_ranks
from nacpipe.extraction.pipeline import choose_blocks
from nacpipe.extraction.pipeline import extract as run_plan
from nacpipe.extraction.plan import Plan, plan_splits
from nacpipe.extraction.profile import Profile
from nacpipe.extraction.request import DataRequest, build_header, find_device, pin_arithmetic
from nacpipe.extraction.samples import MapSamples, StreamSamples, open_samples
from nacpipe.extraction.synthetic_samples import make_val
from nacpipe.networks.buffers import kept_buffers
from nacpipe.networks.build import adopt_module
from nacpipe.networks.call import ATTENTION_MASK, Call, Mask, describe_input, move
from nacpipe.networks.functions import describe_call
from nacpipe.networks.layers import AUTO, measure_layers, name_layers
from nacpipe.networks.precision import FP32, arithmetic, check_support
from nacpipe.networks.taps import isolated
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap

BATCH_SIZE = 128


def extract(
    network: nn.Module,
    splits: Mapping[str, Any],
    path: str | Path,
    *,
    layers: str | Sequence[str] | Mapping[str, str] = AUTO,
    pooling: Mapping[str, str] | None = None,
    prepare: Callable[[Any], Any] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    mask: Mask | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    precision: str = FP32,
    mantissa_bits: int = ALL_BITS,
    gradient: bool = True,
    block_rows: int | None = None,
    shard_blocks: int | None = None,
    redo: Sequence[str] = (),
    fingerprint: str | Mapping[str, str] | None = None,
    name: str = "own",
    synthetic_val: bool = True,
    distributed: bool | None = None,
    progress: bool | Callable[[str, int], None] = True,
    profile: bool = False,
) -> Cache:
    """Run a network once over the data and write every layer's states to a cache. The same call goes on after a kill.

    A sample is an input, `(input, label)`, or a mapping, whose `label` or `labels` is the label; OOD samples need none.
    An input is a tensor of any shape, a tuple of tensors (the network's arguments) or a mapping (its keyword
    arguments).
    The network's modes, flags and parameters' gradients are unchanged afterwards.

    Args:
        network: a classifier: it gives logits (n, classes), an object with `.logits`, or a mapping with "logits".
        splits: split name → a map-style data set, such as a list of samples; a DataLoader of one that takes its samples
            in order (its `collate_fn` and `num_workers` are used); or an iterable of batches. The names are `id/train`,
            `id/subtrain`, `id/val`, `id/test`, `csid/NAME`, `ood/val`, `ood/near/NAME` and `ood/far/NAME`. A map-style
            data set goes on at a block after a kill; an iterable starts its split anew.
        path: the cache's folder, or its URL.
        layers: `auto`: the classifier's input and the ends of stages, at most four; or module paths, `NAME=PATH`; or
            name in the cache → module path.
        pooling: layer's name → pooling (networks/poolings.py), in place of the guessed one.
        prepare: a batch's input → the network's arguments: a tensor, a tuple or a mapping.
        logits: the network's output → logits (n, classes).
        mask: of padded samples, the name of the argument, or arguments → (n, length): positions that are not 0 count.
            None: the argument `attention_mask`, if there is one.
        device: where the network runs; None: where it is. It is moved back afterwards.
        batch_size: samples at once; None: the first DataLoader's, or 128.
        workers: processes that read the samples of a map-style data set; 0: this one.
        precision: fp32 (the type of the weights, float32 products exact), tf32, bf16 or fp16.
        mantissa_bits: bits of mantissa of activations, gradients and features to store, 1 to 23 (all).
        gradient: False: forward passes alone; then terms need activations.
        block_rows: rows of a block of a new cache, a multiple of `batch_size`; None: about ten seconds of work.
        shard_blocks: blocks in one stored object; None: 1, of a remote cache 8.
        redo: splits to drop and extract again.
        fingerprint: text, or split → text, that stands for the data in the cache's identity; None: the class, length,
            labels and content of seeded samples, of an iterable the content of all.
        name: of the data, as the cache's identity has it.
        synthetic_val: whether `ood/val` is made of id/val's samples (mixtures, shuffles, noise; of images of 8 bits
            more kinds) where neither this call nor the cache has one: a search needs it.
        distributed: whether the processes of torchrun, or of torch's process group, write one cache together: then all
            of them call this. None: where there are several. An iterable is read by the first alone.
        progress: whether a bar and notes are shown on stderr; or a function that is called with a split and a number of
            samples after every batch.
        profile: whether the time of each stage is shown on stderr at the end: what a faster run needs.

    Returns:
        The cache, opened for reading.

    Raises:
        InputError: a split, layer or option is not known; the data or a label do not fit; the network is random in
            evaluation mode, or a sample's logits depend on its batch.
        IdentityError: the cache was made from another network, other data or layers.
        CacheError: the cache cannot be written, or another extraction writes it.
    """
    pin_arithmetic()
    call = Call(prepare=prepare, logits=logits, mask=mask)
    samples = _open_splits(splits, call, workers, fingerprint)
    made_notes = _add_val(samples, path, call) if synthetic_val else []
    names = [one.name for one in samples]
    if unknown := [split for split in redo if split not in names]:
        raise InputError(f"redo names {unknown[0]!r}; the splits are {', '.join(names)}")
    request = DataRequest(
        cache=path,
        batch_size=_batch_size(splits) if batch_size is None else batch_size,
        redo=tuple(redo),
        precision=precision,
        mantissa_bits=mantissa_bits,
        block_rows=block_rows,
        shard_blocks=shard_blocks,
        gradient=gradient,
    )
    request.check()
    network = unwrap(network)
    ranks = find_ranks(distributed)
    home = find_device_and_dtype(network)[0]
    target = home if device is None else find_device(str(device), ranks.local, ranks.local_world, python=True)
    check_support(precision, target, python=True)
    show, measured = _Show(progress, ranks), Profile(target) if profile else None
    ranks.meet(_say)
    try:
        network.to(target)
        with isolated(network, target), kept_buffers(network):
            with arithmetic(FP32):
                plan = _plan(request, network, samples, call, layers, pooling or {}, name)
            for text in (*made_notes, *plan.notes):
                show.note(text)
            plan = choose_blocks(plan, ranks, show.note)
            with show.bar(plan):
                run_plan(plan, show.step, ranks, show.note, measured)
    finally:
        network.to(home)
    if measured is not None and ranks.first:
        _say(measured.to_text())
    ranks.wait()
    return open_cache(path)


def _plan(
    request: DataRequest,
    network: nn.Module,
    samples: Sequence[MapSamples | StreamSamples],
    call: Call,
    layers: str | Sequence[str] | Mapping[str, str],
    pooling: Mapping[str, str],
    name: str,
) -> Plan:
    examples = move(samples[0].examples(), find_device_and_dtype(network)[0])
    adopted = adopt_module(network, examples, call)
    wanted = (layers,) if isinstance(layers, str) else layers
    measured = measure_layers(adopted, wanted, list(pooling.items()), gradients=request.gradient)
    check_layer_names(list(name_layers({spec.name: spec.path for spec in measured.layers})))
    described, function_notes = describe_call(call)
    header = build_header(
        request,
        adopted,
        measured,
        benchmark=name,
        prepared={"input": describe_input(examples, call.mask_of(examples)), "call": described},
        information={"written_by": FROM_PYTHON},
    )
    notes = [*adopted.notes, *measured.notes, *function_notes]
    if call.mask is None and call.mask_of(examples) is not None:
        notes.append(f"the argument {ATTENTION_MASK} is taken as the mask: positions where it is 0 are padding")
    return plan_splits(request, header, adopted, samples, notes)


def _open_splits(
    splits: Mapping[str, Any], call: Call, workers: int, fingerprint: str | Mapping[str, str] | None
) -> list[MapSamples | StreamSamples]:
    """Return the samples of all splits, id/train first: its samples are the examples."""
    if not splits:
        raise InputError("there are no splits; give at least id/train, id/val and ood/val")
    samples = []
    for split in sorted(splits, key=split_order):
        if not is_split_path(split):
            raise InputError(
                f"split {split!r} is not known; known: id/train, id/subtrain, id/val, id/test, csid/NAME, ood/val,"
                " ood/near/NAME, ood/far/NAME"
            )
        check_split_name(split)
        text = fingerprint.get(split) if isinstance(fingerprint, Mapping) else fingerprint
        samples.append(open_samples(split, splits[split], call, workers=workers, fingerprint=text))
        samples[-1].check_like(samples[0])
    return samples


def _add_val(samples: list[MapSamples | StreamSamples], path: str | Path, call: Call) -> list[str]:
    """Add an `ood/val` that is made of id/val, where neither the call nor the cache has one; return what to say."""
    by_name = {one.name: one for one in samples}
    if VAL in by_name or "id/val" not in by_name:
        return []
    held = _held_val(path)
    if held is not None and "synthetic" not in held:
        return []
    source = by_name["id/val"]
    try:
        if isinstance(source, StreamSamples):
            raise InputError("id/val is an iterable, whose samples cannot be chosen")
        made = make_val(source, call)
    except InputError as error:
        return [f"there is no {VAL}, which a search needs, and none can be made of id/val: {error}; give one"]
    samples.append(made)
    samples.sort(key=lambda one: split_order(one.name))
    kinds = ", ".join(made.identity()["synthetic"]["kinds"])
    return [f"there is no {VAL}; it is made of id/val's samples ({kinds}); synthetic_val=False leaves it out"]


def _held_val(path: str | Path) -> Mapping[str, Any] | None:
    """Return what the ood/val of a cache that is there was made from."""
    try:
        cache = open_cache(path)
        return cache.peek(VAL).images if VAL in cache else None
    except CacheError:  # there is none yet; what is wrong with one is said later
        return None


def _batch_size(splits: Mapping[str, Any]) -> int:
    sizes = [data.batch_size for data in splits.values() if isinstance(data, DataLoader) and data.batch_size]
    return sizes[0] if sizes else BATCH_SIZE


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class _Show:
    """Notes and a bar on stderr, by the first rank, or a caller's function, or nothing."""

    def __init__(self, progress: bool | Callable[[str, int], None], ranks: Ranks) -> None:
        self._function = progress if callable(progress) else None
        self._shown, self._ranks = progress is True and ranks.first, ranks
        self._bar: Any = None

    def note(self, text: str) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            _say(text)

    def step(self, split: str, rows: int) -> None:
        if self._function is not None:
            self._function(split, rows)
        if self._bar is not None:
            self._bar.set_description(split, refresh=False)
            self._bar.update(rows)

    def bar(self, plan: Plan) -> Any:
        """Return the bar's context."""
        from tqdm.auto import tqdm

        streams = any(isinstance(split.images, StreamSamples) and not split.sealed for split in plan.splits)
        total = None if streams else plan.todo_rows(self._ranks)
        self._bar = tqdm(total=total, unit="sample", disable=not self._shown or total == 0)
        return self._bar
