"""docs/library.md, the README's lines of Python and the notebook run as they stand, and print what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ((ROOT / name).read_text("utf-8") for name in ("docs/library.md", "README.md"))
NOTEBOOK = json.loads((ROOT / "docs/examples/library.ipynb").read_text("utf-8"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = re.findall(r"```(python|text)\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.usefixtures("one_thread")


def cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def readme_program() -> str:
    (program,) = CODE.findall(README)
    return program


def check_output(printed: str, expected: str) -> None:
    """Words are the same; numbers, which differ a little between processors, are near."""
    one, other = printed.split(), expected.split()
    assert len(one) == len(other), printed
    for word, wanted in zip(one, other, strict=True):
        if re.fullmatch(r"[\d.]+%?", wanted):
            share = wanted.endswith("%")
            near = float(word.rstrip("%")) == pytest.approx(float(wanted.rstrip("%")), abs=3 if share else 0.03)
            assert near, printed
        else:
            assert word == wanted, printed


@pytest.mark.slow
def test_the_page_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed, checked = "", 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, names)
            printed += capsys.readouterr().out
        else:
            check_output(printed, block)
            printed, checked = "", checked + 1
    assert printed == ""
    assert checked == 5
    best = names["table"][names["table"].dataset == "other"].set_index("method").auroc
    assert best["NAC"] > 0.95


@pytest.mark.slow
def test_the_notebooks_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in cells():
        try:
            shown.append(eval(compile(cell, "cell", "eval"), names))
        except SyntaxError:
            exec(cell, names)
    assert len(shown) == 2
    assert all("<table" in value._repr_html_() for value in shown)


def test_the_notebook_is_of_format_4_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (wanted | {"execution_count", "outputs"} if cell["cell_type"] == "code" else wanted)
        assert cell.get("outputs", []) == []


def test_readme_page_and_notebook_have_the_same_lines() -> None:
    setup, verdict, *_ = CODE.findall(PAGE)
    assert [cell.strip() for cell in cells()[:2]] == [setup.strip(), verdict.strip()]
    assert readme_program().strip() == verdict.strip()


def test_the_readme_is_short() -> None:
    """Who reads it wants to know what this is; the rest is the site's."""
    assert len(README.splitlines()) <= 120
