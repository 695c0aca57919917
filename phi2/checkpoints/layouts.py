"""The forms in which Phi was published before transformers knew it, told by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

OLDER_LAYOUTS = {  # a part of a tensor's name that no other layout has
    "layers.0.wte.": "mixformer-sequential (September 2023)",
    "transformer.embd.": "phi-msft (December 2023)",
    "transformer.h.": "phi-msft (December 2023)",
    ".self_attn.query_key_value.": "transformers 4.36 (fused query_key_value)",
}


def refuse_older_layouts(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a tensor of another layout than that of transformers from 4.37 on."""
    for name in names:
        for part, layout in OLDER_LAYOUTS.items():
            if part in name:
                raise ValueError(f"{folder}: {name} is of the older layout {layout}, which is not read yet")
