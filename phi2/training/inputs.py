"""A resumed run must see what it began with: digests of its rows and of its frozen weights, kept in inputs.json.

A data file that grew by a line would silently give another order of rows; another base under the same name, other
gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from phi2.data.encode import Encoded
from phi2.model import Phi2ForCausalLM
from phi2.training.run import write_whole

SAMPLED = 1024  # numbers of each weight that the digest reads: a whole Phi-2 would take half a minute


def require_same_inputs(run: Path, rows: Sequence[Encoded], model: Phi2ForCausalLM, resumed: bool) -> None:
    """Writes down what a run begins with; when it is resumed, compares.

    Raises:
        ValueError: naming what has changed since.
    """
    path, now = run / "inputs.json", {"data": digest_of_rows(rows), "base model": digest_of_frozen(model)}
    before = json.loads(path.read_text()) if resumed and path.exists() else now
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"{run}: the {' and the '.join(changed)} changed since this run began; it cannot be resumed")
    write_whole(path, json.dumps(now, indent=1))


def digest_of_rows(rows: Sequence[Encoded]) -> str:
    """Of the token ids and masks of every row, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for value in (getattr(row, field.name) for field in fields(row)):
            if isinstance(value, np.ndarray):
                digest.update(len(value).to_bytes(8, "little") + value.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def digest_of_frozen(model: Phi2ForCausalLM) -> str:
    """Of the weights that do not train: their names and shapes, and evenly spaced numbers of each."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
