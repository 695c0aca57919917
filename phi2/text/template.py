"""Chat templates: a conversation written out as the one string a model was trained on.

A template runs as transformers runs it, with the same names, filters and tags, and within the limits of
`template_limits.py`; the two differ in what they refuse, never in text. A template sees plain data only: text, numbers,
lists and mappings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from reprlib import repr as short_repr
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from phi2.files import one_line
from phi2.text.template_limits import METER, LimitedEnvironment, Meter, metered

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names of one thing: what an assistant thought
FAILURES = (  # what a template that is wrong, or too greedy, ends in
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
Span = tuple[int, int]


def render(source: str, messages: Iterable[Mapping[str, Any]], /, **variables: Any) -> tuple[str, list[Span]]:
    """The text a template makes of `messages`, and the characters of it that `{% generation %}` marks.

    Args:
        messages: each with a role, and a content unless it calls tools; further keys reach the template too.
        variables: what else the template may read.

    Raises:
        ValueError: one line, for a malformed message and for a template that fails or exceeds its limits.
    """
    try:
        data = {name: _plain(value, name) for name, value in variables.items()}
        data["messages"] = [_message(message, number) for number, message in enumerate(messages, start=1)]
    except RecursionError as error:
        raise ValueError("a message holds lists within lists, too deep for a chat template") from error
    meter = Meter()
    token = METER.set(meter)
    try:
        for piece in _compiled(source).generate(data):
            meter.write(piece)
        return "".join(meter.pieces), _spans(meter)
    except FAILURES as error:
        raise ValueError(f"chat template: {one_line(error)}") from error
    finally:
        METER.reset(token)


def uses(source: str, name: str) -> bool:
    """Whether a template reads a variable, a key or an attribute called `name`.

    Raises:
        ValueError: for a template that is not one.
    """
    return not _read_names(source).isdisjoint(REASONING_KEYS if name in REASONING_KEYS else (name,))


@lru_cache(maxsize=8)
def literals(source: str) -> str:
    """All text that stands in a template itself, its parts kept apart by a null character.

    Raises:
        ValueError: for a template that is not one.
    """
    tree = _parsed(source)
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*(node.data for node in tree.find_all(nodes.TemplateData)), *constants])


def _message(message: Any, number: int) -> dict[str, Any]:
    """A message as transformers shows it: without keys that hold None, and with its thoughts by every name."""
    if not isinstance(message, Mapping) or not _is_turn(message):
        raise ValueError(f"message {number} must be a role and a content, both str, got {short_repr(message)}")
    plain = _plain({key: value for key, value in message.items() if value is not None}, f"message {number}")
    thought = next((plain[key] for key in REASONING_KEYS if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _is_turn(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(message.get("role"), str) and (
        isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
    )


def _plain(value: Any, where: str) -> Any:
    """`value` rebuilt of JSON's types, so that no method of a richer object is within reach of a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(item, where) for item in value)
    if isinstance(value, str):  # here and below: of a subclass, such as an enumeration
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise ValueError(f"{where}: a template reads text, numbers, lists and mappings, got {short_repr(value)}")


def _spans(meter: Meter) -> list[Span]:
    text = "".join(meter.pieces)
    for start, marked in meter.generated:
        if not text.startswith(marked, start):  # inside a macro, where nobody knows where its text will stand
            raise ValueError("where the text of its {% generation %} stands cannot be told")
    return [(start, start + len(marked)) for start, marked in meter.generated]


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = _environment()
    return environment.from_string(metered(environment.parse(source)))


@lru_cache(maxsize=8)
def _parsed(source: str) -> nodes.Template:
    try:
        return _environment().parse(source)
    except FAILURES as error:
        raise ValueError(f"chat template: {one_line(error)}") from error


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """The sandbox, with the names and tags transformers gives to chat templates."""
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for a loss mask; rendering leaves its content as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        meter, text = METER.get(), caller()
        meter.generated.append((meter.length, text))
        return text


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=8)
def _read_names(source: str) -> frozenset[str]:
    tree = _parsed(source)
    # message.get("name"), messages | selectattr("name"), | map(attribute="name")
    look_ups: list[nodes.Call | nodes.Filter] = [*tree.find_all(nodes.Call), *tree.find_all(nodes.Filter)]
    return frozenset(meta.find_undeclared_variables(tree)).union(
        (node.attr for node in tree.find_all(nodes.Getattr)),
        _strings(node.arg for node in tree.find_all(nodes.Getitem)),
        _strings(node.expr for node in tree.find_all(nodes.Compare) if any(o.op in ("in", "notin") for o in node.ops)),
        *(_strings([*node.args, *(pair.value for pair in node.kwargs)]) for node in look_ups),
    )


def _strings(expressions: Iterable[nodes.Node]) -> set[str]:
    return {node.value for node in expressions if isinstance(node, nodes.Const) and isinstance(node.value, str)}
