"""The source of a loss: what is compared when a run goes on, so that it goes on with the loss it began with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

FOREIGN = {*sys.stdlib_module_names, "torch", "numpy"}  # packages whose functions are not part of a loss


def source_of_loss(function: Callable, loss_file: str | Path | None = None) -> str | None:
    """The text of a loss, of every function and constant that it names, and of the file it is in if that is the user's.

    None where Python does not know it, as for a loss that was typed at its prompt.
    """
    file = [] if loss_file is None else [Path(loss_file).read_text(encoding="utf-8")]
    try:
        return "\0".join([*file, *_texts(function, set())])
    except (OSError, TypeError):
        return None


def _texts(function: Callable, seen: set[int]) -> Iterator[str]:
    """The source of a function, and of those that it calls by name, each once, with the constants they use."""
    seen.add(id(function))
    yield inspect.getsource(function)
    for name, value in _named_values(inspect.unwrap(function)):
        if isinstance(value, int | float | str):
            yield f"{name} = {value!r}"
        elif isinstance(value, FunctionType) and id(value) not in seen:
            if value.__module__.partition(".")[0] not in FOREIGN:
                yield from _texts(value, seen)


def _named_values(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Globals and variables of enclosing functions that a function's code names."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    values = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
    yield from ((name, values[name]) for name in dict.fromkeys(_names(code)) if name in values)


def _names(code: CodeType) -> Iterator[str]:
    """Names that the code looks up, within the functions it defines too."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
