"""How a kernel is launched: Triton finds its compiled form, or the caller knows it from an earlier launch.

Triton looks at every argument of every launch, at types and at which addresses and numbers 16 divides, to find the form
that was compiled for such arguments. The host takes longer for that than for all else of a launch. A caller whose next
arguments are like the last ones in all of this remembers the form, under a name for the place it launches from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Known = dict[Any, tuple[Any, tuple[Any, ...]]]  # by place: a compiled form, and the constants that it was made with


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
    known: Known | None = None,
    place: Any = "",
) -> None:
    """Launches a kernel.

    Args:
        arguments: all that are no constants, in their order.
        constants: gives the others and the options by name; asked only where the form is not known.
        known: forms of earlier launches, to which this one is added; None: Triton looks. Tables of launch
            configurations must not change while a form is known: grids follow them, and forms do not.
        place: tells the launches of `known` apart.
    """
    if known is not None and place in known:
        form, rest = known[place]
        form[grid](*arguments, *rest)
        return
    given = constants()
    form = kernel[grid](*arguments, **given)
    if known is not None and form is not None:  # the interpreter compiles nothing
        known[place] = form, tuple(given[name] for name in kernel.arg_names[len(arguments) :])
