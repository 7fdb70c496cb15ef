"""Extraction on a small data root in OpenOOD's layout: the plan, the values, going on after a crash, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.benchmarks.synthetic import IMAGE_KINDS, make_synthetic
from nacpipe.cache import Cache, layout, open_cache
from nacpipe.cache.options import ExtractOptions, format_command
from nacpipe.cli.image_lookup import image_names
from nacpipe.errors import IdentityError, ImageError, InputError
from nacpipe.extraction.dataset import ImageSet, build_transform
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import Plan, plan_extraction, total_bytes
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Taps

pytestmark = pytest.mark.usefixtures("one_thread")

# What conftest.py makes; blocks are of 16 rows, batches of 8.
ROWS = {"id/train": 40, "id/subtrain": 20, "id/val": 40, "id/test": 16, "ood/val": 21, "ood/far/mnist": 3}
LEFT_OUT = [
    "csid/cifar10c",
    "ood/near/cifar100",
    "ood/near/tin",
    "ood/far/svhn",
    "ood/far/texture",
    "ood/far/places365",
]
LAYERS = {"avgpool": 64, "layer3": 64, "layer2": 32, "layer1": 16}


def states(plan: Plan) -> dict[str, str]:
    return {split.images.name: split.state for split in plan.splits}


def open_image(root: Path, image: str) -> Image.Image:
    return Image.open(root / "images_classic" / image).convert("RGB")


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_of_a_new_cache(request_: ExtractRequest) -> None:
    plan = plan_extraction(request_)
    assert states(plan) == dict.fromkeys(ROWS, "new")
    assert {split.images.name: split.rows for split in plan.splits} == ROWS
    assert plan.todo_rows(Ranks()) == sum(ROWS.values())
    assert (plan.exists, plan.header.block_rows) == (False, 16)
    assert {spec.name: spec.neurons for spec in plan.header.layers} == LAYERS
    assert plan.header.row_bytes() == 4 * (2 * sum(LAYERS.values()) + 64 + 10) + 2 * 8
    assert total_bytes(plan, plan.splits[:2]) == 60 * plan.header.row_bytes()
    assert plan.notes[0] == "id/train: 40 of the 45 images asked for, the same number of each class"
    assert plan.notes[1:-1] == tuple(
        f"{name}: left out, its list is not there (test_{name.split('/')[-1]}.txt)" for name in LEFT_OUT
    )
    assert plan.notes[-1] == (
        "images are prepared by the network resnet20: resize 32 (bilinear), crop 32, mean 0.485 0.456 0.406, std 0.229"
        " 0.224 0.225"
    )
    assert not request_.cache.exists()  # planning changes nothing


def test_batches_never_cross_a_block(request_: ExtractRequest) -> None:
    plan = plan_extraction(replace(request_, batch_size=6, block_rows=12))
    assert plan.header.block_rows == 12
    val = next(split for split in plan.splits if split.images.name == "id/val")
    assert val.todo == (0, 1, 2, 3)
    assert plan.batches(val, 1) == [range(12, 18), range(18, 24)]
    assert plan.batches(val, 3) == [range(36, 40)]


@pytest.mark.parametrize("batch_size", [5, 16, 24, 100])
def test_another_batch_size_later_never_crosses_a_block(
    finished: Cache, request_: ExtractRequest, batch_size: int
) -> None:
    """Blocks stay those of 16 rows that the cache was made with; a batch is at most one of them."""
    there = replace(request_, cache=Path(finished.path), batch_size=batch_size, block_rows=None, redo=("id/val",))
    plan = plan_extraction(there)
    assert (plan.header.block_rows, plan.blocks_are_open) == (16, False)
    val = next(split for split in plan.splits if split.images.name == "id/val")
    found = [batch for unit in plan.units(val) for batch in plan.batches(val, unit)]
    assert [row for batch in found for row in batch] == list(range(40))
    assert all(batch.start // 16 == (batch.stop - 1) // 16 for batch in found)
    assert max(map(len, found)) == min(batch_size, 16)


def test_plan_goes_on_where_the_cache_ends(request_: ExtractRequest) -> None:
    def stop(split: str, rows: int) -> None:
        if split == "id/val" and stop_after.pop(0):
            raise KeyboardInterrupt

    stop_after = [False] * 4 + [True]  # in the third block of three; the second is written meanwhile
    with pytest.raises(KeyboardInterrupt):
        extract(plan_extraction(request_), stop)
    plan = plan_extraction(request_)
    done = {"id/train": "done", "id/subtrain": "done", "id/val": "from block 2"}
    assert states(plan) == {**dict.fromkeys(ROWS, "new"), **done}
    assert plan.exists
    assert plan.todo_rows(Ranks()) == 8 + ROWS["id/test"] + ROWS["ood/val"] + ROWS["ood/far/mnist"]
    assert next(s for s in plan.splits if s.images.name == "id/val").todo == (2,)


def test_plan_of_chosen_and_forced_splits(finished: Cache, request_: ExtractRequest) -> None:
    there = replace(request_, cache=Path(finished.path))
    assert states(plan_extraction(there)) == dict.fromkeys(ROWS, "done")
    assert plan_extraction(there).todo_rows(Ranks()) == 0
    plan = plan_extraction(replace(there, splits=("id/val",), redo=("ood/val",)))
    assert states(plan) == {"id/val": "done", "ood/val": "again"}
    assert plan.todo_rows(Ranks()) == 21
    assert states(plan_extraction(replace(request_, splits=("id/test", "id/val")))) == {
        "id/val": "new",
        "id/test": "new",
    }


# --- without an ood/val -----------------------------------------------------------------------------------------------


@pytest.fixture
def lacking(root: Path, request_: ExtractRequest, tmp_path: Path) -> ExtractRequest:
    """The same with a data root of its own that has no list of ood/val."""
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    (copy / "benchmark_imglist/cifar10/val_tin.txt").unlink()
    return replace(request_, data_root=copy)


def ood_val(plan: Plan) -> ImageSet:
    return next(split.images for split in plan.splits if split.images.name == "ood/val")


def test_where_the_list_is_missing_ood_val_is_made_from_id_val(lacking: ExtractRequest) -> None:
    plan = plan_extraction(lacking)
    assert "ood/val: its list is not there (val_tin.txt)" in plan.notes
    assert any(
        note.startswith("ood/val: made from the images of id/val (synthetic, version 1, seed 1): shuffle, mix")
        for note in plan.notes
    )
    found = ood_val(plan)
    assert found.identity()["synthetic"] == {"version": 1, "seed": 1, "kinds": list(IMAGE_KINDS), "side": 32}
    base = next(split.images for split in plan.splits if split.images.name == "id/val")
    expected = make_synthetic(np.stack([np.asarray(base.open(row)) for row in range(40)]), base.labels)
    assert all((np.asarray(found.open(row)) == expected[row]).all() for row in range(40))
    assert (found.labels == -1).all()


def test_so_it_is_where_none_of_its_images_is_there(lacking: ExtractRequest, root: Path) -> None:
    lists = Path("benchmark_imglist/cifar10/val_tin.txt")
    shutil.copy(root / lists, lacking.data_root / lists)
    shutil.rmtree(lacking.data_root / "images_classic/val_tin")
    plan = plan_extraction(lacking)
    assert "ood/val: none of the 21 images of val_tin.txt is there" in plan.notes
    assert ood_val(plan).source == "synthetic, from val_cifar10.txt"
    folder = lacking.data_root / "images_classic/val_tin"
    folder.mkdir()
    shutil.copy(root / "images_classic/val_tin/0.png", folder)  # one of 21: no longer on purpose
    with pytest.raises(ImageError, match=r"^20 listed images are not there; the first is .*/1.png"):
        plan_extraction(lacking)


def test_an_ood_val_that_is_requested_by_name_is_not_made(lacking: ExtractRequest) -> None:
    with pytest.raises(ImageError, match=r"^ood/val: there is no image list .*val_tin\.txt; say .* leave --splits"):
        plan_extraction(replace(lacking, splits=("id/val", "ood/val")))


def test_a_made_ood_val_is_found_again_and_not_taken_for_a_real_one(lacking: ExtractRequest, root: Path) -> None:
    extract(plan_extraction(lacking))
    cache = open_cache(lacking.cache)
    assert cache["ood/val"].rows == 40
    assert states(plan_extraction(lacking))["ood/val"] == "done"
    folder = lacking.data_root / "images_classic/val_cifar10"
    assert image_names(cache, "ood/val", [3]) == [str(folder / "3.png")]
    lists = Path("benchmark_imglist/cifar10/val_tin.txt")
    shutil.copy(root / lists, lacking.data_root / lists)
    with pytest.raises(IdentityError, match=r"ood/val was made from other images: .*--redo ood/val"):
        plan_extraction(lacking)
    assert states(plan_extraction(replace(lacking, redo=("ood/val",))))["ood/val"] == "again"
    assert image_names(cache, "ood/val", [3]) == [str(folder / "3.png")]  # what it was made from


def test_an_ood_val_is_made_on_request_although_the_benchmark_has_one(
    finished: Cache, request_: ExtractRequest, lacking: ExtractRequest
) -> None:
    """Its identity is that of one made because there is none; a sealed real one is not taken for it."""
    asked = replace(request_, synthetic_val=True)
    plan = plan_extraction(asked)
    assert ood_val(plan).identity() == ood_val(plan_extraction(lacking)).identity()
    assert ood_val(plan).identity() != ood_val(plan_extraction(request_)).identity()
    assert not any("its list is not there" in note for note in plan.notes if note.startswith("ood/val"))
    there = replace(asked, cache=Path(finished.path))
    with pytest.raises(IdentityError, match=r"ood/val was made from other images: .*--redo ood/val"):
        plan_extraction(there)
    again = plan_extraction(replace(there, redo=("ood/val",)))
    assert (states(again)["ood/val"], ood_val(again).source) == ("again", "synthetic, from val_cifar10.txt")
    assert " --synthetic-val " in format_command(ExtractOptions.from_json(asked.to_json()), "c.zarr")
    assert "--synthetic-val" not in format_command(ExtractOptions.from_json(request_.to_json()), "c.zarr")


# --- the values -------------------------------------------------------------------------------------------------------


def test_cache_holds_what_taps_give_batch_by_batch(finished: Cache, root: Path, checkpoint: Path) -> None:
    assert {name: finished[name].rows for name in finished} == ROWS
    network = load_network(find_model("resnet20"), find_benchmark("cifar10"), checkpoint, torch.device("cpu"))
    transform = build_transform(network.transform)
    for name, source in {
        "id/val": "val_cifar10",
        "ood/far/mnist": "test_mnist",
        "id/train": "main_train_cifar10",
    }.items():
        split = finished[name]
        images = torch.stack([transform(open_image(root, f"{source}/{i}.png")) for i in split.index])
        with Taps(network.module, finished.header.layers, "fc") as taps:
            batches = [taps(batch) for batch in images.split(8)]  # 16 = 2 · 8, so blocks do not show
        for layer in LAYERS:
            for kind in ("activation", "gradient"):
                expected = torch.cat([getattr(tapped, kind)[layer] for tapped in batches]).numpy()
                np.testing.assert_array_equal(getattr(split[layer], kind)[:], expected)
        np.testing.assert_array_equal(split.logits[:], torch.cat([t.logits for t in batches]).numpy())
        assert split.label.tolist() == [i % 10 if source.endswith("cifar10") else -1 for i in split.index]
    assert finished["id/val"].index.tolist() == list(range(40))
    classifier = finished.classifier()
    assert classifier is not None
    weight, bias = classifier
    for name in ROWS:  # features are the classifier's input
        features = np.asarray(finished[name].features[:])
        np.testing.assert_allclose(
            features @ weight.T + bias, np.asarray(finished[name].logits[:]), rtol=1e-4, atol=1e-5
        )
    assert (weight == network.module.state_dict()["fc.weight"].numpy()).all()


@pytest.mark.repeats(1)
@pytest.mark.parametrize(("batch_size", "workers"), [(5, 0), pytest.param(40, 3, marks=pytest.mark.slow)])
def test_other_batch_sizes_and_workers_agree(
    finished: Cache, request_: ExtractRequest, batch_size: int, workers: int
) -> None:
    request = replace(request_, batch_size=batch_size, block_rows=None, workers=workers, splits=("id/val", "ood/val"))
    extract(plan_extraction(request))
    cache = open_cache(request.cache)
    for name in ("id/val", "ood/val"):
        for layer in LAYERS:
            for kind in ("activation", "gradient"):
                found, expected = (np.asarray(getattr(c[name][layer], kind)[:]) for c in (cache, finished))
                assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_weights_layers_or_samples_are_refused(
    finished: Cache, request_: ExtractRequest, checkpoint: Path, tmp_path: Path
) -> None:
    there = replace(request_, cache=Path(finished.path))
    state = torch.load(checkpoint, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    for change, message in [
        (
            {"checkpoint": tmp_path / "other.pth"},
            r"was made from something else: weights: stored \w{8}…, now \w{8}…\. Give",
        ),
        (
            {"layers": ("avgpool",)},
            r"something else: layers\.layer1: stored \{.*\}, now nothing; layers\.layer2: .*Give an",
        ),
        (
            {"train_seed": 2},
            r"id/train was made from other images: seed: stored 1, now 2\. Give the same options, or extract it again"
            r" with --redo id/train$",
        ),
    ]:
        with pytest.raises(IdentityError, match=message):
            plan_extraction(replace(there, **change))  # type: ignore[arg-type]


def test_another_list_is_refused(finished: Cache, request_: ExtractRequest, root: Path) -> None:
    path = root / "benchmark_imglist/cifar10/val_tin.txt"
    content = path.read_text()
    path.write_text(content.replace(" -1", " -1 "))
    try:
        with pytest.raises(
            IdentityError, match=r"ood/val was made from other images: sha256: stored \w{8}…, now \w{8}…\."
        ):
            plan_extraction(replace(request_, cache=Path(finished.path)))
    finally:
        path.write_text(content)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"benchmark": "cifar"}, InputError, r"^benchmark 'cifar' is not known; known: digits, cifar10"),
        ({"model": "vgg"}, InputError, r"^model 'vgg' is not known"),
        ({"layers": ("layer7",)}, InputError, r"^layer 'layer7' is not known for resnet20"),
        ({"splits": ("id/tset",)}, InputError, r"^split 'id/tset' is not part of benchmark cifar10"),
        ({"redo": ("ood",)}, InputError, r"^split 'ood' is not part of benchmark cifar10"),
        ({"batch_size": 0}, InputError, r"^batch-size is 0; it must lie between 1 and"),
        ({"block_rows": 0}, InputError, r"^block-rows is 0; it must lie between 1 and 1048576$"),
        ({"block_rows": 12}, InputError, r"^block-rows is 12; it must be a multiple of batch-size, 8$"),
        ({"train_images": 0}, InputError, r"^main_train_cifar10\.txt: train-images is 0; it must be at least 1$"),
        ({"device": "cuda:99"}, InputError, r"^device 'cuda:99' cannot be used here: "),
        ({"device": "fast"}, InputError, r"^device 'fast' cannot be used here: "),
        ({"checkpoint": None}, InputError, r"^resnet20 has no packaged weights; give them with --checkpoint FILE$"),
        (
            {"splits": ("ood/far/svhn",)},
            ImageError,
            r"^ood/far/svhn: there is no image list .*/test_svhn\.txt; say where the data is with --data-root DIR$",
        ),
        (
            {"data_root": Path("nowhere")},
            ImageError,
            r"^id/train: there is no image list nowhere/benchmark_imglist/cifar10/",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(
    request_: ExtractRequest, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_extraction(replace(request_, **change))
    assert not request_.cache.exists()


def test_blocks_that_cannot_be_stored_are_not_planned(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk has a limit; the widest array has 64 neurons, so here one of 20 rows."""
    monkeypatch.setattr(layout, "MAX_CHUNK_BYTES", 4 * 64 * 20)
    assert plan_extraction(request_).header.block_rows == 16
    open_blocks = replace(request_, block_rows=None)
    assert plan_extraction(open_blocks).header.block_rows == 16  # two batches, not 64
    assert plan_extraction(replace(open_blocks, batch_size=15)).header.block_rows == 15
    message = "a block of layers/avgpool/activation has more than 5120 bytes; make it smaller$"
    with pytest.raises(InputError, match=f"^block-rows is 24: {message}"):
        plan_extraction(replace(request_, block_rows=24))
    with pytest.raises(InputError, match=f"^batch-size is 21: {message}"):
        plan_extraction(replace(open_blocks, batch_size=21))


def test_missing_images_are_refused_by_the_plan(request_: ExtractRequest, root: Path) -> None:
    image = root / "images_classic/val_cifar10/5.png"
    moved = image.rename(image.with_suffix(".moved"))
    try:
        with pytest.raises(ImageError, match=r"^1 listed images are not there; the first is .*5\.png \(line 6 of "):
            plan_extraction(request_)
    finally:
        moved.rename(image)


def test_an_empty_folder_is_no_cache_yet(request_: ExtractRequest) -> None:
    """As a process leaves it that was killed before its first file."""
    request_.cache.mkdir()
    assert not plan_extraction(request_).exists
