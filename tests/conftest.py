"""What several rooms' tests share: the reference data's place, a small cache of random numbers, one torch thread."""

from __future__ import annotations

import os

# Before numpy and torch are imported, here and in the processes that tests start: xdist's workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # extract sets it too late where a test trained a network before

import asyncio
import gc
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zarr.core.sync
from hypothesis import settings
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.cache.layout import FORMAT_VERSION
from nacpipe.files import is_url
from tests import prefork

TO_THREAD = asyncio.to_thread

pytest_plugins = ["tests.cifar_root", "tests.s3"]  # a data root, weights, a finished extraction; an S3 endpoint

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=12)  # make test
settings.load_profile("ci" if os.environ.get("CI") else "here")

MARKERS = {"shared": "reference", "s3_endpoint": "server", "postgres": "server"}  # fixture → of every test that uses it


IN_MEMORY, ROOM = Path("/dev/shm"), 8 << 30  # a whole run leaves some gigabytes


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Put the tests' folders into memory where there is room: they make, read and remove half a million small files."""
    if config.option.basetemp or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > ROOM:
        config.option.basetemp = folder = IN_MEMORY / f"nacpipe-tests-{os.getpid()}"
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they use, so that none is forgotten, and the repeats that `make test` omits."""
    repeats: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("repeats") and not item.get_closest_marker("slow"):
            repeats.setdefault((item.path, item.name.split("[")[0]), []).append(item)
        for fixture in MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKERS[fixture])
    for same in repeats.values():
        (kept,) = same[0].get_closest_marker("repeats").args  # type: ignore[union-attr]
        spread = {round(place) for place in np.linspace(0, len(same) - 1, min(kept, len(same)))}
        for place, item in enumerate(same):
            if place not in spread:
                item.add_marker("slow")


def pytest_collection() -> None:
    """Import without garbage collection: what is imported stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection: it stays until the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Files are not forced to the disk: no test cuts the power, and those of the order of the calls note `os.fsync`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses a closed file as well
        yield


async def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)


class InlineLoops:
    """What `zarr.core.sync` takes for asyncio: a coroutine runs in the thread that asks for it, on a loop of its own.

    Handing each over to Zarr's thread and back costs many times what a small chunk or a `zarr.json` does.
    """

    def __init__(self) -> None:
        self._free: list[asyncio.AbstractEventLoop] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def run_coroutine_threadsafe(
        self, coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop
    ) -> Future[Any]:
        if asyncio._get_running_loop() is not None:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            own = self._free.pop()
        except IndexError:
            own = asyncio.new_event_loop()
        done: Future[Any] = Future()
        try:
            done.set_result(own.run_until_complete(coroutine))
        finally:
            self._free.append(own)
        return done

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


@pytest.fixture(scope="session", autouse=True)
def no_zarr_threads() -> Iterator[None]:
    """Zarr reads files and decodes chunks in the thread that asks: a hand-over costs more than a small chunk."""
    loops = InlineLoops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", _call)
        patch.setattr(zarr.core.sync, "asyncio", loops)
        yield
    loops.close()


@pytest.fixture
def zarr_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr's event loop and its threads work as they do outside the tests: for tests of what happens at one time."""
    monkeypatch.setattr(asyncio, "to_thread", TO_THREAD)
    monkeypatch.setattr(zarr.core.sync, "asyncio", asyncio)


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def forked_commands(common: Path) -> None:
    """Where `python_words` meets the process that forks; a run of many tests starts it before it is needed."""
    prefork.folder = common
    if "PYTEST_XDIST_WORKER" in os.environ:
        prefork.start_server()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints, images and reference outputs beside the checkout, or $NACPIPE_SHARED."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("NACPIPE_SHARED", beside))
    if not path.is_dir():
        pytest.skip(f"the reference data are not at {path}; set NACPIPE_SHARED to their folder")
    return path


@pytest.fixture
def load_bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The function that loads a script of bench/ by path: bench/ is not a package."""

    def load(name: str) -> ModuleType:
        module = load_script("bench", name)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
        return module

    return load


@pytest.fixture(scope="session")
def digits_train() -> ModuleType:
    """The script that trains the packaged network."""
    return load_script("tools", "train_digits")


def load_script(folder: str, name: str) -> ModuleType:
    """Load a script of a folder that is not a package."""
    path = Path(__file__).resolve().parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads spin for each other, many times longer than this little work takes."""
    import torch  # here alone: the search side's tests must not need it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def numba_threads() -> Iterator[None]:
    """Numba's OpenMP threads, once they are asked for, are torch's number of threads too: it is set back."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# --- a small cache ----------------------------------------------------------------------------------------------------

CLASSES, BLOCK_ROWS = 3, 16
LAYERS = (
    LayerSpec(name="avgpool", path="avgpool", pooling="sum-nchw", neurons=6),
    LayerSpec(name="layer1", path="layer1", pooling="sum-nchw", neurons=4),
)
ROWS = {  # neither a whole number of blocks nor all the same
    "id/train": 60,
    "id/subtrain": 33,
    "id/val": 40,
    "id/test": 50,
    "ood/val": 37,
    "ood/near/letters": 35,
    "ood/far/textures": 20,
}


@pytest.fixture(scope="session")
def make_cache(common: Path) -> Callable[..., Cache]:
    """The function `build_cache`, but what was built once is copied."""
    from tests.once import once  # here: bench/corrupt.py loads this file from elsewhere

    def make(
        path: str | Path,
        *,
        rows: Mapping[str, int] | None = None,
        seed: int = 0,
        identity: Mapping[str, object] | None = None,
        version: int = FORMAT_VERSION,
    ) -> Cache:
        if is_url(path):
            return build_cache(path, rows=rows, seed=seed, identity=identity, version=version)
        counts = {**ROWS, **(rows or {})}
        name = _sha256(json.dumps([list(counts.items()), seed, version]))[:16]
        built = once(
            common / f"built/{name}.zarr", lambda whole: build_cache(whole, rows=rows, seed=seed, version=version)
        )
        CacheWriter(path, build_header(path, identity, version))  # all that the path and the identity are part of
        shutil.copytree(
            built,
            path,
            ignore=lambda folder, _: ["zarr.json"] if Path(folder) == built else [],
            copy_function=shutil.copyfile,  # with the umask of now, as if it were written
            dirs_exist_ok=True,
        )
        CacheWriter(path, build_header(path, identity, version))  # renews the consolidated metadata
        return open_cache(path)

    return make


def build_header(
    path: str | Path, identity: Mapping[str, object] | None = None, version: int = FORMAT_VERSION
) -> Header:
    """The root's attributes of `build_cache`'s caches."""
    return Header(
        identity={
            "benchmark": "digits",
            "architecture": "made_up",
            "family": "made_up",
            "weights": _sha256("made up"),
            "transform": {"resize": 28, "crop": 28, "mean": [0.5], "std": [0.5]},
            "dtype": "float32",
            **(identity or {}),
        },
        information={"nacpipe": "0.0.0", "command": f"nacpipe extract digits --cache {path}"},
        block_rows=BLOCK_ROWS,
        layers=LAYERS,
        classes=CLASSES,
        features=6,
        version=version,
    )


@pytest.fixture(scope="session")
def write_cache() -> Callable[..., Cache]:
    """The function `build_cache` itself, for a test that changes what is written."""
    return build_cache


def build_cache(
    path: str | Path,
    *,
    rows: Mapping[str, int] | None = None,
    seed: int = 0,
    identity: Mapping[str, object] | None = None,
    version: int = FORMAT_VERSION,
) -> Cache:
    """Write a finished cache of a made-up network of 3 classes and open it; the same arguments, the same values.

    The network ends as a ResNet does: `layer1` (4 neurons) → … → `avgpool` (6 neurons after a ReLU, about a third of
    them 0) = `features` → a linear classifier. Two neurons of `avgpool` stand for each class. ID samples gather around
    their class, one in twenty under another's label; OOD samples belong to none and spread wider, far ones more than
    near ones. With bins 20, saturation 5, alpha 0.5, each layer alone tells every OOD set from ID with an AUROC between
    0.7 and 0.95. `avgpool`'s gradient is the true one, (softmax − ⅓) · weight; `layer1`'s is random.

    Args:
        path: where to; nothing must be there.
        rows: split → samples, beside or instead of `ROWS`; 0 leaves a split out.
        seed: of every random number; the classifier does not depend on it.
        identity: values beside or instead of the root's identity.
        version: of the format.
    """
    centres = np.repeat(2.0 * np.eye(CLASSES), 2, axis=1)
    weight, bias = (centres - 0.5).astype(np.float32), np.array([0.1, 0.0, -0.1], np.float32)
    header = build_header(path, identity, version)
    writer = CacheWriter(path, header)
    writer.write_classifier(weight, bias)
    for number, (name, count) in enumerate({**ROWS, **(rows or {})}.items()):
        if count == 0:
            continue
        rng = np.random.RandomState([seed, number])
        arrays = _draw_split(rng, name, count, centres, weight, bias, header)
        images = {"list": f"{name.replace('/', '_')}.txt", "sha256": _sha256(name)}
        known = {key: arrays[key].astype(np.int64) for key in ("label", "index")}
        writer.prepare(name, count, images, **known)
        for block, start in enumerate(range(0, count, BLOCK_ROWS)):
            writer.write_block(name, block, {key: a[start : start + BLOCK_ROWS] for key, a in arrays.items()})
        writer.seal(name)
    return open_cache(path)


def _draw_split(
    rng: np.random.RandomState,
    name: str,
    rows: int,
    centres: NDArray[np.float64],  # (classes, 6)
    weight: NDArray[np.float32],  # (classes, 6)
    bias: NDArray[np.float32],  # (classes,)
    header: Header,
) -> dict[str, NDArray[np.generic]]:
    label = np.arange(rows) % CLASSES
    middle, spread, wider = centres[label], 0.5, 1.0
    label[7::20] = (label[7::20] + 1) % CLASSES  # every twentieth sample is misclassified
    if name.startswith("ood/"):
        wider = 3.0 if name.startswith("ood/far/") else 1.8
        middle, spread, label = np.full((rows, 6), 0.5), 0.5 * wider, np.full(rows, -1)
    features = np.maximum(middle + spread * rng.randn(rows, 6), 0).astype(np.float32)
    logits = features @ weight.T + bias
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    arrays = {
        header.layer_array("avgpool", "activation"): features,
        header.layer_array("avgpool", "gradient"): (softmax - 1 / CLASSES) @ weight,
        header.layer_array("layer1", "activation"): wider * np.maximum(rng.randn(rows, 4) + 0.5, 0),
        header.layer_array("layer1", "gradient"): 0.1 * wider * rng.randn(rows, 4),
        "features": features,
        "logits": logits,
    }
    floats: dict[str, NDArray[np.generic]] = {key: array.astype(np.float32) for key, array in arrays.items()}
    return {**floats, "label": label.astype(np.int64), "index": np.arange(rows)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="session")
def small_cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One finished cache for all tests that only read it: what a test writes belongs under its own `tmp_path`."""
    return make_cache(tmp_path_factory.mktemp("small") / "small.zarr")
