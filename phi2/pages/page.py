"""HTML for reports: one file that needs nothing else, light or dark as the reader's system is, readable on a phone.

`fragment` puts its parts into a notebook.

Functions take plain text and escape it; what they return is HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c1d1f; --soft: #6a6d73; --rule: #e2e2de; --tint: #f4f4f0;
  --c0: #8a8f98; --c1: #1f6fb5; --c2: #cf5b13; --c3: #2a8a5c; --c4: #8a4fb8; --c5: #a98408;
  --c6: #0f8c94; --c7: #c23d75; --good: #21794d; --bad: #b3402e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e4e5e7; --soft: #979ba3; --rule: #2e3237;
  --tint: #1e2125; --c0: #8f959f; --c1: #62aef0; --c2: #f08c4a; --c3: #5cc795; --c4: #c08ef0; --c5: #d9b84a;
  --c6: #4fc3cb; --c7: #f080ad; --good: #63c795; --bad: #f08d78; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%; font-variant-numeric: tabular-nums; }
h1, h2, h3 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; font-weight: 600;
  line-height: 1.25; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .9rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
.lead { font-size: .95rem; color: var(--soft); }
@media (max-width: 40rem) { body { padding-top: 1.5rem; } }
"""
PARTS_STYLE = """
p { margin: .5rem 0; max-width: 44rem; }
.note, td.note { color: var(--soft); }
.note { font-size: .85rem; max-width: none; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; }
th, td { padding: .32rem 1.4rem .32rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { border-bottom-color: var(--soft); vertical-align: bottom; }
tbody th { color: var(--ink); font-size: .9rem; font-weight: 400; }
.right { text-align: right; }
td small { color: var(--soft); font-size: .78rem; white-space: nowrap; }
.settings { columns: 2 17rem; column-gap: 3rem; font-size: .84rem; margin: 0; }
.settings div { display: flex; gap: 1rem; justify-content: space-between; break-inside: avoid;
  border-bottom: 1px solid var(--rule); padding: .22rem 0; }
.settings dt { color: var(--soft); white-space: nowrap; }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.6rem 1.8rem; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; max-width: 44rem; }
.beside { display: flex; flex-wrap: wrap; gap: 1.6rem 3rem; align-items: flex-start; }
.beside > figure { flex: 1 1 22rem; }
figcaption { font-size: .84rem; line-height: 1.4; margin-bottom: .35rem; }
figcaption strong { display: block; font-weight: 600; }
.key { color: var(--soft); margin-right: 1rem; white-space: nowrap; }
.key b { color: var(--ink); font-weight: 500; }
.key::before { content: ""; display: inline-block; width: .62rem; height: .62rem; border-radius: 50%;
  margin-right: .35rem; background: var(--series); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 10px; fill: var(--soft); }
svg .group { font-size: 11.5px; fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: .8; }
svg .zero { stroke: var(--soft); stroke-width: 1; }
polyline { fill: none; stroke: var(--series); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
polyline.pale { stroke-width: 1; opacity: .35; }
.whisker { stroke: var(--series); stroke-width: 2.4; stroke-linecap: round; opacity: .5; }
.fill { fill: var(--series); }
.band { fill: var(--series); opacity: .16; }
.c0 { --series: var(--c0); } .c1 { --series: var(--c1); } .c2 { --series: var(--c2); } .c3 { --series: var(--c3); }
.c4 { --series: var(--c4); } .c5 { --series: var(--c5); } .c6 { --series: var(--c6); }
.charts .c0 { --series: var(--c1); } .charts .c1 { --series: var(--c2); } .charts .c2 { --series: var(--c3); }
.charts .c3 { --series: var(--c4); } .charts .c4 { --series: var(--c5); } .charts .c5 { --series: var(--c6); }
.charts .c6 { --series: var(--c7); }
.other { --series: var(--soft); opacity: .4; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.samples td, .samples tbody th { min-width: 8.5rem; }
@media (max-width: 40rem) { th, td { padding-right: .9rem; } }
.right-answer::before { content: "\\2713\\00a0"; color: var(--good); font-weight: 600; }
.wrong-answer::before { content: "\\2717\\00a0"; color: var(--bad); font-weight: 600; }
.chat { max-width: 34rem; display: grid; gap: .55rem; }
.turn { padding: .5rem .85rem; border-radius: .9rem; width: fit-content; max-width: 85%; white-space: pre-wrap; }
.turn.user { background: var(--c1); color: var(--paper); justify-self: end; border-bottom-right-radius: .2rem; }
.turn.assistant { background: var(--tint); border: 1px solid var(--rule); border-bottom-left-radius: .2rem; }
.turn.system { color: var(--soft); font-size: .85rem; justify-self: center; }
details > summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
details[open] > summary { margin-bottom: .6rem; }
"""
NOTEBOOK_COLOURS = """
--ink: currentColor; --soft: color-mix(in srgb, currentColor 65%, transparent);
--rule: color-mix(in srgb, currentColor 15%, transparent); --tint: color-mix(in srgb, currentColor 5%, transparent);
--paper: #fdfdfc; --c0: #8a8f98; --c1: #3583c9; --c2: #d9691f; --c3: #2f9465; --c4: #9a62c9; --c5: #b08c1c;
--c6: #22979f; --c7: #cc4f84; --good: #2f9465; --bad: #c4503d;
"""  # a notebook is light or dark as its own theme is, whatever the system: inks follow its text, colours show on both


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A whole document. A section is a heading, escaped here, and its HTML; one without content is left out."""
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{html}\n</section>" for name, html in sections.items() if html)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{PAGE_STYLE}{PARTS_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def fragment(html: str) -> str:
    """The same for a cell of a notebook, whose own style is left alone."""
    return f'<div class="phi2"><style>.phi2 {{ {NOTEBOOK_COLOURS}{PARTS_STYLE} }}</style>{html}</div>'


def picture(figure: str) -> str:
    """The drawing of a chart as an SVG document of its own, for pages light and dark."""
    drawing = figure[figure.index("<svg") : figure.index("</svg>")]
    colours = f"svg {{ color: #7b818a; font-family: sans-serif; {NOTEBOOK_COLOURS} }}"
    style = f"<style>{colours} {PARTS_STYLE} .c0 {{ --series: var(--c1); }}</style>"
    start, inside = drawing.split(">", 1)
    return f'{start} xmlns="http://www.w3.org/2000/svg">{style}{inside}</svg>\n'


def noted(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of cells that are HTML already, the first of each row its heading; `style` is a CSS class."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr><th>{first}</th>{''.join(map(_cell, rest))}</tr>" for first, *rest in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def settings(values: Mapping[str, Any]) -> str:
    """Names and values in columns; those of nested mappings are called outer.inner."""
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _flat(values))
    return f'<dl class="settings">{"".join(rows)}</dl>' if values else ""


def chat(messages: Iterable[Mapping[str, str]]) -> str:
    """A conversation as bubbles."""
    turns = "\n".join(f'<div class="turn {escape(m["role"])}">{escape(m["content"])}</div>' for m in messages)
    return f'<div class="chat">{turns}</div>' if turns else ""


def said(text: str, correct: bool | None = None) -> str:
    """What a model said, line breaks kept; with a tick or a cross where it was graded."""
    mark = "" if correct is None else " right-answer" if correct else " wrong-answer"
    return f'<span class="said{mark}">{escape(text)}</span>'


def _cell(html: str) -> str:
    return f"<td>{html}</td>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, Mapping | type(None)):
        return "none" if not value else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
