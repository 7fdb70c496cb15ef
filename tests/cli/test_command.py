"""The record of an extract's options, and the command that messages name as the way to make or finish a cache."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from nacpipe.cache.options import ExtractOptions, finishing_command, format_command, read_options
from nacpipe.cli.extract import extract
from nacpipe.extraction.request import ExtractRequest

OPTIONS = ExtractOptions(benchmark="cifar10", model="resnet20", checkpoint=Path("a b.th"))
OTHERS: dict[str, Any] = {  # every option away from its default
    "weights_transform": "benchmark",
    "layers": ("avgpool", "x.1"),
    "poolings": (("x.1", "none"), ("avgpool", "sum-nchw")),
    "data_root": Path("my data"),
    "train_images": 50,
    "train_seed": 2,
    "batch_size": 64,
    "device": "cpu",
    "allow_truncated": True,
    "decoder": "torchvision",
    "precision": "bf16",
    "mantissa_bits": 10,
    "block_rows": 128,
    "shard_blocks": 4,
}
ALL = ExtractOptions(benchmark="cifar10", model="resnet20", checkpoint=Path("a b.th"), **OTHERS)


def test_what_is_as_usual_is_left_out() -> None:
    command = format_command(OPTIONS, "my caches/c.zarr")
    assert command == "nacpipe extract cifar10 --model resnet20 --checkpoint 'a b.th' --cache 'my caches/c.zarr'"


def test_every_option_is_in_the_command() -> None:
    assert format_command(ALL, "c.zarr").removeprefix(format_command(OPTIONS, "").split(" --cache")[0]) == (
        " --weights-transform benchmark --layers avgpool,x.1 --pooling x.1=none --pooling avgpool=sum-nchw"
        " --data-root 'my data' --train-images 50 --train-seed 2 --batch-size 64 --device cpu --allow-truncated"
        " --decoder torchvision --precision bf16 --mantissa-bits 10 --block-rows 128 --shard-blocks 4 --cache c.zarr"
    )


def test_the_command_line_has_the_record_s_options_and_defaults() -> None:
    given = extract.make_context("extract", ["digits"]).params
    made_up = ("benchmark", "model", "cache", "train_images")  # given, or filled in by make_requests
    usual = {field.name: field.default for field in fields(ExtractRequest) if field.name not in made_up}
    of_the_run = ("dry_run", "profile", "as_json")
    assert {name: value for name, value in given.items() if name not in (*made_up, *of_the_run)} == usual


@pytest.mark.parametrize("options", [OPTIONS, ALL])
def test_a_record_and_its_json_are_the_same(options: ExtractOptions) -> None:
    assert ExtractOptions.from_json(options.to_json()) == options
    assert read_options({"options": options.to_json()}) == options
    assert finishing_command({"options": options.to_json()}, "c.zarr") == format_command(options, "c.zarr")


def test_a_request_s_record_is_without_its_address_and_this_run_s_splits() -> None:
    request = ExtractRequest(
        benchmark="digits",
        model="digits_cnn",
        cache="https://me:secret@host/c.zarr",
        splits=("id/val",),
        redo=("id/val",),
        workers=5,
    )
    assert request.to_json() == ExtractOptions(benchmark="digits", model="digits_cnn").to_json()
    assert request.to_json() == {
        "benchmark": "digits",
        "model": "digits_cnn",
        "checkpoint": None,
        "weights_transform": None,
        "layers": [],
        "poolings": [],
        "data_root": None,
        "train_images": 1000,
        "train_seed": 1,
        "batch_size": 128,
        "device": "auto",
        "allow_truncated": False,
        "synthetic_val": False,
        "decoder": "pillow",
        "gradient": True,
        "precision": "fp32",
        "mantissa_bits": 23,
        "block_rows": None,
        "shard_blocks": None,
    }


def test_an_earlier_cache_s_command_is_printed_as_it_is() -> None:
    command = "nacpipe extract digits --model digits_cnn --cache 'my caches/c.zarr'"
    assert finishing_command({"command": command}, "/now/here.zarr") == command
    assert read_options({"command": command}) is None


@pytest.mark.parametrize(("autocast", "precision"), [("none", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("channels_last", [None, True])
def test_what_an_earlier_cache_records_is_read(autocast: str, precision: str, channels_last: bool | None) -> None:
    recorded = {**OPTIONS.to_json(), "autocast": autocast, "channels_last": channels_last}
    del recorded["precision"]
    assert read_options({"options": recorded}) == replace(OPTIONS, precision=precision)


UNKNOWN = "nacpipe extract BENCHMARK --cache 'a b.zarr'"


@pytest.mark.parametrize(
    "information",
    [
        {},
        {"command": ""},
        {"command": 7},
        {"command": None},
        {"command": "an open ' quote"},
        {"command": "rm -rf /"},
        {"command": "nacpipe extract digits; rm -rf /"},
        {"command": "nacpipe extract $(rm -rf /)"},
        {"command": "nacpipe repair c.zarr"},
        {"options": None},
        {"options": []},
        {"options": {"benchmark": "digits"}},
        {"options": {**ALL.to_json(), "benchmark": 3}},
        {"options": {**ALL.to_json(), "train_images": True}},
        {"options": {**ALL.to_json(), "data_root": 3}},
        {"options": {**ALL.to_json(), "layers": "avgpool"}},
        {"options": {**ALL.to_json(), "poolings": [["a"]]}},
        {"options": {**ALL.to_json(), "poolings": [3]}},
        {"options": {"benchmark": "digits", "model": "digits_cnn", "autocast": 3}},
        {"options": {**ALL.to_json(), "of_a_later_nacpipe": 1}},
    ],
)
def test_what_nacpipe_did_not_write_is_not_printed(information: dict[str, Any]) -> None:
    assert read_options(information) is None
    assert finishing_command(information, "a b.zarr") == UNKNOWN
