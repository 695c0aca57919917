"""Settings that come as keyword arguments: checked as the command line checks its flags, and explained to whoever asks.

The checks are jsonargparse's; what it says about a mistake is cut down to the one line a user needs.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from textwrap import dedent, fill
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TRIED = re.compile(  # lines of the parser's account of every type it tried
    r"Does not validate|Subtypes:|Errors:|Given value type:|Given value: Neste|Problem with given|.*<class 'NoneType'>"
)
KEY = re.compile(r'Parser key "([^"]+)": ?')
WORDING = {
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
    r"Expected a dot import path string: [^;]*": "expected null or a mapping of settings",
    r"Expected a ": "expected ",
    r"/--\w+\+": "",  # the parser's second name of a flag that takes a list
    r"[.;] (?:Got|Given) value: ": ", got ",
    r"Option 'add_chatml' is not accepted|unrecognized arguments: --add_chatml.*": "add_chatml is now chat_template, in"
    " phi2 sft and inspect: auto, chatml, none or the path of a .jinja file",
}

Config = TypeVar("Config", bound="DataclassInstance")
Function = TypeVar("Function", bound=Callable[..., Any])


def config_of(kind: type[Config], settings: Mapping[str, Any], as_given: Collection[str] = ()) -> Config:
    """A config of these settings; arguments and errors are those of `checked`, and none may be missing."""
    values = checked(kind, settings, as_given)
    missing = [field.name for field in fields(kind) if _is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    return kind(**values)


def checked(
    kind: type[DataclassInstance], settings: Mapping[str, Any], as_given: Collection[str] = ()
) -> dict[str, Any]:
    """Values of the types that the fields of a config class have: a group may be a dict, a path a `Path` or a `Run`.

    Args:
        as_given: settings that are taken as they are; what can be read only once becomes a list.
    Raises:
        ValueError: for a name that is no field, with the nearest one, and for a value of another type.
    """
    known = _known(kind, settings)
    others = {name: deepcopy(_plain(value)) for name, value in settings.items() if name not in as_given}
    given = {name: list(value) for name, value in settings.items() if name in as_given and isinstance(value, Iterator)}
    return {**settings, **given, **_parsed(kind, others, set(known) - set(others))}


def made_of(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """A config that checks its values itself: the names are checked here, and numbers of numpy are taken.

    Raises:
        ValueError: for a name that is no field, and whatever the config refuses.
    """
    _known(kind, settings)
    return kind(**{name: plain_number(value) for name, value in settings.items()})


def _known(kind: type[DataclassInstance], settings: Mapping[str, Any]) -> list[str]:
    """The names of all fields; a setting that is none of them is refused with the nearest one."""
    known = [field.name for field in fields(kind)]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"there is no setting {name!r}; {hint}")
    return known


def _plain(value: Any) -> Any:
    """Paths as text, and numbers of numpy as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else plain_number(value)


def plain_number(value: Any) -> Any:
    """A number, or truth, of numpy as one of Python's; whatever else as it is."""
    if isinstance(value, int | float | str):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _parsed(kind: type[DataclassInstance], values: dict[str, Any], others: set[str]) -> dict[str, Any]:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False, skip=others)
    try:
        return vars(parser.instantiate(parser.parse_object(values)))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(plain(str(error))) from error


def explained(kind: type[DataclassInstance]) -> Callable[[Function], Function]:
    """Gives a function whose last parameter is `**settings` the fields of a config class: in its signature, which
    completes names in a notebook, and in its docstring, behind its own text.
    """

    def explain(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [p for p in _parameters(kind) if p.name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*own, *others])  # type: ignore[attr-defined]
        texts = help_of(kind)
        told = (f"    {p.name}: {texts[p.name]}" for p in others)
        lines = [fill(text, 100, subsequent_indent=" " * 8) for text in told]
        function.__doc__ = "\n".join([f"{inspect.getdoc(function)}\n\nSettings:", *lines])
        return function

    return explain


def help_of(kind: type[DataclassInstance]) -> dict[str, str]:
    """What stands below each field of a dataclass and of those it is made of."""
    texts: dict[str, str] = {}
    for part in (part for part in reversed(kind.__mro__) if part is not object):
        (definition,) = ast.parse(dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts


def _parameters(kind: type[DataclassInstance]) -> list[inspect.Parameter]:
    hints, keyword = get_type_hints(kind), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, keyword, default=_default(field), annotation=hints[field.name])
        for field in fields(kind)
    ]


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if _is_required(field) else field.default


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def plain(message: str) -> str:
    """The parser's message in one line: which flag, what it takes, what it got."""
    keys, reasons = [], []
    for line in (line.strip(" -") for line in message.splitlines()):
        if TRIED.match(line):
            continue
        if key := KEY.match(line):
            keys.append(key[1])
        reasons.append(KEY.sub("", line))
    text = "; ".join(filter(None, dict.fromkeys(reasons)))
    for pattern, replacement in WORDING.items():
        text = re.sub(pattern, replacement, text)
    text = ", got ".join(text.split(", got ")[:2])  # the value of the innermost key
    return f"{'.'.join(keys)}: {text}" if keys else text
