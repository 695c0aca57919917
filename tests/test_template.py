"""The chat template runner: its limits, what a template is shown, and what it can be asked about itself."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.text import template, template_limits
from phi2.text.template import literals, render, uses

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
DOUBLING = "{% set ns = namespace(v=START) %}{% for i in range(200) %}{% set ns.v = STEP %}{% endfor %}{{ ns.v }}"


def doubling(step: str, start: str = "'xy'") -> str:
    return DOUBLING.replace("START", start).replace("STEP", step)


TOO_LARGE = [
    "{{ 'x' * 10**11 }}",
    "{{ 10**11 * 'x' }}",
    "{{ [0] * 10**11 }}",
    "{{ (1, 2) * 10**11 }}",
    "{{ '%0100000000000d' % 1 }}",
    "{{ '%*d' % (10**11, 1) }}",
    "{{ '%.100000000000f' % 1 }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**11) }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**11}) }}",
    "{{ 'x'.ljust(10**11) }}",
    "{{ 'x'.rjust(10**11) }}",
    "{{ 'x'.center(10**11) }}",
    "{{ 'x'.zfill(10**11) }}",
    "{{ ('x' | attr('zfill'))(10**11) }}",
    "{{ '\t'.expandtabs(10**11) }}",
    "{{ 'x'.encode().ljust(10**11) }}",
    "{{ (5).to_bytes(10**11, 'big') }}",
    "{{ 'x' | center(10**11) }}",
    "{{ ['x'] | map('center', 10**11) | list }}",
    "{{ 'x' | indent(10**11, true) }}",
    "{{ 1.5 | round(10**11) }}",
    "{{ [1] | batch(10**11, 0) | list }}",
    "{{ [1] | slice(10**11) | list }}",
    "{{ [1] | tojson(indent=10**11) }}",
    "{{ 9 ** 10 ** 9 }}{{ 9 ** (10 ** 10) }}",
    "{% filter center(10**11) %}x{% endfilter %}",
    "{% set b = 'x' * 10**6 %}{{ ''.join(([''] * 9999) | map('default', b, true)) }}",
    "{% set b = 'x' * 10**6 %}{{ ([''] * 9999) | map('default', b, true) | join }}",
    "{% set b = 'x' * 10**6 %}{{ b.replace('x', b) }}{{ b | replace('x', b) }}",
    "{% set b = 'x' * 10**6 %}{{ b | wordwrap(1, true, b) }}",
    "{% set b = 'x' * 10**6 %}{{ b.translate({120: b}) }}",
    "{% set b = 'x' * 10**6 %}{% for i in range(99999) %}{{ b }}{% endfor %}",
    "{% set b %}" + "x" * 999 + "{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}{{ b }}",
    "{% macro m() %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['y' * 10**6 ~ i] %}{% endfor %}",
    "{{ '{a:>99999999999}'.format_map({1: 2, 'a': 1}) }}",
    "{% set b = 'x' * 10**6 %}{{ b.join({'a': 1, 'b': 2}.values() | map('default', 1) | list * 99) }}",
    "{% set b = 'x' * 10**6 %}{{ b.join(dict(({'a': b}).items()).fromkeys(range(99)).keys() | map('string')) }}",
    "{% set b = '1' * 10**6 %}{{ b | replace(1, b) }}",
    "{% set b = 'x' * 10**6 %}{{ b.translate([b] * 10) }}",
    "{{ (('f' * 10**6) | int(0, 16)) // 3 }}",
    "{{ ('<!---->' * 10**6) | striptags }}",
    "{{ ([[1] * 10**5] * 9) | sum(start=[]) | length }}{{ ([[1] * 10**5] * 999) | sum(start=[]) | length }}",
    doubling("ns.v + ns.v"),
    doubling("ns.v ~ ns.v"),
    doubling("ns.v * 2"),
    doubling("'%s%s' % (ns.v, ns.v)"),
    doubling("'{0}{0}'.format(ns.v)"),
    doubling("'{v}{v}'.format(v=ns.v)"),
    doubling("[ns.v, ns.v] | join"),
    doubling("ns.v.join([ns.v, ns.v])"),
    doubling("ns.v.replace('x', 'xx')"),
    doubling("ns.v | replace('x', 'xx')"),
    doubling("ns.v | indent(8, true, true) | replace(' ', '  ')"),
    doubling("[ns.v, ns.v]"),
    doubling("(ns.v, ns.v)"),
    doubling("{'a': ns.v, 'b': ns.v}"),
    doubling("dict(a=ns.v, b=ns.v)"),
    doubling("ns.v + ns.v", "[1]"),
    doubling("ns.v * ns.v", "3"),
    DOUBLING.replace("START", "'x'").replace("{% set ns.v = STEP %}", "{% set ns.v %}{{ ns.v }}{{ ns.v }}{% endset %}"),
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in range(9) recursive %}{{ loop(range(9)) if loop.depth < 60 }}{% endfor %}",
]


@pytest.mark.parametrize("source", TOO_LARGE)
def test_a_template_that_asks_for_too_much_ends_in_a_line(source):
    with pytest.raises(ValueError, match=r"\Achat template: it (makes|builds)[^\n]* more than \d+ [^\n]*\Z"):
        render(source, CHAT)


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_runs_for_ever_ends_in_a_line(source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 10_000)
    with pytest.raises(ValueError, match=r"\Achat template: [^\n]*more than 10000 steps[^\n]*\Z"):
        render(source, CHAT)


def test_recursion_without_an_end_is_a_line():
    with pytest.raises(ValueError, match="recursion"):
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHAT)


@pytest.mark.parametrize(
    "source", ["{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages | map(attribute='content') | join }}"]
)
def test_a_long_conversation_is_within_the_limits(source):
    chat = [{"role": "user", "content": "x" * 1000}] * 5000
    assert len(render(source, chat)[0]) == 5_000_000


def test_text_gathered_turn_by_turn_is_within_the_limits():
    source = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}"
    )
    assert len(render(source, [{"role": "user", "content": "x" * 1000}] * 1000)[0]) == 1_000_000


def test_every_rendering_has_its_own_allowance(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 30)
    for _ in range(5):
        render("{% for i in range(20) %}{{ i }}{% endfor %}", CHAT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=JSON)
def test_a_template_sees_the_data_it_is_given(value):
    import json

    assert json.loads(render("{{ value | tojson }}", CHAT, value=value)[0]) == value


class Colour(str, enum.Enum):  # noqa: UP042  (an older habit, whose str() is "Colour.RED")
    RED = "red"


class Writer:
    def write(self) -> str:
        return "written"


def test_subclasses_of_plain_types_are_shown_as_these():
    assert render("{{ a }}{{ b }}", CHAT, a=Colour.RED, b=(True, 1))[0] == "red(True, 1)"


@pytest.mark.parametrize("value", [Writer(), [Writer()], {"a": (Writer(),)}, b"x", {1, 2}])
def test_other_objects_are_out_of_reach(value):
    with pytest.raises(
        ValueError, match=r"\Amessage 2: a template reads text, numbers, lists and mappings, got [^\n]*\Z"
    ):
        render("{{ messages[1].note }}", [CHAT[0], {**CHAT[1], "note": value}])


def test_data_nested_too_deeply_is_a_line():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        render("x", [{"role": "user", "content": "", "note": deep}])


@pytest.mark.parametrize("name", ["source", "messages_", "self_", "template", "variables"])
def test_variables_may_have_any_name(name):
    assert render("{{ " + name + " }}", CHAT, **{name: "v"})[0] == "v"


def test_content_may_be_missing_beside_tool_calls():
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    source = "{{ messages[0].content is defined }}{{ messages[0].tool_calls[0].function.name }}"
    assert render(source, [calls])[0] == render(source, [{**calls, "content": None}])[0] == "Falsef"


@pytest.mark.parametrize("calls", [[], None, ()])
def test_content_may_not_be_missing_beside_no_tool_calls(calls):
    with pytest.raises(ValueError, match="message 1 must be a role and a content, both str"):
        render("x", [{"role": "assistant", "content": None, "tool_calls": calls}])


# Spans


def test_spans_hold_what_generation_marks():
    source = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}.{% endgeneration %}{% endfor %}"
    text, spans = render(source, CHAT)
    assert [text[start:end] for start, end in spans] == ["Hi.", "Yo."]


def test_without_the_tag_there_are_no_spans():
    assert render("{{ messages[0].content }}", CHAT) == ("Hi", [])


def test_generation_that_is_moved_afterwards_is_refused():
    source = "{% macro m() %}ab{% generation %}cd{% endgeneration %}{% endmacro %}{{ m() }}"
    with pytest.raises(ValueError, match=r"generation[^\n]* cannot be told\Z"):
        render(source, CHAT)


# What a template says of itself


@pytest.mark.parametrize(
    "source",
    [
        "{% if tools %}x{% endif %}",
        "{{ messages[0].tools }}",
        "{{ messages[0]['tools'] }}",
        "{{ messages[0].get('tools') }}",
        "{% if 'tools' in messages[0] %}x{% endif %}",
        "{{ messages | selectattr('tools') | list }}",
        "{{ messages | map(attribute='tools') | list }}",
        "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}",
        "{% macro f() %}{{ tools | tojson }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_name_that_is_read_is_used(source):
    assert uses(source, "tools")


@pytest.mark.parametrize(
    "source",
    [
        "tools",
        "{{ 'tools' }}",
        "{# tools #}",
        "{% set tools = 1 %}{{ tools }}",
        "{% for tools in messages %}{{ tools.role }}{% endfor %}",
        "{{ messages[0].tools_used }}",
        "{% if messages[0].role == 'tools' %}x{% endif %}",
    ],
)
def test_a_name_that_only_stands_there_is_not_used(source):
    assert not uses(source, "tools")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_what_was_thought_has_three_names(name):
    assert uses("{{ messages[0].thinking }}", name) and not uses("{{ messages[0].content }}", name)
    chat = [{**CHAT[1], name: "hm"}]
    assert render("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", chat)[0] == "hmhm"


def test_a_broken_template_cannot_be_asked():
    for ask in (lambda: uses("{% if %}", "x"), lambda: literals("{% if %}")):
        with pytest.raises(ValueError, match=r"\Achat template: [^\n]+\Z"):
            ask()


def test_literals_are_what_the_template_writes():
    assert {"<a>", "<b>", "<c>"} <= set(literals("<a>{{ '<b>' + x['<c>'] }}{# <d> #}").split("\0"))


def test_a_template_is_compiled_once():
    template._compiled.cache_clear()
    for _ in range(3):
        render("{{ 1 }}", CHAT)
    assert template._compiled.cache_info().misses == 1
