"""Hooks of the documentation site (mkdocs.yml): pages that lie outside docs/ and pages that are generated.

cache/README.md, bench/README.md, CHANGELOG.md and CONTRIBUTING.md become pages; links to them and from them are
rewritten. api.md names every public name of the package; mkdocstrings fills it in. mkdocs-click fills commands.md in
from the commands' help, whose examples are fenced first: click keeps their lines, Markdown would join them. Options are
in its style `plain`: its tables lose the values' names, and print what click 8.3 and later have for "no default".
"""

from __future__ import annotations

import inspect
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import nacpipe
from nacpipe.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file of the repository → page of the site
    "cache/README.md": "cache-format.md",
    "bench/README.md": "speeds.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
COMMANDS = """# Commands

Results go to stdout, progress and notes to stderr. Exit codes: 0 done, 1 an error in one line, 2 wrong usage, 130
interrupted. After an interruption the same command resumes.

::: mkdocs-click
    :module: nacpipe.cli
    :command: main
    :prog_name: nacpipe
    :style: plain
    :depth: 1
"""
_AS_IT_IS = re.compile(r"^\x08\n((?:.*\S.*\n?)+)", re.MULTILINE)
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s:]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not below docs/."""
    for source, target in PAGES.items():
        if source != "README.md":
            text = (ROOT / source).read_text("utf-8")
            files.append(File.generated(config, target, content=rewrite_links(text, source)))
    files.append(File.generated(config, "api.md", content=api_page()))
    for command in _walk(main):
        command.help = fence_examples(command.help or "")  # in this process alone
    files.append(File.generated(config, "commands.md", content=COMMANDS))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links that leave docs/ to the pages of the site."""
    if page.file.src_uri in PAGES.values() and page.file.src_uri != "index.md":
        return markdown  # was rewritten when it was added
    return rewrite_links(markdown, f"docs/{page.file.src_uri}")


def rewrite_links(markdown: str, source: str) -> str:
    """Return a page with its links as seen from its place on the site; a file of the repository alone is no link there.

    Args:
        markdown: the page.
        source: its file, relative to the repository.
    """
    here = PAGES.get(source, source.removeprefix("docs/"))

    def rewrite(match: re.Match[str]) -> str:
        label, link, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        on_site = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if on_site is None:
            return label if (ROOT / target).exists() else match[0]
        return f"[{label}]({os.path.relpath(on_site, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(rewrite, markdown)


def api_page() -> str:
    """Return the page of all public names: functions first, then classes."""
    homes = nacpipe._HOMES
    names = sorted((name for name in nacpipe.__all__ if name in homes), key=lambda name: (name[0].isupper(), name))
    lines = ["# Python", "", "`import nacpipe` offers these names; everything else is private.", ""]
    return "\n".join([*lines, *(f"::: {homes[name]}.{name}\n" for name in names)])


def fence_examples(text: str) -> str:
    """Return a help text as Markdown: a paragraph behind click's mark for lines that stay as they are is code."""
    return _AS_IT_IS.sub(lambda match: f"```sh\n{match[1].rstrip()}\n```\n", inspect.cleandoc(text))


def _walk(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _walk(inner)
