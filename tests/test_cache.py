"""The key-value cache: passes over slots of different lengths say what whole passes say, and no more fits than fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.cache import KVCache, PackedPass, StepPass
from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM

CONFIG = Phi2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.3,
)  # fmt: skip
SLOTS, LENGTH = 3, 9


def new_model() -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(CONFIG)
    model.init_weights(seed=1)
    return model.eval()


MODEL = new_model()


def new_cache() -> KVCache:
    cache = KVCache(CONFIG, SLOTS, LENGTH, torch.float32)
    cache.keys += 7.0  # what a slot held before must not be seen
    return cache


def read(cache: KVCache, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    """By slot, the logits (n, V) of new tokens."""
    cached = PackedPass(cache, {slot: len(ids) for slot, ids in tokens.items()})
    logits = MODEL(torch.tensor([sum(tokens.values(), [])]), cached=cached)[0]
    return dict(zip(tokens, logits.split([len(ids) for ids in tokens.values()]), strict=True))


def step(cache: KVCache, tokens: dict[int, int]) -> dict[int, torch.Tensor]:
    """By slot, the logits (1, V) of one new token."""
    cached = StepPass(cache, max(tokens) + 1)
    cached.start(sorted(tokens))
    logits = MODEL(torch.tensor([[tokens.get(row, 0)] for row in range(max(tokens) + 1)]), cached=cached)
    return {slot: logits[slot] for slot in tokens}


@st.composite
def histories(draw):
    """Passes, each a dict of slot to new tokens, that fill no slot beyond its length."""
    room, passes = dict.fromkeys(range(SLOTS), LENGTH), []
    for _ in range(draw(st.integers(1, 5))):
        one_each = draw(st.booleans())
        slots = [s for s in draw(st.permutations(range(SLOTS))) if room[s] and draw(st.booleans())]
        new = {s: draw(st.lists(st.integers(0, 63), min_size=1, max_size=1 if one_each else room[s])) for s in slots}
        for slot, ids in new.items():
            room[slot] -= len(ids)
        if new:
            passes.append((one_each, new))
    return passes


@settings(max_examples=60, deadline=None)
@given(histories())
@torch.no_grad()
def test_any_passes_over_any_slots_say_what_each_row_says_whole(history):
    cache, rows, said = new_cache(), {}, {}
    for one_each, new in history:
        logits = step(cache, {slot: ids[0] for slot, ids in new.items()}) if one_each else read(cache, new)
        for slot, ids in new.items():
            rows[slot] = rows.get(slot, []) + ids
            said.setdefault(slot, []).append(logits[slot])
    for slot, ids in rows.items():
        torch.testing.assert_close(torch.cat(said[slot]), MODEL(torch.tensor([ids]))[0], rtol=1e-4, atol=1e-4)
    assert cache.lengths == [len(rows.get(slot, [])) for slot in range(SLOTS)]


@torch.no_grad()
def test_a_copied_and_a_swapped_slot_go_on_as_the_one_they_came_from():
    cache, prompt = new_cache(), [3, 1, 4, 1, 5]
    read(cache, {0: prompt, 1: [9, 2]})
    cache.copy(0, 2, 3)
    cache.swap(1, 2)
    assert cache.lengths == [5, 3, 2]
    torch.testing.assert_close(step(cache, {1: 6})[1], MODEL(torch.tensor([[3, 1, 4, 6]]))[0, -1:])
    torch.testing.assert_close(step(cache, {2: 6})[2], MODEL(torch.tensor([[9, 2, 6]]))[0, -1:])


def test_tokens_that_do_not_fit_are_refused():
    cache = KVCache(CONFIG, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="a slot of the cache holds 4 tokens, 5 were asked for"):
        PackedPass(cache, {0: 1, 1: 5})
    cache.lengths[1] = 4
    with pytest.raises(ValueError, match="a slot of the cache holds 4 tokens, one more was asked for"):
        StepPass(cache, 2).start([1])


def test_truncating_forgets_and_cannot_invent():
    cache = KVCache(CONFIG, 1, 4, torch.float32)
    cache.lengths[0] = 3
    cache.truncate(0, 1)
    assert cache.lengths == [1]
    with pytest.raises(ValueError, match="cannot truncate a slot of 1 tokens to 2"):
        cache.truncate(0, 2)
