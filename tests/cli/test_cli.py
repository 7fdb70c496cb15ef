"""The command line: help that shows itself at work, one line per error, results on stdout, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import zarr
from click.testing import CliRunner, Result

from nacpipe import __version__
from nacpipe.cache import Cache, CacheWriter
from nacpipe.cli import main
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import read_params, write_params
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[2]

PARAMS = {"bins": 20, "saturation": 5, "alpha": 0.5}


def params_of(*layers: str) -> NacParams:
    return NacParams(layers={name: LayerParams(**PARAMS) for name in layers})  # type: ignore[arg-type]


def change(path: Path, **attributes: Any) -> None:
    content = json.loads(path.read_text())
    content["attributes"].update(attributes)
    path.write_text(json.dumps(content))


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole_place(small_cache: Cache, make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good cache and with everything that can be wrong."""
    place = tmp_path_factory.mktemp("place")
    for name in ("c.zarr", "future.zarr", "unsealed.zarr", "zeros.zarr"):
        shutil.copytree(small_cache.path, place / name)
    change(place / "future.zarr/zarr.json", nacpipe_format=3)
    change(place / "unsealed.zarr/ood/val/zarr.json", sealed=False, digest=None)
    change(place / "unsealed.zarr/id/test/zarr.json", sealed=False, digest=None)
    (place / "folder.zarr").mkdir()
    write_params(place / "good.json", params_of("avgpool", "layer1"))
    write_params(place / "layer9.json", params_of("avgpool", "layer9"))
    (place / "broken.json").write_text('{"layers": {"avgpool": {"bins": 3, "saturation": 5, "alpha": 1}}}')
    zarr.open_group(place / "zeros.zarr", mode="r+", use_consolidated=False)["id/train/layers/layer1/gradient"][:] = 0  # type: ignore[index]
    CacheWriter(place / "zeros.zarr", small_cache.header).seal("id/train")
    strange = make_cache(place / "strange.zarr", identity={"weights": "0123456789abcdef" * 4})
    assert nacpipe("search", strange.path, "--trials", "1", "--storage", str(place / "strange.log")).exit_code == 0
    return place


@pytest.fixture
def place(whole_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; nothing in it may change."""
    monkeypatch.chdir(whole_place)
    return whole_place


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_shows_itself_at_work(name: str) -> None:
    printed = nacpipe(name, "--help")
    assert printed.exit_code == 0
    assert re.search(rf"^ +nacpipe {name} \S", printed.stdout, re.MULTILINE)
    assert nacpipe(name, "-h").stdout == printed.stdout
    for option in main.commands[name].params:
        assert not isinstance(option, click.Option) or option.help, f"{name}: --{option.name} has no help"


def test_the_group_shows_the_way() -> None:
    printed = nacpipe("--help").stdout
    for name in main.commands:
        assert re.search(rf"^  {name} ", printed, re.MULTILINE), f"{name} is not listed"
    for name in ("extract", "search", "evaluate", "run"):
        assert re.search(rf"^ +nacpipe {name} \S", printed, re.MULTILINE)
    assert nacpipe("--version").stdout == f"nacpipe, version {__version__}\n"


# --- wrong input ------------------------------------------------------------------------------------------------------

NO_CACHE = "there is no cache at nosuch.zarr; make one with: nacpipe extract BENCHMARK --cache nosuch.zarr\n"
FUTURE = (
    "future.zarr: this cache has format version 3, this nacpipe reads versions 1, 2; use the nacpipe that wrote it, or "
)
OTHER = "study nac-seed1 in strange.log was made with another cache than c.zarr: weights: stored 01234567…, now "
LAYER9 = (
    "layer 'layer9' is not in c.zarr; it holds avgpool, layer1, logits;"
    " extract it into another cache with --layers layer9\n"
)

WRONG = {
    "search nosuch.zarr": NO_CACHE,
    "evaluate nosuch.zarr": NO_CACHE,
    "inspect nosuch.zarr": NO_CACHE,
    "search folder.zarr": "there is no cache at folder.zarr; make one with: ",
    "search future.zarr": FUTURE,
    "evaluate future.zarr": FUTURE,
    "inspect future.zarr": FUTURE,
    "search unsealed.zarr": "unsealed.zarr: ood/val is not finished (3 of 3 blocks); finish it with: nacpipe extract ",
    "search unsealed.zarr --dry-run": "unsealed.zarr: ood/val is not finished (3 of 3 blocks); finish it with: ",
    "evaluate unsealed.zarr --params good.json": "unsealed.zarr: id/test is not finished (4 of 4 blocks); finish it ",
    "inspect unsealed.zarr ood/val avgpool": "unsealed.zarr: ood/val is not finished (3 of 3 blocks); finish it with: ",
    "search c.zarr --trials 0": "trials is 0; it must be at least 1\n",
    "search c.zarr --timeout 0": "timeout is 0.0; it must be above 0 seconds\n",
    "search c.zarr --timeout nan": "timeout is nan; it must be above 0 seconds\n",
    "search c.zarr --layers avgpool,layer9": LAYER9,
    "search c.zarr --storage no/s.log": "the folder of the study no/s.log is not there\n",
    "search c.zarr --storage sqlite:///no/s.db": "the study's storage sqlite:///no/s.db cannot be opened: ",
    "search c.zarr --output no/p.json": "no/p.json cannot be written: no is not a folder that can be written to\n",
    "search c.zarr --storage strange.log": OTHER,
    "search c.zarr --storage strange.log --seed 2": OTHER,
    "search c.zarr --storage strange.log --status": OTHER,
    "search c.zarr --storage strange.log --dry-run": OTHER,
    "search c.zarr --status": "there is no study nac-seed1 in c.study.log yet; start it with: nacpipe search c.zarr\n",
    "search zeros.zarr --space paper": "layer 'layer1': every product of id/train is 0; leave it out with --layers\n",
    "evaluate c.zarr": "there is no c.params.json; make it with: nacpipe search c.zarr, or give --params FILE or ",
    "evaluate c.zarr --params layer9.json": LAYER9,
    "evaluate c.zarr --params broken.json": "broken.json: layer 'avgpool': bins is 3; it must lie between 4 and ",
    "evaluate c.zarr --params nosuch.json": "there is no parameter file nosuch.json; make one with: nacpipe search ",
    "evaluate c.zarr --against Foo": "--against Foo is neither a parameter file that is there nor a method; methods: "
    "published, MSP, MaxLogit, Energy, Temperature, ",
    "score c.zarr a.png": "c.zarr: it is a cache; make a detector of it with: nacpipe export c.zarr\n",
    "evaluate c.zarr --params published": "the paper has no parameters for digits, made_up, layers avgpool, layer1 (",
    "inspect c.zarr nosuch": "split 'nosuch' is not in c.zarr; it holds id/train, id/subtrain, id/val, ",
    "inspect c.zarr id/val layer9": LAYER9,
    "inspect c.zarr id/val avgpool --alpha -1": "alpha is -1.0; it must be above 0\n",
    "inspect c.zarr id/val layer1 --params layer9.json": "layer9.json has no parameters for layer 'layer1'; it has ",
    # With torch, which is imported before names are looked up:
    "extract nosuch": "benchmark 'nosuch' is not known; known: digits, cifar10",
    "run nosuch": "benchmark 'nosuch' is not known; known: digits, cifar10",
    "extract cifar10": "cifar10 needs a network: --model NAME; known: digits_cnn, ",
    "extract digits --model nosuch": "model 'nosuch' is not known; known: digits_cnn, ",
    "extract digits --layers nosuch": "layer 'nosuch' is not known for digits_cnn; known: ",
    "extract digits --splits nosuch": "split 'nosuch' is not part of benchmark digits; it has id/train, ",
    "extract digits --batch-size 0": "batch-size is 0; it must ",
    "run digits --trials 0": "trials is 0; it must be at least 1\n",
    "extract cifar10 --model resnet20": "id/train: there is no image list data/benchmark_imglist/",
    "extract digits --cache c.zarr": "c.zarr was made from something else: architecture: stored made_up, now ",
}
USAGE = {
    "search": "Missing argument 'CACHE'",
    "search c.zarr --nosuch": "No such option '--nosuch'",
    "search c.zarr --trials many": "Invalid value for '--trials': 'many' is not a valid integer",
    "search c.zarr --seed -1": "Invalid value for '--seed': -1 is not in the range x>=0",
    "search c.zarr --threads 0": "Invalid value for '--threads': 0 is not in the range x>=1",
    "nosuch": "No such command 'nosuch'",
    "extract": "Missing argument 'BENCHMARK'",
}


@pytest.mark.repeats(5)
@pytest.mark.parametrize("line", [*WRONG, *USAGE])
def test_wrong_input_is_one_line_and_changes_nothing(place: Path, line: str) -> None:
    code, message = (1, WRONG[line]) if line in WRONG else (2, USAGE[line])
    before = listing(place)
    printed = nacpipe(*line.split())
    assert isinstance(printed.exception, SystemExit), printed.exception  # nothing else got this far: no traceback
    assert printed.exit_code == code
    assert printed.stdout == ""
    assert printed.stderr.startswith(f"nacpipe: {message}")
    assert printed.stderr.count("\n") == 1
    assert printed.stderr.endswith("\n")
    if code == 2:
        assert f" See: nacpipe{'' if line == 'nosuch' else ' ' + line.split()[0]} --help" in printed.stderr
    assert listing(place) == before


def test_names_of_others_cannot_write_on_the_terminal(place: Path, tmp_path: Path) -> None:
    write_params(tmp_path / "p.json", params_of("a\r\x1b[2J\nb"))
    printed = nacpipe("evaluate", "c.zarr", "--params", str(tmp_path / "p.json"))
    assert printed.exit_code == 1
    assert printed.stderr.count("\n") == 1
    assert not set(printed.stderr) & {"\r", "\x1b"}


def test_debug_shows_where_it_happened(place: Path) -> None:
    printed = nacpipe("--debug", "search", "nosuch.zarr")
    assert type(printed.exception).__name__ == "CacheError"


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(small_cache: Cache, tmp_path: Path) -> str:
    """A cache that a search may leave something beside."""
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    return str(tmp_path / "c.zarr")


def test_a_search_from_beginning_to_end(cache: str, tmp_path: Path) -> None:
    printed = nacpipe("search", cache, "--space", "paper", "--trials", "30")
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0].split() == ["term", "bins", "saturation", "alpha", "weight", "alone,", "AUROC", "%"]
    assert [line.split()[0] for line in lines[1:3]] == ["avgpool", "layer1"]
    assert lines[4].startswith("id/val against ood/val: AUROC ")
    assert re.fullmatch(
        r"overfitting check: no sign of overfitting; NAC prefers training images .* than MSP does \(AUROC of id/val"
        r" against id/subtrain \d\d\.\d\d %, MSP's \d\d\.\d\d %; lower: training images score higher\)",
        lines[5],
    )
    assert re.fullmatch(rf"30 trials in \d+\.\d s, seed 1, {tmp_path}/c\.study\.log", lines[6])
    target = tmp_path / "c.params.json"
    wrote, advice, following = printed.stderr.splitlines()
    assert (wrote, following) == (f"wrote {target}", f"next: nacpipe evaluate {cache}")
    assert advice.startswith("try: MSP in NAC's place: its AUROC is 97.70 %, NAC's ")
    assert json.loads(target.read_text())["result"]["trials"] == 30
    assert nacpipe("evaluate", cache).exit_code == 0
    again = nacpipe("search", cache, "--space", "paper", "--trials", "20")
    assert again.stderr.startswith("the study has 30 completed trials already; more with --trials N\n")
    assert again.stdout == printed.stdout
    assert nacpipe("search", cache, "--space", "paper", "--status").stdout == printed.stdout


def test_json_is_all_of_stdout(cache: str, tmp_path: Path) -> None:
    plan = json.loads(nacpipe("search", cache, "--space", "paper", "--dry-run", "--json").stdout)
    assert (plan["done"], plan["trials"]) == (0, 2000)
    assert set(plan["space"]) == {"avgpool", "layer1"}
    output = str(tmp_path / "out.json")
    printed = nacpipe("search", cache, "--space", "paper", "--trials", "3", "--json", "--output", output)
    found = json.loads(printed.stdout)
    assert found == json.loads(Path(output).read_text())
    assert NacParams.from_json(found) == read_params(output)
    assert printed.stderr.splitlines()[-1] == f"next: nacpipe evaluate {cache} --params {output}"
    status = json.loads(nacpipe("search", cache, "--space", "paper", "--status", "--json").stdout)
    assert status == {**found, "result": {**found["result"], "ended": "stopped"}}
    assert json.loads(nacpipe("evaluate", cache, "--params", output, "--json").stdout)[0]["method"] == "NAC"
    summary = json.loads(nacpipe("inspect", cache, "--json").stdout)
    assert [split["split"] for split in summary["splits"]][:3] == ["id/train", "id/subtrain", "id/val"]
    layer = json.loads(nacpipe("inspect", cache, "id/val", "layer1", "--params", output, "--json").stdout)
    assert [row["value"] for row in layer["values"]] == ["activation", "gradient", "product", "state"]
    assert sum(row["count"] for row in layer["bins"]) == pytest.approx(60)


@pytest.mark.slow
def test_the_default_search_takes_every_term_and_is_cross_validated(cache: str, tmp_path: Path) -> None:
    printed = nacpipe("search", cache)
    assert printed.exit_code == 0, printed.output
    lines = printed.stdout.splitlines()
    names = {
        f"{layer}{source}" for layer in ("avgpool", "layer1", "logits") for source in ("", ":activation", ":gradient")
    }
    assert {line.split()[0] for line in lines[1:19]} == names | {f"{name}:components" for name in names}
    assert lines[19].split()[0] == "NCI"  # the feature score that cross-validation adds to the sum
    assert lines[21].startswith("id/val against ood/val: AUROC ")
    assert re.fullmatch(
        r"cross-validated: AUROC \d+\.\d\d % over images \(\w+ \d+\.\d\d %\), \d+\.\d\d % over the classes that ood/val"
        r" is predicted as",
        lines[22],
    )
    assert lines[23].startswith("NCI is no coverage but a score of the last layer's input, ")
    assert lines[25].startswith("1081 trials in ")  # 18 terms, 60 trials each, and all together
    stored = json.loads((tmp_path / "c.params.json").read_text())
    crossed = stored["result"]["cross_validated"]
    assert set(crossed) == {"images", "clusters", "guide"}
    assert stored["fused"]["method"] == "NCI"
    assert 0.5 < crossed["images"] <= 1
    assert stored["result"]["guide"] in ("MSP", "MaxLogit", "Energy", "Entropy", "GEN")
    members = [*stored["layers"].values(), stored["fused"]]
    assert sum(member["weight"] for member in members) == pytest.approx(1)
    assert nacpipe("search", cache, "--status").stdout == printed.stdout
    assert nacpipe("search", cache, "--explain").exit_code == 0
    assert nacpipe("evaluate", cache).exit_code == 0


@pytest.mark.repeats(1)
@pytest.mark.parametrize("storage", ["{}/s.log", "sqlite:///{}/s.db"])
@pytest.mark.parametrize("option", ["--status", "--dry-run"])
def test_looking_writes_nothing(cache: str, tmp_path: Path, option: str, storage: str) -> None:
    args = ["search", cache, "--storage", storage.format(tmp_path)]
    for exit_code in (1 if option == "--status" else 0, 0):
        before = listing(tmp_path)
        assert nacpipe(*args, option).exit_code == exit_code
        assert listing(tmp_path) == before
        nacpipe(*args, "--trials", "2")


def test_inspecting_writes_nothing(place: Path) -> None:
    before = listing(place)
    printed = nacpipe("inspect", "c.zarr")
    assert re.search(r"^id/train +60 +60 +yes ", printed.stdout, re.MULTILINE)
    assert re.search(r"^avgpool +avgpool +sum-nchw +6$", printed.stdout, re.MULTILINE)
    assert nacpipe("inspect", "unsealed.zarr").stdout.count(" no ") == 2
    states = nacpipe("inspect", "c.zarr", "id/val", "avgpool", "--alpha", "2")
    assert re.search(r"^state +", states.stdout, re.MULTILINE)
    assert states.stderr == "coverage with 50 bins and saturation 50; others with --params FILE\n"
    assert nacpipe("evaluate", "c.zarr", "--params", "good.json").exit_code == 0
    assert listing(place) == before


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.repeats(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_says_how_to_go_on(cache: str, tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "c.study.log"
    child = subprocess.Popen(
        [*python_words(), "-m", "nacpipe", "search", cache, "--trials", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while child.poll() is None and (not journal.exists() or journal.read_bytes().count(b"datetime_complete") < 13):
        time.sleep(0.005)
    child.send_signal(number)
    stdout, stderr = child.communicate()
    assert child.returncode == 130
    assert "Traceback" not in stderr
    go_on = f"nacpipe search {cache} --trials 1000000"
    assert stderr.splitlines()[-1] == f"nacpipe: interrupted; what was written is safe, go on with: {go_on}"
    assert stdout.startswith("term ")
    result = json.loads((tmp_path / "c.params.json").read_text())["result"]
    assert result["ended"] == "interrupted"
    assert result["trials"] >= 13
    printed = nacpipe("search", cache, "--trials", str(result["trials"] + 2))
    assert f"\n{result['trials'] + 2} trials in " in printed.stdout
