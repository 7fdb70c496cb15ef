"""The documentation site builds without a dead link, and its search finds what people look for."""

from __future__ import annotations

import html
import json
import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

import nacpipe
from nacpipe import cli
from tests.conftest import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs; install it with: pip install 'nacpipe[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "page"),
    [("resume", "how-it-works.html"), ("threshold", "detector.html"), ("gradient", "how-it-works.html")],
)
def test_search_finds(site: Path, word: str, page: str) -> None:
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"] if word in entry["text"].lower()}
    assert page in found


@pytest.mark.slow
def test_every_command_and_every_public_name_has_its_place(site: Path) -> None:
    commands, api = ((site / page).read_text("utf-8") for page in ("commands.html", "api.html"))
    text = html.unescape(re.sub(r"<[^>]+>", "", commands))
    for name, command in cli.main.commands.items():
        assert f'id="nacpipe-{name}"' in commands, name
        examples = re.findall(rf"^ *(nacpipe {name} .*)$", command.help or "", re.MULTILINE)
        assert [line for line in examples if line not in text.splitlines()] == [], name
    assert "UNSET" not in text
    for name in set(nacpipe.__all__) - {"__version__"}:
        assert f'id="{nacpipe._HOMES[name]}.{name}"' in api, name


def test_links_are_rewritten_for_the_site() -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs; install it with: pip install 'nacpipe[docs]'")
    pages = load_script("tools", "site_pages")
    links = "[a](../cache/README.md#marks) [b](search.md) [c](https://x.org/README.md) [d](#here)"
    expected = "[a](cache-format.md#marks) [b](search.md) [c](https://x.org/README.md) [d](#here)"
    assert pages.rewrite_links(links, "docs/trust.md") == expected
    assert pages.rewrite_links("[a](../../bench/README.md)", "docs/decisions/benchmarks.md") == "[a](../speeds.md)"
    assert pages.rewrite_links("[`a`](../bench/trial.py) [b](../no)", "docs/trust.md") == "`a` [b](../no)"
    assert pages.rewrite_links("[a](docs/search.md)", "CHANGELOG.md") == "[a](search.md)"


def test_examples_are_fenced() -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs; install it with: pip install 'nacpipe[docs]'")
    pages = load_script("tools", "site_pages")
    text = "Do it.\n\n    More.\n\n    \b\n    nacpipe a --b\n    nacpipe c\n\n    The end.\n    "
    expected = "Do it.\n\nMore.\n\n```sh\nnacpipe a --b\nnacpipe c\n```\n\nThe end."
    assert pages.fence_examples(text) == expected
    assert pages.fence_examples(expected) == expected


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(site: Path) -> None:
    """Anchors too, and those of generated pages, which mkdocs does not check."""
    pages = {page.relative_to(site).as_posix(): Page(page.read_text("utf-8")) for page in site.rglob("*.html")}
    del pages["404.html"]  # its links begin with /
    links = [(name, link) for name, page in pages.items() for link in page.links if not re.match("[a-z]+:", link)]
    assert len(links) > 1000
    dead = []
    for name, link in links:
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        target = "index.html" if target == "." else target
        there = anchor in pages[target].anchors or not anchor if target in pages else (site / target).is_file()
        dead += [] if there else [(name, link)]
    assert dead == []


class Page(HTMLParser):
    """A page's anchors, and what it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.anchors, self.links = set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.anchors.update(str(value) for name, value in attrs if name == "id")
        self.links += [str(value) for name, value in attrs if name in ("href", "src") and value]


def test_the_citation_names_the_version() -> None:
    cited = import_module("yaml").safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} < cited.keys()
    assert str(cited["version"]) == re.sub(r"(a|b|rc|\.dev)\d+$", "", nacpipe.__version__)


def test_the_page_on_citing_agrees_with_the_citation_file() -> None:
    """Titles and the authors' family names, in their order."""
    cited = import_module("yaml").safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    page = (ROOT / "docs/citing.md").read_text("utf-8")
    entries = re.findall(r"^@\w+\{(\w+),$(.*?)^\}$", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in entries] == ["liu2024nac", "zhang2024openood", "nacpipe"]
    fields = {name: dict(re.findall(r"(\w+)\s*= \{(.*?)\}(?:,|$)", text, re.DOTALL)) for name, text in entries}
    [paper] = cited["references"]
    assert fields["liu2024nac"]["title"] == paper["title"]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    assert fields["liu2024nac"]["author"] == authors
    assert fields["liu2024nac"]["year"] == str(paper["year"])
    assert paper["identifiers"][0]["value"] == fields["liu2024nac"]["note"]
    assert fields["nacpipe"]["title"] == cited["title"]
    assert "{The nacpipe authors" in fields["nacpipe"]["author"]
