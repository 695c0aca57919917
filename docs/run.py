"""Runs the Python of a page from top to bottom, and writes what each block prints into the block below it.

python docs/run.py docs/python.md
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

BLOCK = re.compile(r"```python\n(.*?)```\n(?:(```\n).*?(```\n))?", re.DOTALL)


def executed(page: str) -> str:
    """The page with its outputs; a block without one below it keeps what it prints to itself. All share their names."""
    names: dict[str, object] = {"__name__": "__main__"}

    def run(block: re.Match[str]) -> str:
        with redirect_stdout(StringIO()) as said:
            exec(compile(block[1], "page", "exec"), names)
        shown = f"{block[2]}{said.getvalue()}{block[3]}" if block[2] else ""
        return f"```python\n{block[1]}```\n{shown}"

    return BLOCK.sub(run, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(executed(path.read_text(encoding="utf-8")), encoding="utf-8")
