"""Every command that a message prints can be pasted, whatever the cache, the study or the file is called."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner, Result

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.options import ExtractOptions
from nacpipe.cli import main
from nacpipe.errors import CacheError, FormatError, InputError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params
from nacpipe.text import command_line

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["my caches/c.zarr", "it's.zarr", "$HOME; ls/a&b.zarr"]
PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


def nacpipe(*args: str) -> Result:
    done = CliRunner().invoke(main, list(args), prog_name="nacpipe")
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


@pytest.fixture(params=NAMES)
def cache(request: pytest.FixtureRequest, small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache with a name that the shell would take apart, in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_cache.path, request.param)
    options = ExtractOptions(benchmark="digits", model="digits_cnn")
    record(request.param, {"options": options.to_json()})
    return str(request.param)


def record(cache: str, information: dict[str, object]) -> None:
    """Replace the information of a cache's header."""
    root = zarr.open_group(cache, mode="r+", use_consolidated=False)
    root.attrs["information"] = information  # type: ignore[assignment]
    root.attrs.pop("digest", None)


def words_of(text: str, begins: str) -> list[str]:
    """The command in a message that begins so, taken apart as a shell does; it ends at the message's next part."""
    (_, rest) = text.split(begins, 1)
    lexer = shlex.shlex(begins.split()[-1] + rest.split("\n")[0], posix=True, punctuation_chars="; ,")
    lexer.whitespace, lexer.whitespace_split = " ", True
    found: list[str] = []
    for word in lexer:
        if found and word in (";", ","):
            break
        found.append(word)
    return found


def damage(cache: str, place: str = "id/val/layers/layer1/gradient/c.1.0") -> None:
    content = bytearray(Path(cache, place).read_bytes())
    content[20] ^= 1
    Path(cache, place).write_bytes(bytes(content))


def test_a_search_names_what_comes_next(cache: str) -> None:
    done = nacpipe("search", cache, "--trials", "3")
    assert done.stderr.splitlines()[-1] == f"next: nacpipe evaluate {shlex.quote(cache)}"
    output = "my results/p 1.json"
    Path("my results").mkdir()
    done = nacpipe("search", cache, "--trials", "3", "--output", output)
    assert words_of(done.stderr, "next: nacpipe") == ["nacpipe", "evaluate", cache, "--params", output]
    status = nacpipe("search", cache, "--status", "--storage", f"{cache}.log")
    wanted = ["nacpipe", "search", cache, "--storage", f"{cache}.log"]
    assert words_of(status.stderr, "start it with: nacpipe") == wanted


def test_evaluate_names_the_search(cache: str) -> None:
    done = nacpipe("evaluate", cache)
    assert words_of(done.stderr, "make it with: nacpipe") == ["nacpipe", "search", cache]
    params = cache.removesuffix(".zarr") + ".params.json"
    write_params(params, PARAMS, made_by={"fingerprint": "0" * 64})
    done = nacpipe("evaluate", cache)
    assert words_of(done.stderr, "search again with: nacpipe") == ["nacpipe", "search", cache]
    assert words_of(done.stderr, "or give --params") == ["--params", params, "to", "use", "it", "all", "the", "same"]


def test_what_is_not_there_is_made_by_a_command_of_its_name(cache: str) -> None:
    shutil.rmtree(cache)
    for command in ("inspect", "search", "evaluate", "verify", "export", "rank"):
        done = nacpipe(command, cache)
        made = ["nacpipe", "extract", "BENCHMARK", "--cache", cache]
        assert words_of(done.stderr, "make one with: nacpipe") == made, command


def test_damage_is_mended_by_a_command_of_its_name(cache: str) -> None:
    mend = ["nacpipe", "repair", cache]
    damage(cache)
    assert words_of(nacpipe("verify", cache).stderr, "repair it with: nacpipe") == mend
    assert words_of(nacpipe("inspect", cache, "id/val").stderr, "repair it with: nacpipe") == mend
    chunks = Path(cache, "ood/val/layers/layer1/gradient")
    shutil.copy(chunks / "c.0.0", chunks / "c.1.0")
    done = nacpipe("inspect", cache, "ood/val")
    assert words_of(done.stderr, "or lost; nacpipe") == ["nacpipe", "verify", cache, "says", "which"]
    Path(cache, "classifier/weight/zarr.json").write_text("{")
    with pytest.raises(CacheError) as raised:
        open_cache(cache).classifier()
    assert words_of(str(raised.value), "repair it with: nacpipe") == mend
    Path(cache, "id/test/zarr.json").write_text("{")
    with pytest.raises(FormatError) as refused:
        open_cache(cache).peek("id/test")
    wanted = [*mend, "repairs", "what", "can", "be", "repaired"]
    assert words_of(str(refused.value), "; nacpipe") == wanted
    shutil.rmtree(Path(cache, "id/train/logits"))
    with pytest.raises(CacheError) as lost:
        open_cache(cache)["id/train"]
    assert words_of(str(lost.value), "repair it with: nacpipe") == mend


def test_a_writer_names_what_to_do(cache: str, small_cache: Cache) -> None:
    writer = CacheWriter(cache, small_cache.header)
    with pytest.raises(CacheError) as raised:
        writer.prepare("id/val", 41, {"list": "x"})
    assert str(raised.value).endswith("drop it first with --redo id/val")
    writer.prepare("ood/near/a b", 20, {"list": "x"})
    with pytest.raises(CacheError) as raised:
        writer.prepare("ood/near/a b", 21, {"list": "x"})
    assert str(raised.value).endswith("drop it first with --redo 'ood/near/a b'")
    Path(cache, "id/val/logits/c.1.0").unlink()
    with pytest.raises(CacheError) as raised:
        writer.seal("id/val")
    assert words_of(str(raised.value), "repair it with: nacpipe") == ["nacpipe", "repair", cache]


def test_an_unfinished_split_is_finished_by_the_caches_own_command(cache: str) -> None:
    metadata = Path(cache, "id/test/zarr.json")
    content = json.loads(metadata.read_text())
    content["attributes"].update(sealed=False, digest=None)
    metadata.write_text(json.dumps(content))
    write_params("p.json", PARAMS)
    finish = ["nacpipe", "extract", "digits", "--model", "digits_cnn", "--cache", cache]
    for args in (["evaluate", cache, "--params", "p.json"], ["verify", cache], ["inspect", cache, "id/test"]):
        assert words_of(nacpipe(*args).stderr, "finish it with: nacpipe" if args[0] != "verify" else
                        "finish with: nacpipe") == finish  # fmt: skip
    done = nacpipe("inspect", cache, "nosuch/at/all/here")
    assert words_of(done.stderr, "add it with: nacpipe") == finish


@pytest.mark.parametrize(
    "recorded", ["nacpipe extract 'my bench.toml' --model 'a b.py:f' --cache x", "rm -rf ~", "echo 'x", "", "nacpipe"]
)
def test_only_an_extraction_is_printed_as_the_command_of_a_cache(cache: str, recorded: str) -> None:
    """Anyone can write anything into a cache, and a person pastes what is printed."""
    record(cache, {"command": recorded})
    unknown = shlex.join(["nacpipe", "extract", "BENCHMARK", "--cache", cache])
    assert open_cache(cache).command() == (recorded if "extract" in recorded else unknown)


def test_a_file_that_is_no_journal_may_be_a_database(cache: str) -> None:
    where = "my studies.db"
    Path(where).write_bytes(b"SQLite format 3\0")
    done = nacpipe("search", cache, "--storage", where, "--trials", "1")
    assert "(a database is 'sqlite:///my studies.db')" in done.stderr


def test_a_layer_that_is_not_there(cache: str) -> None:
    for layer, quoted in (("a;b", "'a;b'"), ("x'y", "'x'\"'\"'y'"), ("layer9", "layer9")):
        done = nacpipe("search", cache, "--layers", layer)
        assert done.stderr.endswith(f"extract it into another cache with --layers {quoted}\n")


def test_an_interrupt_says_how_to_go_on(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nacpipe.tuning.study.Search.__init__", interrupt)
    done = nacpipe("search", cache, "--study", "my study")
    assert done.exit_code == 130
    assert words_of(done.stderr, "go on with: nacpipe") == ["nacpipe", "search", cache, "--study", "my study"]


def test_a_cache_is_no_detector(cache: str) -> None:
    done = nacpipe("score", cache, "a.png")
    assert words_of(done.stderr, "a detector of it with: nacpipe") == ["nacpipe", "export", cache]


# --- with torch -------------------------------------------------------------------------------------------------------


def test_an_extraction_and_an_export_name_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = "my caches/it's.zarr"
    splits = ["--splits", "id/train,id/val", "--train-images", "10"]
    done = nacpipe("extract", "digits", "--cache", cache, *splits)
    made = ["nacpipe", "extract", "digits", "--model", "digits_cnn", "--train-images", "10", "--cache", cache]
    assert words_of(done.stderr, "next: nacpipe") == made
    write_params("my caches/it's.params.json", PARAMS)
    done = nacpipe("export", cache)
    detector = "my caches/it's.detector.safetensors"
    assert words_of(done.stderr, "next: nacpipe") == ["nacpipe", "score", detector, "IMAGES"]
    root = zarr.open_group(cache, mode="r+", use_consolidated=False)
    root.attrs["identity"] = {**root.attrs["identity"], "architecture": "timm:a b"}  # type: ignore[dict-item]
    root.attrs.pop("digest", None)
    done = nacpipe("export", cache)
    assert nacpipe("score", detector, "x.png").stderr.endswith("say where it is with --model 'timm:a b'\n")


def test_data_and_layers_quote_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nacpipe.benchmarks.standard import find_benchmark
    from nacpipe.networks.build import blank_network
    from nacpipe.networks.layers import measure_layers
    from nacpipe.networks.models import find_model

    monkeypatch.chdir(tmp_path)
    done = nacpipe("data", "status", "cifar10", "--data-root", "my data")
    wanted = ["nacpipe", "data", "download", "cifar10", "--data-root", "my data"]
    assert words_of(done.stderr, "get what is missing: nacpipe") == wanted
    Path("my nets").mkdir()
    Path("my nets/it's.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 10))\n"
    )
    name = "my nets/it's.py:build"
    network = blank_network(find_model(name), find_benchmark("cifar10"), None)
    (note,) = measure_layers(network, (), ()).notes
    assert words_of(note, "others: nacpipe") == ["nacpipe", "layers", name]
    with pytest.raises(InputError) as raised:
        measure_layers(network, ("nosuch",), ())
    assert words_of(str(raised.value), "that this lists: nacpipe") == ["nacpipe", "layers", name]


# --- everywhere -------------------------------------------------------------------------------------------------------

# What is named and not to be pasted: an option with the value that it was given.
NAMED = {"cli/evaluate.py: text", "tuning/study.py: request.sampler"}
NAMED |= {
    "extraction/loader.py: workers // 2",
    "extraction/plan.py: request.block_rows",
    "networks/build.py: other.name",  # of the table of networks
    "tuning/study.py: fuse",
    "tuning/validation.py: method",
}


def interpolated(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Every value in a text, and the text before it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before = str(part.value)
                elif isinstance(part, ast.FormattedValue):
                    yield before, part.value
                    before = ""


def test_no_message_puts_a_name_into_a_command_as_it_is() -> None:
    found, quoted = set(), 0
    begun = re.compile(rf"(\bnacpipe ({'|'.join(main.commands)})( [^;,]*)? |--[a-z-]+[ =])$")
    for path in sorted((ROOT / "nacpipe").rglob("*.py")):
        for before, value in interpolated(ast.parse(path.read_text("utf-8"))):
            if not begun.search(before):
                continue
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "shlex.quote":
                quoted += 1
            else:
                found.add(f"{path.relative_to(ROOT / 'nacpipe').as_posix()}: {ast.unparse(value)}")
    assert found - NAMED == set()
    assert quoted > 5


@pytest.mark.parametrize("words", [("repair", "a b"), ("x", "it's"), ("search", Path("c.zarr"), "--trials", 3)])
def test_a_command_line_is_what_it_was_made_of(words: tuple[object, ...]) -> None:
    assert shlex.split(command_line(*words)) == ["nacpipe", *map(str, words)]
