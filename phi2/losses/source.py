"""The source of a loss, or of another function of the user's: the file that is run, and the text of what it names.

The text is what is compared when a run goes on, so that it goes on with the function it began with.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

PACKAGE = str(Path(__file__).parents[1])
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy"}  # packages that are not part of a loss


def require_source_file(path: str | Path, flag: str) -> None:
    """Raises FileNotFoundError unless there is such a file; `flag` is what names it on the command line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")


def run_source_file(path: str | Path, flag: str) -> dict[str, Any]:
    """Runs a Python file of the user's and returns the names it defines.

    Raises:
        ValueError: when it cannot be run.
    """
    names = {"__name__": Path(path).stem, "__file__": str(path)}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True), names)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"{flag} {path}{place_of(error, str(path))}: {type(error).__name__}: {error}") from error
    return names


def call(function: Callable[..., Any], *given: Any, **knobs: Any) -> Any:
    """What a function of the user's returns.

    Raises:
        ValueError: with its file and line, for what the user's code raises. What this package refuses, and a want of
            memory, are raised as they are.
    """
    try:
        return function(*given, **knobs)
    except Exception as error:
        inmost = traceback.extract_tb(error.__traceback__)[-1].filename
        is_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in str(error)
        if is_memory or inmost.startswith(PACKAGE):
            raise
        file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
        name = f"{file}{place_of(error, file)}, in {function.__name__}"
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error


def place_of(error: BaseException, file: str) -> str:
    """The line of a file that an error comes from, ` line 3`; nothing where it never was there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" line {lines[-1]}" if lines else ""


def source_of_loss(function: Callable, loss_file: str | Path | None = None) -> str | None:
    """The text of a loss, of what it names, and of the file it is in if that is the user's.

    Named are functions, as far as they name others, numbers and texts, and the user's own modules. None where Python
    does not know the source, as for a loss that was typed at its prompt.
    """
    code = getattr(function, "__code__", None)  # of the function itself, whatever it wraps
    is_own = code is not None and code.co_filename.startswith(PACKAGE)  # the file changes none of this package's
    file = [] if loss_file is None or is_own else [Path(loss_file).read_text(encoding="utf-8")]
    try:
        return "\0".join([*file, *_texts(function, set())])
    except (OSError, TypeError):
        return None


def _texts(source: Callable | ModuleType, seen: set[int]) -> Iterator[str]:
    """The text of a function or module, and of what a function names, each once."""
    seen.add(id(source))
    yield inspect.getsource(source)
    for name, value in _named_values(inspect.unwrap(source) if callable(source) else source):
        if isinstance(value, int | float | str):
            yield f"{name} = {value!r}"
        elif id(value) not in seen and _is_part(value):
            yield from _texts(value, seen)


def _is_part(value: Any) -> bool:
    """Whether a loss that names this value changes with it."""
    if isinstance(value, FunctionType):
        return (value.__module__ or "").partition(".")[0] not in FOREIGN
    if isinstance(value, ModuleType):
        installed = "site-packages" in Path(getattr(value, "__file__", None) or "").parts
        return not installed and value.__name__.partition(".")[0] not in {*FOREIGN, "phi2"}
    return False


def _named_values(source: Any) -> Iterator[tuple[str, Any]]:
    """Globals and variables of enclosing functions that a function's code names."""
    if not isinstance(source, FunctionType):
        return
    cells = zip(source.__code__.co_freevars, source.__closure__ or (), strict=True)
    values = source.__globals__ | {name: cell.cell_contents for name, cell in cells}
    yield from ((name, values[name]) for name in dict.fromkeys(_names(source.__code__)) if name in values)


def _names(code: CodeType) -> Iterator[str]:
    """Names that the code looks up, within the functions it defines too."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
