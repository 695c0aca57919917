"""The key-value cache of generation: what attention has already computed, kept in one buffer allocated up front.

`KVCache` counts its tokens on the host and hands out the filled part of its buffers: right for any number of new
tokens. `StepCache` is the same memory for steps of one token a row: it counts on the device and hands out whole
buffers, so that nothing a step launches depends on the host, and a CUDA graph recorded once serves every step.

Dims: B batch, T new tokens, H heads, H_kv key-value heads, S tokens there is room for or filled, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2.config import Phi2Config
from phi2_kernels.rotary import rotary, rotary_and_store
from phi2_kernels.visibility import Visibility


class KVCache:
    """Keys and values of every layer for the tokens seen so far.

    Args:
        config: gives layers, key-value heads and head dim.
        batch_size: rows that are generated together.
        max_length: tokens the buffers hold for each row.

    Attributes:
        keys, values: (layers, B, H_kv, max_length, D).
        length: tokens stored so far, the same for every row.
    """

    def __init__(self, config: Phi2Config, batch_size: int, max_length: int, dtype: torch.dtype, device="cpu") -> None:
        shape = (config.num_hidden_layers, batch_size, config.kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def positions(self, tokens: int) -> Tensor:
        """(1, T), where the next tokens stand when rows have no pads."""
        return torch.arange(self.length, self.length + tokens, device=self.keys.device)[None]

    def visibility(self, tokens: int, until: Tensor | None) -> Visibility:
        """What the next tokens see of the stored ones and themselves.

        Args:
            until: (B, length + tokens) int32, or None.
        """
        return Visibility(tokens, self.length + tokens, until, self.keys.device)

    def apply_rotary_and_store(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotates queries and keys by their angles and stores keys and values behind the stored ones.

        `length` moves only in `advance`, once every layer has stored.

        Args:
            q: (B, T, H, D).
            k, v: (B, T, H_kv, D).
            angles: cosine and sine from `rotary_angles`.
        Returns:
            q (B, T, H, D), and all keys and values, (B, S, H_kv, D).
        Raises:
            ValueError: when the new tokens do not fit.
        """
        end = self.end_of(k.shape[1])
        keys, values = (stored[layer, :, :, :end].transpose(1, 2) for stored in (self.keys, self.values))
        keys[:, self.length :] = rotary(k, *angles)
        values[:, self.length :] = v
        return rotary(q, *angles), keys, values

    def end_of(self, tokens: int) -> int:
        """The length after that many more tokens.

        Raises:
            ValueError: when they do not fit.
        """
        end = self.length + tokens
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were asked for")
        return end

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on.

        Raises:
            ValueError: when fewer tokens than that are stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


class StepCache:
    """The buffers of a `KVCache` for steps of one token a row, without gradient; all that changes is on the device.

    Attributes:
        slots: (B,) int32, where each row's next token goes.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.slots = torch.full((cache.keys.shape[1],), cache.length, dtype=torch.int32, device=cache.keys.device)

    def positions(self, tokens: int) -> Tensor:
        """(B, 1), where the next token stands in rows without pads."""
        return self.slots[:, None]

    def visibility(self, tokens: int, until: Tensor | None) -> Visibility:
        """What the next token of each row sees of the whole buffers.

        Args:
            until: (B, max_length) int32, or None.
        """
        return Visibility(1, self.keys.shape[3], until, self.keys.device, filled=self.slots + 1)

    def apply_rotary_and_store(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `KVCache`, with T = 1 and S = max_length; q is rotated where it lies. A full cache stores nothing."""
        cos, sin = (table.flatten(0, 2) for table in angles)  # (B, R/2)
        rotary_and_store(q[:, 0], k[:, 0], v[:, 0], cos, sin, self.slots, self.keys[layer], self.values[layer])
        return q, self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)

    def advance(self, tokens: int) -> None:
        self.slots += tokens
