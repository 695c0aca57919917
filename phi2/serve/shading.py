"""Answers as HTML, each token shaded by how likely it was, or by how much two policies disagree about it.

Functions take plain text and escape it; what they return is HTML. Hues are those of the reports (`lab/page.py`): apart
for colour-blind eyes too, and so pale that text on the darkest shade is readable on light and on dark paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from phi2.serve.side_by_side import Span

FULL_SURPRISE = 6.0  # nats; a token of this log-probability, or less, has the darkest shade
LEAST_FULL_RATIO = 0.05  # nats; so that rounding is not shown as disagreement
DARKEST = 62  # percent of the hue in the darkest shade

STYLE = """
.answers { --rare: #e8853f; --more: #4f9be0; --less: #e8853f; --soft: #5f6268; --line: #dcdcd6; --card: #ffffff;
  --ink: #1c1d1f; display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr));
  align-items: start; }
.dark .answers { --rare: #b5571a; --more: #2470b3; --less: #b5571a; --soft: #a2a6ae; --line: #34383e; --card: #1b1e22;
  --ink: #e8e9eb; }
.answers article { background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem .9rem; min-width: 0; }
.answers h3 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; color: var(--ink); }
.answers .text { margin: 0 0 .7rem; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--ink); font-size: .95rem; }
.answers .text span { border-radius: .2rem; padding: .12em 0; background: color-mix(in srgb, var(--hue) var(--shade),
  transparent); }
.answers .text span:hover { outline: 1px solid var(--ink); }
.answers .end { font-size: .75em; font-family: ui-monospace, Menlo, Consolas, monospace; color: var(--ink); }
.answers .facts { margin: 0; font-size: .82rem; line-height: 1.5; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.answers .facts b { color: var(--ink); font-weight: 600; }
.answers .wrong { color: #a5301c; } .dark .answers .wrong { color: #f29a88; }
.answers .key { grid-column: 1 / -1; display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .6rem;
  font-size: .82rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.answers .bar { width: 9rem; height: .75rem; border-radius: .2rem; border: 1px solid var(--line); }
.answers details { margin-top: .5rem; font-size: .82rem; color: var(--soft); }
.answers summary { cursor: pointer; }
.answers .numbers { max-height: 18rem; overflow: auto; margin-top: .4rem; }
.answers table, .answers tr { border: 0 !important; }
.answers table { font-size: .78rem; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.answers th { font-weight: 500; text-align: right; }
.answers td { text-align: right; color: var(--ink); }
.answers th, .answers td { padding: .15rem .35rem !important; border: 0 !important;
  border-bottom: 1px solid var(--line) !important; }
.answers th:first-child, .answers td:first-child { text-align: left; padding-left: 0 !important;
  white-space: pre;
  font-family: ui-monospace, Menlo, Consolas, monospace; }
"""


@dataclass(frozen=True)
class Told:
    """An answer and what is known of it.

    Attributes:
        policy: who gave it.
        logprobs: by policy, of each of its tokens, in nats.
        facts: how it was made, in words.
        error: what went wrong, in words.
    """

    policy: str
    spans: Sequence[Span]
    logprobs: Mapping[str, Sequence[float]]
    facts: str
    error: str | None = None

    def logprob(self, span: Span, policy: str) -> float:
        return sum(self.logprobs[policy][span.start : span.end])

    def logratio(self, span: Span, pair: tuple[str, str]) -> float:
        return self.logprob(span, pair[0]) - self.logprob(span, pair[1])

    def has(self, *policies: str) -> bool:
        return all(policy in self.logprobs for policy in policies)


def answers_html(answers: Sequence[Told], pair: tuple[str, str] | None) -> str:
    """Cards side by side under a key to their shades.

    Args:
        pair: shade by the log-ratio of the first policy to the second; None: by the log-probability under the policy
            that answered.
    """
    ratios = [abs(told.logratio(span, pair)) for told in answers if pair and told.has(*pair) for span in told.spans]
    full = max([LEAST_FULL_RATIO, *ratios])
    cards = "\n".join(_card(told, pair, full) for told in answers)
    return f'<div class="answers">{_key(pair, full)}\n{cards}</div>'


def _key(pair: tuple[str, str] | None, full: float) -> str:
    if pair is None:
        text, ends, stops = "log-probability", ("0", f"−{FULL_SURPRISE:g} nats or less"), ("transparent", _hue("rare"))
    else:
        first, second = map(escape, pair)
        text = f"log p({first}) − log p({second})"
        ends, stops = (f"−{full:.2g}", f"+{full:.2g} nats"), (_hue("less"), "transparent", _hue("more"))
    bar = f'<span class="bar" style="background: linear-gradient(to right, {", ".join(stops)})"></span>'
    return f'<div class="key"><span>{text}</span><span>{ends[0]}</span>{bar}<span>{ends[1]}</span></div>'


def _hue(name: str) -> str:
    return f"color-mix(in srgb, var(--{name}) {DARKEST}%, transparent)"


def _card(told: Told, pair: tuple[str, str] | None, full: float) -> str:
    shown = "".join(_span(told, span, pair, full) for span in told.spans)
    error = f'<p class="facts wrong">{escape(told.error)}</p>' if told.error else ""
    facts = f'<p class="facts">{escape(told.facts)}{_sums(told, pair)}</p>'
    text = f'<div class="text">{shown}</div>'
    return f"<article><h3>{escape(told.policy)}</h3>{text}{error}{facts}{_numbers(told, pair)}</article>"


def _span(told: Told, span: Span, pair: tuple[str, str] | None, full: float) -> str:
    """A token, its shade, and its number where the pointer rests on it."""
    kind = ' class="end"' if span.ends_turn else ""
    if not told.has(*(pair or (told.policy,))):
        return f"<span{kind}>{escape(span.text)}</span>"
    value = told.logratio(span, pair) if pair else told.logprob(span, told.policy)
    hue = "rare" if pair is None else "more" if value > 0 else "less"
    shade = DARKEST * min(1.0, abs(value) / (full if pair else FULL_SURPRISE))
    style = f"--hue: var(--{hue}); --shade: {shade:.0f}%"
    return f'<span{kind} style="{style}" title="{_signed(value, pair)} nats">{escape(span.text)}</span>'


def _sums(told: Told, pair: tuple[str, str] | None) -> str:
    """Of the whole answer."""
    if pair is not None and not told.has(*pair):
        return "<br>not scored under both: stopped, or read as other tokens" if told.logprobs else ""
    if not told.has(told.policy) or not told.spans:
        return ""
    if pair is None:
        return f"<br>log p <b>{_signed(sum(told.logprobs[told.policy]), None)}</b> nats in all"
    total = sum(told.logprobs[pair[0]]) - sum(told.logprobs[pair[1]])
    return f"<br>log-ratio <b>{_signed(total, pair)}</b> nats in all"


def _numbers(told: Told, pair: tuple[str, str] | None) -> str:
    """Every shade as a number, under each policy that was asked."""
    if not told.spans or len(told.logprobs) < 2:
        return ""
    ratio = pair is not None and told.has(*pair)
    head = "".join(f"<th>{escape(name)}</th>" for name in (*(["log-ratio"] if ratio else []), *told.logprobs))
    rows = []
    for span in told.spans:
        cells = [_signed(told.logratio(span, pair), pair)] if pair is not None and ratio else []
        cells += [_signed(told.logprob(span, name), None) for name in told.logprobs]
        rows.append(f"<tr><td>{escape(_visible(span.text))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        "<details><summary>log-probabilities in nats</summary>"
        f'<div class="numbers"><table><tr><th>token</th>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·")


def _signed(value: float, pair: tuple[str, str] | None) -> str:
    """With a real minus sign; a ratio also with its plus."""
    text = f"{abs(value):.3f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+" if pair else ""
    return sign + text
