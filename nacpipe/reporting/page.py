"""One HTML page without other files: escaped text, tables, and figures as data URLs.

Functions take plain text and return HTML; an argument that is HTML already is named so.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from nacpipe.text import escape_bytes

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5c6670; --line: #d8dde3; --tint: #f4f6f8; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 3rem; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--ink);
  overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.verdict { border-left: 4px solid var(--blue); background: var(--tint); padding: .5rem .9rem; margin: .8rem 0;
  max-width: none; }
.wide { overflow-x: auto; margin: .4rem 0 .8rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
table.text :is(th, td), table.left :is(th, td) { text-align: left; }
table.text td { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
td b { color: var(--blue); }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.pair .wide { max-width: 100%; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: .8rem 1.2rem; }
figure { margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 430px; height: auto; }
pre { background: var(--tint); padding: .6rem .8rem; font-size: .84rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .4rem 0; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; break-inside: avoid; } table { font-size: 7pt; } th, td { padding: .1rem .3rem; }
  .panels { grid-template-columns: repeat(3, 1fr); } h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  .verdict, pre, td b { print-color-adjust: exact; }
}
"""


def render_page(title: str, body: Iterable[str]) -> str:
    """Return a whole page around parts that are HTML."""
    return escape_bytes(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else a browser asks a server for one
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def heading(level: int, text: str) -> str:
    """Return a heading, 1 the greatest."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; `kind` is soft or verdict."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def commands(lines: Iterable[str]) -> str:
    """Return commands as they were typed."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    bold: frozenset[tuple[int, int]] = frozenset(),
    kind: str = "",
) -> str:
    """Return a table that scrolls by itself where it is too wide; the first column names the row.

    Args:
        columns: headings; a line break parts what stands above each other.
        rows: cells.
        bold: (row, column) of the cells that stand out.
        kind: `left` where the cells are words, `text` where they may be long.
    """
    head = "".join(f'<th scope="col">{escape(name).replace(chr(10), "<br>")}</th>' for name in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = [f"<b>{escape(c)}</b>" if (number, i) in bold else escape(c) for i, c in enumerate(row)]
        lines.append(f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{c}</td>" for c in cells[1:]) + "</tr>")
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>"
    return f'<div class="wide"><table class="{kind}">{inner}</table></div>'


def side_by_side(parts: Iterable[str]) -> str:
    """Return parts that are HTML side by side where the page is wide enough, else below each other."""
    return f'<div class="pair">{"".join(parts)}</div>'


def panels(svgs: Iterable[tuple[str, bytes]]) -> str:
    """Return figures side by side, as many as fit: (text in place of the figure, SVG)."""
    figures = []
    for text, svg in svgs:
        data = base64.b64encode(svg).decode()
        figures.append(f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></figure>')
    return f'<div class="panels">\n{chr(10).join(figures)}\n</div>'
