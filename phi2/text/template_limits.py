"""jinja2's sandbox with an end: a chat template is a program from a stranger, and may ask for 100 GB or for ever.

Whatever a template builds is measured. What can grow by a factor (repeating, padding, joining, formatting) is estimated
before it is made, everything else after; loops and calls count their steps. A template that exceeds a limit ends in
jinja2's TemplateRuntimeError, long before memory or patience do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from sys import getsizeof
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 2**24  # of a rendered text, and of any value on the way to it
MAX_BYTES = 2**30  # of everything that is built on the way
MAX_STEPS = 10**6  # rounds of all loops, and calls of macros, methods and filters
MAX_INT_BITS = 2**20
SHORT = 1000  # characters of a text that is not worth measuring: there are only so many steps to make them in
ITEM = 32  # what an item of a list counts, in characters


class Meter:
    """What one rendering has used so far, and the text it has written."""

    def __init__(self) -> None:
        self.bytes = self.steps = self.length = 0
        self.pieces: list[str] = []
        self.generated: list[tuple[int, str]] = []  # what `{% generation %}` marked: where it begins, and its text

    def write(self, piece: str) -> None:
        self.length += len(piece)
        require_size(self.length)
        self.pieces.append(piece)


METER: ContextVar[Meter] = ContextVar("METER")  # of the rendering that runs


def require_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateRuntimeError(f"it makes a text or list of more than {MAX_CHARACTERS} characters")


def size_of(value: Any) -> int:
    """Characters of `value` written out, roughly; a list that stands in another many times counts each time."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, Mapping):
            size += ITEM * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            size += ITEM * len(item)
            waiting += item
        require_size(size)
    return size


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for templates that went through `metered`."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]  # text without an end, and random
        self.globals["namespace"] = LimitedNamespace
        self.filters["tojson"] = self.to_json
        self.filters = {name: self._limited(name, function) for name, function in self.filters.items()}

    def step(self) -> bool:
        """Counts one round of a loop, or one call; always true."""
        meter = METER.get()
        meter.steps += 1
        if meter.steps > MAX_STEPS:
            raise TemplateRuntimeError(f"its loops and calls take more than {MAX_STEPS} steps")
        return True

    def measured(self, value: Any) -> Any:
        """`value`, once it is known to be within the limits."""
        if isinstance(value, str):
            if len(value) > SHORT:
                require_size(len(value))
                self._spend(getsizeof(value))
        elif isinstance(value, (list, tuple, dict)):
            self._spend(size_of(value))
        elif isinstance(value, int):
            _require_bits(value.bit_length())
        return value

    def _spend(self, count: int) -> None:
        meter = METER.get()
        meter.bytes += count
        if meter.bytes > MAX_BYTES:
            raise TemplateRuntimeError(f"it builds more than {MAX_BYTES} bytes on the way to its text")

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a macro, a block or a loop wrote, which may be one long text many times."""
        kept = list(pieces)
        require_size(sum(map(len, kept)))
        return self.measured("".join(kept))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":  # in every ChatML template, five times a message
            return self.measured(left + right)
        if operator == "*":
            require_size(_product_size(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            require_size(_printf_size(left, right))
        return self.measured(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__self__", None) is self:  # put there by `metered`
            return function(*args)
        self.step()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            if method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])  # an iterator can be looked at once only
            require_size(_estimate(METHOD_SIZES, method.__name__, owner, *args, **kwargs))
        return self.measured(super().call(context, function, *args, **kwargs))

    def _limited(self, name: str, function: Callable) -> Callable:
        leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context, which jinja2 puts first

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.step()
            passed, (value, *others) = args[:leading], args[leading:]
            if name in ("join", "sum"):
                value = list(value)  # an iterator can be looked at once only
            require_size(_estimate(FILTER_SIZES, name, value, *others, **kwargs))
            if isinstance(value, (str, list, tuple, range)):
                self._spend(len(value))  # what it costs to go through it
            return self.measured(function(*passed, value, *others, **kwargs))

        return limited

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers' `tojson` filter writes it: nothing is escaped for HTML."""
        size_of(value)
        require_size(_length(indent) + _length(separators))
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(_within_limit(encoder.iterencode(value)))


class LimitedNamespace(Namespace):
    """jinja2's namespace, which prints as nothing long and takes no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateRuntimeError(f"a namespace cannot hold the underscore name {name!r}")


def metered(tree: nodes.Template) -> nodes.Template:
    """The template with calls to `LimitedEnvironment.step` and `measured` where it loops and where it builds."""
    return _Metering().visit(tree)


class _Metering(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_environment_call("step")))
        if node.test is not None:
            node.test = nodes.And(_environment_call("step"), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _environment_call("measured", node)

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        constant = all(isinstance(part, (nodes.Literal, nodes.Pair)) for part in node.find_all(nodes.Expr))
        self.generic_visit(node)
        return node if constant or getattr(node, "ctx", "load") != "load" else _environment_call("measured", node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _environment_call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _within_limit(pieces: Iterable[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        require_size(size)
        yield piece


def _require_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TemplateRuntimeError(f"it makes a number of more than {MAX_INT_BITS} bits")


def _product_size(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
        return 0
    if isinstance(left, int):
        left, right = right, left
    return size_of(left) * max(right, 0) if isinstance(right, int) else 0


def _printf_size(form: str | bytes, values: Any) -> int:
    """At most this many characters are `form % values`."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    widths = sum(int(digits) for digits in re.findall(r"\d{1,4000}", text))
    stars = [values] if isinstance(values, int) else values if isinstance(values, tuple) and "*" in text else []
    widest = max((abs(value) for value in stars if isinstance(value, int)), default=0) if "*" in text else 0
    return len(text) + widths + text.count("%") * (size_of(values) + widest)


def _format_size(form: str, /, *args: Any, **kwargs: Any) -> int:
    """At most this many characters are `form.format(*args, **kwargs)`."""
    widths = sum(int(digits) for digits in re.findall(r"\d{1,4000}", form))
    nested = re.search(r":[^{}]*\{", form) is not None  # a width that is an argument
    values = [*args, *kwargs.values()]
    widest = max((abs(value) for value in values if isinstance(value, int)), default=0) if nested else 0
    return len(form) + widths + form.count("{") * (size_of(values) + widest)


def _length(value: Any) -> int:
    """Of a padding that is given as a number or as text."""
    return max(value, 0) if isinstance(value, int) else size_of(value)


def _padded(text: Any, width: int = 80, *_: Any) -> int:
    return width


def _replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    if isinstance(text, bytes):
        return len(text) + text.count(old) * len(new)
    written = str(text)  # the filter takes anything, as it is written
    return len(written) + written.count(str(old)) * len(str(new))


def _joined(separator: Any, items: list[Any]) -> int:
    return size_of(items) + len(items) * size_of(separator)


def _translated(text: Any, table: Any, *_: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else table
    return len(text) * max(1, *map(size_of, values))


def _expanded(text: Any, tabsize: int = 8) -> int:
    return len(text) + text.count("\t" if isinstance(text, str) else b"\t") * tabsize


def _indented(text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    text = str(text)
    return len(text) + (1 + text.count("\n")) * _length(width)


def _wrapped(text: Any, width: int = 79, break_long_words: bool = True, wrapstring: Any = "\n", *_: Any) -> int:
    return len(str(text)) * (1 + size_of(wrapstring))


def _summed(items: list[Any], attribute: Any = None, start: Any = 0) -> int:
    return size_of(items) * len(items) if isinstance(start, (list, tuple)) else 0


METHOD_SIZES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "to_bytes": lambda number, length=1, *_, **__: length,
    "expandtabs": _expanded,
    "replace": _replaced,
    "join": _joined,
    "translate": _translated,
    "format": _format_size,
    "format_map": lambda form, values: _format_size(form, *values.values()),
}
FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded,
    "replace": _replaced,
    "join": lambda items, d="", attribute=None: _joined(d, items),
    "format": lambda form, /, *args, **kwargs: _printf_size(str(form), kwargs or args),
    "indent": _indented,
    "wordwrap": _wrapped,
    "batch": lambda items, linecount, fill_with=None: 0 if fill_with is None else linecount,
    "slice": lambda items, slices, fill_with=None: 8 * slices,
    "round": lambda number, precision=0, method="common": abs(precision),
    "sum": _summed,
    "striptags": lambda text: len(str(text)) * str(text).count("<!--"),  # it copies the text for each of these
}


def _estimate(table: Mapping[str, Callable[..., int]], name: str, /, *args: Any, **kwargs: Any) -> int:
    try:
        return table[name](*args, **kwargs) if name in table else 0
    except (TypeError, AttributeError):  # not what it takes: the call itself says so
        return 0
