"""What a network and an extraction are known by: the source of a network from a file, and the arithmetic."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import Cache, CacheWriter, Header, open_cache
from nacpipe.cache.identity import OPTIONAL_FIELDS
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import read_detector, write_detector
from nacpipe.detector.predict import prepare
from nacpipe.errors import IdentityError
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.build import blank_network, load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.source import hash_source
from tests.prefork import python_words

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

FILES = {
    "net.py": """
import importlib
import json  # not from the folder, though it holds a json.py
from pathlib import Path

import torch
from torch import nn

import parts_of_net.blocks as blocks
from parts_of_net import head
from helper_of_net import SIDE

plain = importlib.import_module("plugin_of_net")


def build():
    import late_in_net

    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), blocks.Act(), head.make(8, 10))
""",
    "helper_of_net.py": "SIDE = 32",
    "late_in_net.py": "",
    "plugin_of_net.py": "import deep_in_plugin",
    "deep_in_plugin.py": "",
    "parts_of_net/__init__.py": "",
    "parts_of_net/blocks.py": "from torch.nn import Tanh as Act\nfrom . import tools",
    "parts_of_net/tools.py": "",
    "parts_of_net/head.py": "from torch import nn\nfrom .tools import *\n\ndef make(a, b):\n    return nn.Linear(a, b)",
    "json.py": "raise SystemExit",
    "other.py": "never = imported",
    "parts_of_net/unused.py": "",
    "site-packages/installed_in_net.py": "",
}
UNUSED = ["json.py", "other.py", "parts_of_net/unused.py", "site-packages/installed_in_net.py"]
USED = [name for name in FILES if name not in UNUSED]
MODULES = ("helper_of_net", "late_in_net", "plugin_of_net", "deep_in_plugin", "parts_of_net", "nacpipe_network_net")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Modules of a test's files are imported anew in the next."""

    def clear() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
            del sys.modules[name]

    clear()
    yield
    clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "nets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nets" / name).write_text(text)
    return tmp_path / "nets/net.py"


def source_of(file: Path) -> str:
    """As a process of its own has it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    return load_network(find_model(f"{file}:build"), find_benchmark("cifar10"), None, CPU).source


def test_a_table_network_has_no_source(checkpoint: Path) -> None:
    assert load_network(find_model("resnet20"), find_benchmark("cifar10"), checkpoint, CPU).source == ""


def test_the_source_is_that_of_the_file_and_of_what_it_imports_from_its_folder(file: Path) -> None:
    before = source_of(file)
    assert len(before) == 64
    for name in USED:
        text = FILES[name]
        (file.parent / name).write_text(f"{text}\n# changed")
        assert source_of(file) != before, name
        (file.parent / name).write_text(text)
        assert source_of(file) == before, name
    for name in UNUSED:
        (file.parent / name).write_text("# changed")
    assert source_of(file) == before


@pytest.mark.slow
def test_the_source_is_the_same_wherever_and_however_often_it_is_built(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, benchmark = find_model(f"{file}:build"), find_benchmark("cifar10")
    first = source_of(file)
    assert load_network(model, benchmark, None, CPU).source == first  # modules are there already
    assert blank_network(model, benchmark, None).source == first
    moved = file.parent.rename(tmp_path / "elsewhere") / "net.py"
    assert source_of(moved) == first
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert source_of(Path("net.py")) == first
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert source_of(Path("../elsewhere/net.py")) == first
    code = (
        "import sys; from pathlib import Path; import torch; from nacpipe.benchmarks.standard import find_benchmark;"
        "from nacpipe.networks.build import load_network; from nacpipe.networks.models import find_model;"
        "sys.path.insert(0, sys.argv[2]); import other_of_caller;"
        "print(load_network(find_model(sys.argv[1]), find_benchmark('cifar10'), None, torch.device('cpu')).source)"
    )
    (moved.parent / "other_of_caller.py").write_text("")  # the caller's module, which the file does not import
    command = [*python_words(), "-c", code, f"{moved}:build", str(moved.parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert done.stdout.strip() == first


def test_nacpipe_beside_a_file_is_not_its_source(tmp_path: Path) -> None:
    """Who keeps a network in a checkout is not asked for a new cache with every pull."""
    (tmp_path / "nacpipe").symlink_to(ROOT / "nacpipe")
    (tmp_path / "net.py").write_text("import nacpipe.cache\nfrom nacpipe import errors\n")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "net.py").write_text((tmp_path / "net.py").read_text())
    assert hash_source(tmp_path / "net.py") == hash_source(alone / "net.py")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_another_source_is_refused(request_: ExtractRequest, file: Path) -> None:
    request = replace(request_, model=f"{file}:build", checkpoint=None, layers=("1",), splits=("ood/val",))
    extract(plan_extraction(request))
    assert open_cache(request.cache).header.identity["source"] == source_of(file)
    assert plan_extraction(request).splits[0].state == "done"
    (file.parent / "helper_of_net.py").write_text("SIDE = 30 + 2")
    source_of(file)
    message = (
        r"c\.zarr was made from something else: source: stored \w{8}…, now \w{8}…\. Give another --cache, or the"
        r" network's file, and what it imports from its folder, as they were$"
    )
    for dry in (False, True):
        with pytest.raises(IdentityError, match=message):
            plan_extraction(request, dry=dry)


def test_a_detector_on_another_source_is_told(request_: ExtractRequest, file: Path, tmp_path: Path) -> None:
    """It runs: someone may have tidied the file up."""
    request = replace(request_, model=f"{file}:build", checkpoint=None, layers=("1",), splits=("id/train", "id/val"))
    extract(plan_extraction(request))
    params = NacParams(layers={"1": LayerParams(bins=20, saturation=5, alpha=1.0)})
    write_detector(tmp_path / "d.safetensors", export_detector(open_cache(request.cache), params))
    named = str(tmp_path / "d.safetensors")
    assert prepare(read_detector(named), named, f"{file}:build", None, "cpu").notes == ()
    (file.parent / "helper_of_net.py").write_text("SIDE = 30 + 2")
    source_of(file)
    (told,) = prepare(read_detector(named), named, f"{file}:build", None, "cpu").notes
    assert re.fullmatch(
        rf"{tmp_path}/d\.safetensors was made with another source of net\.py:build \(\w{{8}}…, now \w{{8}}…\): its"
        r" scores are right only where the network computes the same",
        told,
    )


def as_made_elsewhere(cache: Cache, path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Header:
    """An empty cache of the same header but for its identity."""
    header = replace(cache.header, identity=change(dict(cache.header.identity)))
    CacheWriter(path, header)
    return header


@pytest.mark.parametrize(
    ("stored", "more", "message"),
    [
        (
            {"arithmetic": {"device": "cuda", "tf32": False, "memory_format": "channels_last"}},
            {},
            r"arithmetic\.device: stored cuda, now cpu; arithmetic\.memory_format: stored channels_last, now"
            r" contiguous\. Give another --cache, or --device cuda$",
        ),
        (
            {"arithmetic": {"device": "cpu", "tf32": False, "memory_format": "by hand"}},
            {"mantissa_bits": 23},
            r"arithmetic\.memory_format: stored by hand, now contiguous\. Give another --cache, or the same options$",
        ),
        (
            {"dtype": "bf16"},
            {"mantissa_bits": 9},
            r"dtype: stored bf16, now float32; keep_bits: stored 23, now 9\. Give another --cache, or --precision bf16,"
            r" the same options$",
        ),
        (
            {"arithmetic": {"device": "cuda", "tf32": True, "memory_format": "channels_last"}, "dtype": "float32"},
            {"precision": "fp16"},
            r"arithmetic\.device: stored cuda, now cpu; arithmetic\.memory_format: stored channels_last, now"
            r" contiguous; arithmetic\.tf32: stored true, now false; dtype: stored float32, now fp16\. Give another"
            r" --cache, or --device cuda, --precision tf32$",
        ),
    ],
)
def test_another_arithmetic_is_refused(
    finished: Cache, request_: ExtractRequest, stored: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    as_made_elsewhere(finished, request_.cache, lambda identity: {**identity, **stored})
    request = replace(request_, **more)
    with pytest.raises(IdentityError, match=rf"c\.zarr was made from something else: {message}"):
        plan_extraction(request)
    if not more:  # a look needs no device
        assert plan_extraction(request, dry=True).exists
        assert plan_extraction(replace(request, device="cuda:99"), dry=True).exists


def test_what_a_cache_is_made_with(finished: Cache, request_: ExtractRequest) -> None:
    assert finished.header.identity["arithmetic"] == {"device": "cpu", "tf32": False, "memory_format": "contiguous"}
    assert "source" not in finished.header.identity
    plan = plan_extraction(replace(request_, precision="bf16"))
    assert plan.header.identity["arithmetic"] == finished.header.identity["arithmetic"]
    assert plan.header.identity["dtype"] == "bf16"


def test_a_cache_goes_on_with_the_memory_format_it_was_begun_with(finished: Cache, request_: ExtractRequest) -> None:
    """An earlier nacpipe let the caller choose it."""
    arithmetic = {"device": "cpu", "tf32": False, "memory_format": "channels_last"}
    as_made_elsewhere(finished, request_.cache, lambda identity: {**identity, "arithmetic": arithmetic})
    plan = plan_extraction(replace(request_, splits=("ood/val",)))
    kernel = plan.network.module.get_submodule("conv1").weight
    seen = []
    plan.network.module.register_forward_pre_hook(
        lambda *_: seen.append(kernel.is_contiguous(memory_format=torch.channels_last))
    )
    extract(plan)
    assert set(seen) == {True}
    assert kernel.is_contiguous()
    cache = open_cache(request_.cache)
    assert cache.header.identity["arithmetic"] == arithmetic
    np.testing.assert_allclose(
        cache["ood/val"].read("logits"), finished["ood/val"].read("logits"), rtol=1e-4, atol=1e-5
    )


def test_what_an_older_cache_does_not_say_is_not_compared(finished: Cache, request_: ExtractRequest) -> None:
    header = as_made_elsewhere(
        finished, request_.cache, lambda identity: {k: v for k, v in identity.items() if k not in OPTIONAL_FIELDS}
    )
    extract(plan_extraction(replace(request_, splits=("ood/val",))))
    assert open_cache(request_.cache).header.identity == header.identity  # nor added
    assert open_cache(request_.cache)["ood/val"].rows == 21
