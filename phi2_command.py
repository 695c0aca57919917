"""The `phi2` command, outside the package: so Ctrl-C is heard while the package is imported, and torch with it."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # 128 and the number of SIGINT


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        from phi2.cli.commands import main

        return main()
    except KeyboardInterrupt:
        print("phi2: interrupted", file=sys.stderr)
        return INTERRUPTED
