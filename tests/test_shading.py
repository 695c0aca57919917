"""Tokens as HTML: nothing a model says is markup, every shade has its number, and text on it can be read."""

from __future__ import annotations

import re

import pytest

from phi2.serve.shading import DARKEST, STYLE, Told, answers_html
from phi2.serve.side_by_side import Span

SPANS = [Span("A", 0, 1), Span(" b", 1, 3), Span("<|im_end|>", 3, 4, ends_turn=True)]
LOGPROBS = {"sft": [-0.5, -1.0, -1.0, -0.25], "dpo": [-0.25, -2.0, -2.0, -0.25]}


def told(logprobs=LOGPROBS, spans=SPANS, policy="sft", **changes) -> Told:
    return Told(policy, spans, logprobs, "4 tokens", **changes)


def test_what_a_model_says_is_text():
    html = answers_html([told(spans=[Span("<script>", 0, 1)], policy="<b>", logprobs={}, error="<i>")], None)
    assert "<script>" not in html and "<b>" not in html and "<i>" not in html and "&lt;script&gt;" in html


def test_a_token_is_as_dark_as_it_was_unlikely():
    html = answers_html([told()], None)
    shades = [float(shade) for shade in re.findall(r"--shade: (\d+)%", html)]
    assert shades == [round(DARKEST * nats / 6) for nats in (0.5, 2.0, 0.25)]
    assert 'title="−0.500 nats">A<' in html and "log p <b>−2.750</b> nats" in html


def test_a_ratio_is_shaded_to_either_side_on_the_scale_of_the_largest():
    html = answers_html([told()], ("dpo", "sft"))
    assert re.findall(r"--hue: var\(--(\w+)\); --shade: (\d+)%", html)[:2] == [("more", "8"), ("less", str(DARKEST))]
    assert "log-ratio <b>−1.750</b> nats" in html and "+2 nats" in html and 'title="+0.250 nats">A<' in html


def test_a_ratio_that_is_not_known_is_told_and_nothing_is_shaded():
    html = answers_html([told({"sft": LOGPROBS["sft"]})], ("dpo", "sft"))
    assert "not scored under both" in html and "--shade:" not in html


def test_every_number_can_be_read_in_a_table():
    html = answers_html([told()], ("dpo", "sft"))
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    assert rows[1] == ("·b", "−2.000", "−2.000", "−4.000")


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def parsed(block: str, name: str) -> tuple[float, ...]:
    text = re.search(rf"--{name}: #([0-9a-f]{{6}})", block)[1]
    return tuple(int(text[i : i + 2], 16) / 255 for i in (0, 2, 4))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("hue", ["rare", "more", "less"])
def test_text_on_the_darkest_shade_can_be_read(theme, hue):
    """A contrast of 4.5, WCAG's level AA."""
    block = STYLE.partition(".dark .answers {")[0 if theme == "light" else 2]
    share = DARKEST / 100
    shade = tuple(share * h + (1 - share) * c for h, c in zip(parsed(block, hue), parsed(block, "card"), strict=True))
    low, high = sorted((luminance(shade), luminance(parsed(block, "ink"))))
    assert (high + 0.05) / (low + 0.05) >= 4.5
