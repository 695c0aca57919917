"""Runs the notebooks from top to bottom, each after those before it, and saves them with what they say.

python notebooks/run.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
# A saved notebook holds no progress bars; a kernel finds the library also where it is not installed.
PATHS = os.pathsep.join(map(str, (HERE.parent, HERE.parent / "kernels")))
ENVIRONMENT = {"TQDM_DISABLE": "1", "PYTHONPATH": PATHS}


def execute(path: Path, folder: str | Path, **values: int) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Args:
        folder: where it runs, and leaves `runs/`.
        values: numbers that its first cell of code sets, to be others.
    Raises:
        nbclient.exceptions.CellExecutionError: naming the cell that raised.
        ValueError: for a value that the cell does not set.
    """
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in values.items():
        first.source, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", first.source)
        if not found:
            raise ValueError(f"{path}: its first cell does not set {name}")
    client = NotebookClient(notebook, record_timing=False, coalesce_streams=True)
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute(env=os.environ | ENVIRONMENT)
    return notebook


def main() -> None:
    with TemporaryDirectory() as folder:
        for path in sorted(HERE.glob("*.ipynb")):
            print(path.name, file=sys.stderr)
            nbformat.write(execute(path, folder), path)


if __name__ == "__main__":
    main()
