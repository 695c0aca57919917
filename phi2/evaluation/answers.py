"""What a model has answered, in files that grow by a line for each answer: a killed evaluation goes on from there.

An answer is named by the model, the kind of request and the request itself. So one folder holds those of several
models, a model that was trained further finds none, and with another number of processes all are found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from phi2.checkpoints.same_base import digest_of_weights
from phi2.files import write_whole
from phi2.model import Phi2ForCausalLM
from phi2.runs.log import whole_lines
from phi2.tokenizer import Tokenizer


def fingerprint(model: Phi2ForCausalLM, tokenizer: Tokenizer) -> str:
    """Of all that an answer depends on beside the request."""
    said = [digest_of_weights(model), repr(model.config), tokenizer.backend.to_str(), repr(sorted(tokenizer.stop_ids))]
    return sha256("\0".join(said).encode()).hexdigest()


class Answers:
    """The answers of one model.

    Args:
        folder: of the files; each process writes its own and reads all. A line that a kill left unfinished is dropped.
        fingerprint: of the model.
        rank: of this process.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = {path: whole_lines(path) for path in sorted(folder.glob("*.jsonl"))}
        entries = [json.loads(line) for of_one in lines.values() for line in of_one]
        self._known = {entry["request"]: entry["answer"] for entry in entries}
        own = folder / f"{rank}.jsonl"
        if own in lines and not own.read_bytes().endswith(b"\n"):
            write_whole(own, "".join(f"{line}\n" for line in lines[own]))
        self._fingerprint, self._file = fingerprint, own.open("a", encoding="utf-8")

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
