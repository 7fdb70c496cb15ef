"""Ways of running that must not change the values, or change them as much as is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nacpipe.cache import Cache, Header, LayerSpec, open_cache
from nacpipe.errors import IdentityError, InputError
from nacpipe.extraction.pipeline import extract, to_arrays
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.architectures.resnets import CifarResNet
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.taps import Tapped, Taps, find_penultimate, freeze

pytestmark = pytest.mark.usefixtures("one_thread")


def make(request: ExtractRequest) -> Cache:
    extract(plan_extraction(request))
    return open_cache(request.cache)


def spec(name: str) -> LayerSpec:
    return LayerSpec(name=name, path=name, pooling="sum-nchw", neurons=0)


def test_a_layer_that_feeds_the_classifier_needs_no_backward_pass() -> None:
    torch.manual_seed(0)
    network, images = freeze(CifarResNet(3, 10)).double(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    both = [spec("avgpool"), spec("layer3")]
    assert find_penultimate(network, both, "fc", images) == {"avgpool"}
    assert find_penultimate(network, both, None, images) == frozenset()
    with Taps(network, both[:1], "fc") as taps:
        backward = taps(images)
    recorded: list[bool] = []
    network.get_submodule("fc").register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0].requires_grad))
    with Taps(network, both[:1], "fc", penultimate={"avgpool"}) as taps:
        closed = taps(images)
    assert recorded == [False]
    torch.testing.assert_close(closed.gradient["avgpool"], backward.gradient["avgpool"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(closed.activation["avgpool"], backward.activation["avgpool"], rtol=0, atol=0)
    uniform = closed.logits.softmax(1) - 0.1
    torch.testing.assert_close(closed.gradient["avgpool"], uniform @ network.fc.weight, rtol=1e-12, atol=1e-15)


def test_a_batch_that_does_not_fit_runs_in_halves_and_so_do_those_after_it() -> None:
    sizes: list[int] = []
    notes: list[str] = []

    def taps(images: Tensor) -> Tapped:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("too much")
        return Tapped({"a": images[:, :1]}, {"a": images[:, 1:2]}, images, None)

    images = torch.arange(7 * 3.0).reshape(7, 3)
    layer = LayerSpec(name="a", path="a", pooling="none", neurons=1)
    header = Header(identity={}, information={}, block_rows=8, layers=(layer,), classes=3, features=0)
    run = BatchRunner(lambda part: to_arrays(taps(part), header), torch.device("cpu"), notes.append)
    for batch, expected in ((images, [7, 4, 2, 2, 2, 1]), (images, [2, 2, 2, 1]), (images[:5], [2, 2, 1])):
        sizes.clear()
        parts = list(run(batch))
        assert sizes == expected
        np.testing.assert_array_equal(np.concatenate([part["logits"] for part in parts]), batch.numpy())
    assert notes == ["7 samples at once do not fit the memory of cpu: from here on batches of 2"]


def test_one_image_that_does_not_fit_is_an_error() -> None:
    def taps(images: Tensor) -> Tapped:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(InputError, match="one sample does not fit the memory of cpu; try --device cpu"):
        list(BatchRunner(taps, torch.device("cpu"), lambda text: None)(torch.zeros(4, 3)))


@pytest.mark.slow
def test_fewer_bits_are_rounded_states_and_exact_logits(finished: Cache, request_: ExtractRequest) -> None:
    whole = finished
    rounded = make(replace(request_, cache=request_.cache.with_name("rounded.zarr"), mantissa_bits=10))
    for path in whole.header.arrays():
        exact, kept = whole["id/val"].read(path), rounded["id/val"].read(path)
        if "/" not in path and path != "features":
            np.testing.assert_array_equal(kept, exact)
            continue
        assert (kept.view(np.uint32) & 0x1FFF == 0).all(), "13 of 23 bits are 0"
        np.testing.assert_allclose(kept, exact, rtol=2.0**-11, atol=0)
        assert ((kept == 0) == (exact == 0)).all()
    with pytest.raises(IdentityError, match="keep_bits: stored 23, now 10"):
        plan_extraction(replace(request_, cache=Path(whole.path), mantissa_bits=10))


@pytest.mark.repeats(1)
@pytest.mark.parametrize("dies", [False, True])
def test_shards_hold_the_same_values(finished: Cache, request_: ExtractRequest, dies: bool) -> None:
    whole = finished
    sharded = replace(request_, cache=request_.cache.with_name("sharded.zarr"), shard_blocks=2)
    if dies:

        def progress(split: str, rows: int) -> None:
            if split == "ood/val":
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            extract(plan_extraction(sharded), progress)
    made = make(sharded)
    assert list(made) == list(whole)
    for name in whole:
        for path in whole.header.arrays():
            np.testing.assert_array_equal(made[name].read(path), whole[name].read(path))
    assert made["id/train"].array("logits").shards == (32, 10)


@pytest.mark.slow
def test_half_precision_is_near_and_another_identity(finished: Cache, request_: ExtractRequest) -> None:
    whole = finished
    half = make(replace(request_, cache=request_.cache.with_name("half.zarr"), precision="bf16"))
    exact, near = (c["id/val"].read("layers/layer3/activation") for c in (whole, half))
    difference = float(np.linalg.norm(near - exact) / np.linalg.norm(exact))
    assert 1e-6 < difference < 2e-2
    with pytest.raises(IdentityError, match="dtype: stored float32, now bf16"):
        plan_extraction(replace(request_, cache=Path(whole.path), precision="bf16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "--precision is 'fp8'; known: fp32, tf32, bf16, fp16"),
        ({"precision": "tf32"}, "--precision tf32 cannot be used on cpu: cpu has no TF32; take --precision fp32"),
        ({"mantissa_bits": 0}, "mantissa-bits is 0; it must lie between 1 and 23"),
        ({"shard_blocks": 0}, "shard-blocks is 0; it must lie between 1 and"),
    ],
)
def test_modes_that_make_no_sense_are_refused(
    request_: ExtractRequest, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_extraction(replace(request_, **change))  # type: ignore[arg-type]
    assert not request_.cache.exists()
