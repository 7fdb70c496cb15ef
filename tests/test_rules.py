"""Rules of the code base: imports, the pure package, docstrings, paths in pages, and what stays unimported."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nacpipe
from nacpipe.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "nacpipe").rglob("*.py"))
STAGES = sorted((ROOT / "stages").glob("*.py"))

# Packages that cost time to import: none may be loaded to print a help text.
HEAVY = {
    *("zarr", "numcodecs", "obstore", "torch", "torchvision", "safetensors", "PIL", "mlxtend", "sklearn", "skimage"),
    *("pytorch_ood", "matplotlib", "gdown", "optuna", "sqlalchemy", "cmaes", "pandas", "pyarrow", "numba", "llvmlite"),
    *("jinja2", "tqdm"),
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported, anywhere but under `if TYPE_CHECKING`, with its line."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children: list[ast.stmt] = node.orelse
    else:
        children = list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
    for child in children:
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            # `from nacpipe.cache import append` may name a module
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)
        else:
            yield from imports(child)


def broken(path: Path, rule: str, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {rule}"


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 100
    assert STAGES


def test_the_import_contracts_hold() -> None:
    """Layers, circles and who knows which library: [tool.importlinter] in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_every_stage_calls_the_command_line() -> None:
    for path in STAGES:
        assert [name for name, _ in imports(parse(path)) if name.startswith("nacpipe")] == ["nacpipe.cli.main"]


# --- the pure package -------------------------------------------------------------------------------------------------

IMPURE_MODULES = {
    *("pathlib", "io", "tempfile", "shutil", "subprocess", "socket", "logging", "sys"),
    *("time", "datetime", "random", "secrets", "uuid"),
}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "breakpoint"}
OWN_RANDOM = {"RandomState", "Generator", "default_rng", "SeedSequence", "PCG64"}  # objects with a state of their own
FROM_DISK = {*("load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "fromfile", "tofile", "memmap")}


def dotted(node: ast.expr) -> str:
    """`np.random.seed` of the expression, or what can be told of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_method_opens_nothing_prints_nothing_and_has_no_clock() -> None:
    found = []
    for path in FILES:
        if path.parent.name != "method":
            continue
        tree = parse(path)
        for name, line in imports(tree):
            package = name.split(".")[0]
            if package in IMPURE_MODULES or (package == "os" and path.name != "threads.py"):
                found.append(broken(path, f"method imports {package}", line))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
                found.append(broken(path, f"method calls {node.func.id}", node.lineno))
            if not isinstance(node, ast.Attribute):
                continue
            what = dotted(node)
            if what.startswith(("np.random.", "numpy.random.")) and what.split(".")[2] not in OWN_RANDOM:
                found.append(broken(path, f"method uses {what}, a global state", node.lineno))
            if what.split(".")[0] in ("np", "numpy") and node.attr in FROM_DISK:
                found.append(broken(path, f"method uses {what}", node.lineno))
            if what.startswith("os.") and what != "os.register_at_fork":  # its threads, in threads.py
                found.append(broken(path, f"method uses {what}", node.lineno))
    assert not found


# --- no pickle --------------------------------------------------------------------------------------------------------


PICKLERS = {"cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_pickle_is_named_only_to_catch_its_errors() -> None:
    found = []
    for path in FILES:
        tree = parse(path)
        for name, line in imports(tree):
            package = name.split(".")[0]
            if package in PICKLERS or (package == "pickle" and name not in ("pickle", "pickle.UnpicklingError")):
                found.append(broken(path, f"imports {name}", line))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                what = dotted(node)
                if what.startswith("pickle.") and what != "pickle.UnpicklingError":
                    found.append(broken(path, f"uses {what}", node.lineno))
            if isinstance(node, ast.Call):
                what, given = dotted(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if what == "torch.load" and given.get("weights_only") != "True":
                    found.append(broken(path, "torch.load without weights_only=True", node.lineno))
                if given.get("allow_pickle", "False") != "False":
                    found.append(broken(path, f"{what} with allow_pickle", node.lineno))
    assert not found


# --- docstrings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_stages_say_what_they_do(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 25
    docstring = ast.get_docstring(parse(path)) or ""
    for word in ("reads ", "writes ", "never ", "resumes "):
        assert f"\n{word}" in docstring, f"{path.name} does not say what it {word.strip()}"
    assert f"python stages/{path.name} " in docstring


def undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if any(dotted(decorator) == "overload" for decorator in child.decorator_list):
                continue
            if ast.get_docstring(child) is None and child.name != "forward":  # torch's, what it does is the class
                yield f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}{child.name}.")


def test_everything_public_has_a_docstring() -> None:
    found = []
    for path in FILES:
        tree = parse(path)
        name = path.relative_to(ROOT).as_posix()
        if ast.get_docstring(tree) is None:
            found.append(name)
        found += undocumented(tree, f"{name}: ")
    assert not found


# --- paths that pages and docstrings name -----------------------------------------------------------------------------

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "cache/README.md", ROOT / "bench/README.md"]
SOURCES = [
    *FILES, *STAGES, ROOT / "Makefile", ROOT / "pyproject.toml",
    *(path for folder in ("tests", "bench", "tools", "docs") for path in (ROOT / folder).rglob("*.py")),
]  # fmt: skip
PACKAGES = "|".join(
    sorted({path.relative_to(ROOT / "nacpipe").parts[0] for path in FILES if path.parent != ROOT / "nacpipe"})
)

# A path of the repository; a file of a package by the package's name; a test below tests/.
_REPOSITORY_PATH = re.compile(r"(?<![\w./-])(?:nacpipe|tests|bench|stages|tools|docs)/[\w./-]*?\.(?:py|md)\b")
_PACKAGE_PATH = re.compile(rf"(?<![\w./-])(?:{PACKAGES})/[\w/]+\.py\b")
_TEST_PATH = re.compile(r"(?<![\w./-])(?:\w+/)*test_\w+\.py\b")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_relative_links_in_pages_lead_to_files() -> None:
    links = [(page, link) for page in PAGES for link in _LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert len(links) > 20
    missing = [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert missing == []


def test_files_that_pages_and_code_name_exist() -> None:
    missing, names = [], 0
    for path in sorted({*PAGES, *SOURCES}):
        text = path.read_text("utf-8")
        for pattern, folders in (
            (_REPOSITORY_PATH, [ROOT]),
            (_PACKAGE_PATH, [ROOT / "nacpipe", ROOT / "tests", ROOT]),
            (_TEST_PATH, [ROOT / "tests", ROOT, path.parent]),
        ):
            for name in pattern.findall(text):
                names += 1
                if not any((folder / name).exists() for folder in folders):
                    missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert names > 100
    assert missing == []


# --- what stays unimported --------------------------------------------------------------------------------------------


def python(code: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


@pytest.mark.slow
def test_search_and_tables_run_without_torch(small_cache: Cache, tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "torchvision", "PIL"):
    sys.modules[name] = None
import nacpipe
from nacpipe.tuning import explain
from nacpipe.detector import export
from nacpipe.evaluation import inspection
from nacpipe.evaluation import baselines, model_selection, tables
from nacpipe.scoring import coverage, trial_scorer
from nacpipe.tuning import study
from nacpipe.tuning import runner
for args in (["search", sys.argv[1], "--trials", "3", "--storage", "s.log", "--output", "p.json"],
             ["evaluate", sys.argv[1], "--params", "p.json"], ["inspect", sys.argv[1]], ["rank", sys.argv[1]],
             ["export", sys.argv[1], "--params", "p.json", "--output", "d.safetensors"]):
    from nacpipe.cli import main
    main(args, standalone_mode=False)
print(len(nacpipe.score_splits(nacpipe.open_cache(sys.argv[1]), nacpipe.read_params("p.json"), ["id/val"])["id/val"]))
"""
    done = python(code, small_cache.path, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, "wrote p.json"), done.stderr
    assert done.stdout.splitlines()[-1] == "40"


@pytest.mark.parametrize(
    "args", [[], ["--version"], ["--help"], *([name, "--help"] for name in ("search", "extract", "run"))]
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = """
import sys
from nacpipe.cli import main
try:
    main(sys.argv[1:], prog_name="nacpipe")
except SystemExit:
    pass
print("found:", *sorted({name.split(".")[0] for name in sys.modules} & {*%r, "numpy"}))
"""
    done = python(code % sorted(HEAVY), *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found:"


def test_every_public_name_resolves() -> None:
    assert dir(nacpipe) == sorted(nacpipe.__all__)
    for name in nacpipe.__all__:
        value = getattr(nacpipe, name)
        home = getattr(value, "__module__", None)
        assert name == "__version__" or getattr(importlib.import_module(home), name) is value  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="module 'nacpipe' has no attribute 'nosuch'"):
        nacpipe.nosuch  # noqa: B018
