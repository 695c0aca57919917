"""The key-value cache: what is stored comes back, and no more than fits."""

from __future__ import annotations

import pytest
import torch

from phi2.cache import KVCache
from phi2.config import Phi2Config

CONFIG = Phi2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)

UNTURNED = torch.ones(1, 5, 1, 4), torch.zeros(1, 5, 1, 4)  # angles of zero


def test_stored_keys_and_values_come_back_behind_the_earlier_ones():
    cache, (q, k, v) = KVCache(CONFIG, 1, 5, torch.float32), torch.randn(3, 1, 2, 5, 16)
    for start, end in ((0, 3), (3, 5)):
        for layer in range(2):
            new = (x[:, :, start:end].transpose(1, 2) for x in (q, k + layer, v))
            _, keys, values = cache.apply_rotary_and_store(layer, *new, tuple(x[:, start:end] for x in UNTURNED))
        cache.advance(end - start)
    assert torch.equal(keys.transpose(1, 2), k + 1) and torch.equal(values.transpose(1, 2), v)


def test_tokens_that_do_not_fit_are_refused():
    cache = KVCache(CONFIG, 1, 4, torch.float32)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 were asked for"):
        cache.apply_rotary_and_store(0, *torch.zeros(3, 1, 5, 2, 16), UNTURNED)


def test_truncating_forgets_and_cannot_invent():
    cache = KVCache(CONFIG, 1, 4, torch.float32)
    cache.advance(3)
    cache.truncate(1)
    assert cache.length == 1
    with pytest.raises(ValueError, match="cannot truncate a cache of 1 tokens to 2"):
        cache.truncate(2)
