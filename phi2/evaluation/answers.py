"""What a model has answered, in a file that grows by a line for each answer: a killed evaluation goes on from there.

An answer is named by the model, the kind of request and the request itself, so that the file may hold those of several
models, and a model that was trained further finds none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from phi2.files import write_whole
from phi2.runs.log import whole_lines


class Answers:
    """The answers of one model in a file of JSON lines.

    Args:
        path: the file; a line that a kill left unfinished is dropped.
        fingerprint: of the model, the tokenizer and whatever else an answer depends on beside the request.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        lines = whole_lines(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(f"{line}\n" for line in lines))
        self._known = {entry["request"]: entry["answer"] for entry in map(json.loads, lines)}
        self._fingerprint, self._file = fingerprint, path.open("a", encoding="utf-8")

    def get(self, kind: str, args: Sequence[Any]) -> Any:
        """The answer to a request, None when there is none yet. One that is drawn is drawn anew each time."""
        return None if _is_drawn(args) else self._known.get(self._name(kind, args))

    def add(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        if not _is_drawn(args):
            name = self._name(kind, args)
            self._known[name] = answer
            self._file.write(json.dumps({"request": name, "answer": answer}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _name(self, kind: str, args: Sequence[Any]) -> str:
        said = json.dumps([self._fingerprint, kind, *args], sort_keys=True)
        return sha256(said.encode()).hexdigest()


def _is_drawn(args: Sequence[Any]) -> bool:
    return isinstance(args[-1], dict) and bool(args[-1].get("do_sample"))
