"""From a command line to the call it asks for.

Flags, their help and their checks come from the signature and docstring of a command's function, or from the fields of
its config class.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from phi2.files import read_yaml
from phi2.keywords import plain


class UsageError(Exception):
    """The command line does not say something that can be run."""


def parse(
    command: str,
    about: str,
    run: Callable[..., None],
    config: type | None,
    arguments: list[str],
    choices: Mapping[str, str] = {},
) -> Callable[[], None]:
    """The call that a command line asks for.

    Args:
        command: what stands before the flags.
        about: what --help says first.
        run: takes its flags as arguments, or one object of the class `config`.
        config: whose fields are the flags.
        arguments: the flags.
        choices: by flag, what its help says besides.

    Raises:
        UsageError: one line saying what is wrong.
        SystemExit: after --help and --print_config.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=command, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of flags; flags given beside it win.")
    if config is None:
        parser.add_function_arguments(run, as_group=False)
    else:
        parser.add_class_arguments(config, as_group=False)
    for action in parser._actions:
        if action.dest in choices:
            action.help = f"{action.help} {choices[action.dest]}"
    try:
        for path in config_files(arguments):
            require_names(read_yaml(path), path, [action.dest for action in parser._actions])
        given = with_lists(with_switches(arguments, config or run), config or run)
        parsed = parser.instantiate(parser.parse_args(given))
        values = {key: value for key, value in vars(parsed).items() if key != "config"}
        return partial(run, **values) if config is None else partial(run, config(**values))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UsageError(plain(str(error))) from error


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Those that are there; of one that is not, the parser tells."""
    behind = [*arguments, ""][1:]
    pairs = zip(arguments, behind, strict=True)
    named = [
        argument.removeprefix("--config=") if argument.startswith("--config=") else following
        for argument, following in pairs
        if argument == "--config" or argument.startswith("--config=")
    ]
    return [path for path in map(Path, named) if path.is_file()]


def require_names(settings: Mapping[str, Any], path: Path, known: Sequence[str]) -> None:
    """Refuses a key that is no flag, with the file and the nearest flag. The parser tells of deeper ones."""
    for key in map(str, settings):
        name = key.partition(".")[0]
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: Option {key!r} is not accepted{hint}")


def with_switches(arguments: list[str], signature: Callable[..., Any]) -> list[str]:
    """Makes `--resume=true` of a `--resume` behind which no value stands."""
    switches = {f"--{name}" for name in _switches(signature)}
    behind = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in switches and following.startswith("--") else argument
        for argument, following in zip(arguments, behind, strict=True)
    ]


def _switches(signature: Any) -> Iterator[str]:
    """Names of what is true or false, in its groups too."""
    for name, hint in get_type_hints(signature).items():
        if hint is bool or bool in get_args(hint):
            yield name
        for group in filter(is_dataclass, get_args(hint)):
            yield from (f"{name}.{inner}" for inner in _switches(group))


def with_lists(arguments: list[str], signature: Callable[..., Any]) -> list[str]:
    """Makes one `--stop=["A", "B"]`, which is how the parser takes a list, of `--stop A --stop B`."""
    flags = {f"--{name}" for name, hint in get_type_hints(signature).items() if _takes_a_list(hint)}
    others, left = [], iter(arguments)
    lists: defaultdict[str, list[str]] = defaultdict(list)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag not in flags:
            others.append(argument)
        elif equals or (value := next(left, None)) is not None:
            lists[flag] += _elements(value)
        else:
            others.append(argument)  # without its value: the parser says so
    return [*others, *(f"{flag}={json.dumps(values)}" for flag, values in lists.items())]


def _takes_a_list(hint: Any) -> bool:
    """A list of texts; not `data`, where one text may name several sources."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return any(get_origin(kind) in (list, Sequence) and get_args(kind) == (str,) for kind in kinds)


def _elements(value: str) -> list[Any]:
    """A list that is written as one, in JSON or YAML; any other text is its own only element."""
    try:
        elements = yaml.safe_load(value) if value.startswith("[") else None
    except yaml.YAMLError:
        elements = None
    return elements if isinstance(elements, list) else [value]
