"""The key-value cache of generation: slots, each of which holds the tokens of one row and has a length of its own.

A pass adds tokens to some of the slots and attends to what they hold. There are two kinds. `PackedPass` takes any
number of tokens of any slots, one slot behind another in a single row without pads: prompts, parts of prompts, drafts.
`StepPass` takes one token of each of the first slots, a batch row each; what changes from step to step lies in device
memory, so that a CUDA graph recorded once serves every step.

Dims: B rows of a step, N tokens of a packed pass, H heads, H_kv key-value heads, S tokens a slot has room for,
D head dim, R rotary dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from phi2.config import Phi2Config
from phi2_kernels.attention import attention
from phi2_kernels.decode_attention import decode_attention
from phi2_kernels.rotary import rotary_and_store
from phi2_kernels.visibility import Visibility


class KVCache:
    """Keys and values of every layer, for the tokens that each slot has seen so far.

    Args:
        config: gives layers, key-value heads and head dim.
        slots: rows that can be held side by side.
        max_length: S.

    Attributes:
        keys, values: (layers, slots, H_kv, S + 1, D); what stands in the last place is never read.
        lengths: tokens stored in each slot.
    """

    def __init__(self, config: Phi2Config, slots: int, max_length: int, dtype: torch.dtype, device="cpu") -> None:
        shape = (config.num_hidden_layers, slots, config.kv_heads, max_length + 1, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots

    @property
    def max_length(self) -> int:
        return self.keys.shape[3] - 1

    def truncate(self, slot: int, length: int) -> None:
        """Forgets every token of a slot from position `length` on.

        Raises:
            ValueError: when it holds fewer tokens than that.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"cannot truncate a slot of {self.lengths[slot]} tokens to {length}")
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes a slot hold the first `length` tokens of another, and nothing else."""
        assert length <= self.lengths[source]
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :length] = buffer[:, source, :, :length]
        self.lengths[target] = length

    def clear_ends(self) -> None:
        """Empties every slot behind its tokens, where a pass that failed may have left what is no number."""
        for slot, length in enumerate(self.lengths):
            self.keys[:, slot, :, length:], self.values[:, slot, :, length:] = 0, 0

    def swap(self, one: int, other: int) -> None:
        """Exchanges what two slots hold."""
        length = max(self.lengths[one], self.lengths[other])
        for buffer in (self.keys, self.values):
            buffer[:, [one, other], :, :length] = buffer[:, [other, one], :, :length]
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]


class PackedPass:
    """New tokens of some slots, (1, N): all those of one slot, then all those of the next.

    Args:
        cache: it counts the tokens once a model has passed over them.
        counts: by slot, how many tokens it gets, at least one each; the row has them in this order.

    Attributes:
        positions: (1, N), where each token stands in its slot.
        last: (slots of the pass,), the place in the row of each slot's last token.

    Raises:
        ValueError: when the new tokens do not fit.
    """

    def __init__(self, cache: KVCache, counts: Mapping[int, int]) -> None:
        slots, each = list(counts), list(counts.values())
        starts = [cache.lengths[slot] for slot in slots]
        self._ends = [start + n for start, n in zip(starts, each, strict=True)]
        if (longest := max(self._ends)) > cache.max_length:
            raise ValueError(f"a slot of the cache holds {cache.max_length} tokens, {longest} were asked for")
        device, behind = cache.keys.device, list(accumulate(each))  # where the next slot's tokens begin in the row
        self.cache, self._numbers, self._each = cache, slots, each
        spans = [torch.arange(start, end) for start, end in zip(starts, self._ends, strict=True)]
        self.positions = torch.cat(spans)[None].to(device)
        self.last = torch.tensor(behind, device=device) - 1
        self._slots = torch.tensor(slots).repeat_interleave(torch.tensor(each)).to(device)  # (N,)
        self._whole: Visibility | None = None  # of a pass in which every slot begins
        self._parts: list[Visibility] = []  # of any other, one a slot
        if any(starts):
            self._parts = [Visibility(n, end, None, device) for n, end in zip(each, self._ends, strict=True)]
        else:
            until = torch.tensor(behind).repeat_interleave(torch.tensor(each))[None].int().to(device)
            self._whole = Visibility(behind[-1], behind[-1], until if len(slots) > 1 else None, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores keys and values, and lets every query see its slot up to itself.

        Args:
            q: (1, N, H, D), rotated.
            k, v: (1, N, H_kv, D), k rotated.
        Returns:
            (1, N, H, D).
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, H_kv, S + 1, D)
        keys[self._slots, :, self.positions[0]], values[self._slots, :, self.positions[0]] = k[0], v[0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self._whole is not None:
            return attention(q, k, v, self._whole).transpose(1, 2)
        parts = zip(q.split(self._each, dim=2), self._numbers, self._ends, self._parts, strict=True)
        attended = [
            attention(own, keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end], visibility)
            for own, slot, end, visibility in parts
        ]
        return torch.cat(attended, dim=2).transpose(1, 2)

    def finish(self) -> None:
        """Every layer has stored its part: the cache counts the new tokens."""
        for slot, end in zip(self._numbers, self._ends, strict=True):
            self.cache.lengths[slot] = end


class StepPass:
    """One more token of each of the first B slots, (B, 1), without gradient.

    A row that is not active computes what nobody reads: it writes to the spare place of its slot and sees one key.

    Args:
        cache: as in `PackedPass`.
        rows: B.
        length: tokens of a slot that are looked at, where the host knows that no active one holds more.
        at: (2, B) int32, `slots` and `filled` in memory that others write to: nobody calls `start` then, nor `finish`.

    Attributes:
        slots: (B,) int32, where in its slot each row's token goes.
        filled: (B,) int32, how many keys each row sees, its own among them.
    """

    def __init__(self, cache: KVCache, rows: int, length: int | None = None, at: Tensor | None = None) -> None:
        self.cache, self.rows, self.length = cache, rows, length
        self.keys, self.values = cache.keys[:, :rows], cache.values[:, :rows]
        device = cache.keys.device
        self.slots, self.filled = torch.zeros((2, rows), dtype=torch.int32, device=device) if at is None else at
        self._rows = torch.arange(rows, dtype=torch.int32, device=device)
        self._active: list[int] = []
        self._all_filled = False

    @property
    def positions(self) -> Tensor:
        """(B, 1)."""
        return self.slots[:, None]

    def start(self, active: Sequence[int]) -> None:
        """Reads where the slots stand now; `active` are the rows whose tokens count.

        Raises:
            ValueError: when a slot is full.
        """
        lengths, spare = self.cache.lengths, self.cache.max_length
        if any(lengths[row] >= spare for row in active):
            raise ValueError(f"a slot of the cache holds {spare} tokens, one more was asked for")
        self._active, slots, filled = list(active), [spare] * self.rows, [1] * self.rows
        for row in active:
            slots[row], filled[row] = lengths[row], lengths[row] + 1
        self.slots.copy_(torch.tensor(slots))
        self.filled.copy_(torch.tensor(filled))
        self._all_filled = all(n == self.length for n in filled)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `PackedPass`, with q (B, 1, H, D) and k, v (B, 1, H_kv, D)."""
        places = self._rows, slice(None), self.slots
        self.keys[layer][places], self.values[layer][places] = k[:, 0], v[:, 0]
        return self._attend(layer, q)

    def rotate_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """`attend` with q and k that are not rotated yet: q is rotated where it lies, and nothing is written twice."""
        cos, sin = (table.flatten(0, 2) for table in angles)  # (B, R/2)
        rotary_and_store(q[:, 0], k[:, 0], v[:, 0], cos, sin, self.slots, self.keys[layer], self.values[layer])
        return self._attend(layer, q)

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        keys, values = (buffer[layer, :, :, : self.length] for buffer in (self.keys, self.values))
        filled = None if self._all_filled else self.filled
        return decode_attention(q.transpose(1, 2), keys, values, filled).transpose(1, 2)

    def finish(self) -> None:
        for row in self._active:
            self.cache.lengths[row] += 1


CachedPass = PackedPass | StepPass
