"""The key-value cache of generation: what attention has already computed, kept in one buffer allocated up front."""

from __future__ import annotations

import torch
from torch import Tensor

from phi2.config import Phi2Config


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
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values behind the stored ones and returns all of them, (B, H_kv, S, D).

        `length` moves only in `advance`, once every layer has stored.

        Raises:
            ValueError: when the new tokens do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were asked for")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

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
