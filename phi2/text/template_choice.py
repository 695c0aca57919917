"""Which chat template the setting `chat_template` of a run asks for: auto, chatml, none or a .jinja file."""

from __future__ import annotations

import re
from pathlib import Path

from phi2.text.tokenizer_files import read_text

TEMPLATE_CHOICES = ("auto", "chatml", "none")
LOOKS_SPECIAL = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?s>")


def require_template_choice(choice: str) -> None:
    """Raises ValueError unless `choice` may stand after `chat_template`."""
    if choice not in TEMPLATE_CHOICES and not choice.endswith(".jinja"):
        raise ValueError(f"chat_template must be auto, chatml, none or the path of a .jinja file, got {choice!r}")


def read_template_file(path: Path) -> tuple[str, list[str]]:
    """The template in a file, and what it writes that looks like a special token.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no template, or an empty one.
    """
    from phi2.text import template  # jinja2 is loaded for those who render

    source = read_text(path)
    if not source.strip():
        raise ValueError(f"{path}: an empty chat template")
    try:
        return source, sorted(set(LOOKS_SPECIAL.findall(template.literals(source))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
