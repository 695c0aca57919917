"""One row without padding says what separate rows say: its tensors by brute force, and the model's answers to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phi2.config import Phi2Config
from phi2.data.encode import EncodedPreference, EncodedSequence
from phi2.data.records import PAIR, Origin
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, best_fit, row_of_answers, row_of_sequences, wrapped

VOCABULARY = 50
ORIGIN = Origin("rows.jsonl", 1)
token_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


def array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


@st.composite
def sequences(draw) -> EncodedSequence:
    ids = draw(token_ids.filter(len))
    mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return EncodedSequence(array(ids), np.array(mask, dtype=bool), ORIGIN)


@st.composite
def pairs(draw) -> EncodedPreference:
    prompt, chosen, rejected = draw(token_ids.filter(len)), draw(token_ids), draw(token_ids)
    return EncodedPreference(array(prompt), (array(chosen), array(rejected)), PAIR, ORIGIN, {})


def seen(row: TokenRow) -> set[tuple[int, int]]:
    """Every (query, key) that attention connects."""
    until = row.visible_until[0].tolist()
    return {(i, j) for j in range(len(until)) for i in range(j, until[j])}


# ---- the tensors of a row ----


@given(st.lists(sequences(), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_row_of_sequences_is_its_sequences_one_behind_the_other(batch):
    row, start = row_of_sequences(batch), 0
    ids, positions, targets, connected = [], [], [], set()
    for sequence in batch:
        end = start + len(sequence.ids)
        ids += sequence.ids.tolist()
        positions += range(len(sequence.ids))
        targets += [(start + i - 1, sequence.ids[i]) for i in range(1, len(sequence.ids)) if sequence.mask[i]]
        connected |= {(i, j) for i in range(start, end) for j in range(start, i + 1)}
        start = end
    assert row.input_ids[0].tolist() == ids
    assert row.positions[0].tolist() == positions
    assert list(zip(row.logits_indices.tolist(), row.targets.tolist(), strict=True)) == targets
    assert seen(row) == connected


@given(st.lists(pairs(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_row_of_answers_is_both_sequences_of_every_pair_with_one_prompt(batch):
    row, start = row_of_answers(batch), 0
    ids, positions, targets, connected = [], [], [], set()
    for pair in batch:
        prompt = list(range(start, start + len(pair.prompt)))  # places in the row
        ids += [*pair.prompt, *pair.chosen, *pair.rejected]
        positions += range(len(pair.prompt))
        start += len(prompt)
        for answer in (pair.chosen, pair.rejected):
            alone = prompt + list(range(start, start + len(answer)))  # prompt and this answer as if nothing else were
            positions += range(len(prompt), len(alone))
            targets += [(alone[len(prompt) + k - 1], token) for k, token in enumerate(answer)]
            connected |= {(query, key) for place, query in enumerate(alone) for key in alone[: place + 1]}
            start += len(answer)
    assert row.input_ids[0].tolist() == ids
    assert row.positions[0].tolist() == positions
    assert list(zip(row.logits_indices.tolist(), row.targets.tolist(), strict=True)) == targets
    assert seen(row) == connected


def test_the_tensors_have_the_types_the_model_takes():
    row = row_of_answers([EncodedPreference(array([1]), (array([2]), array([3])), PAIR, ORIGIN, {})])
    assert (row.input_ids.dtype, row.positions.dtype, row.visible_until.dtype) == (torch.long, torch.long, torch.int32)
    assert row.input_ids.shape == row.positions.shape == row.visible_until.shape == (1, 3)
    moved = row.to(torch.device("meta"))
    assert {x.device.type for x in vars(moved).values()} == {"meta"}


# ---- which sequences share a block ----


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_best_fit_puts_every_sequence_into_one_block_that_holds_it(lengths, capacity):
    blocks = best_fit(lengths, capacity)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in block) <= capacity for block in blocks)


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_best_fit_chooses_the_fullest_block_with_room(lengths, capacity):
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + length <= capacity]
        if fitting:
            loads.remove(max(fitting))
        loads.append(length + max(fitting, default=0))
    assert sorted(sum(lengths[i] for i in block) for block in best_fit(lengths, capacity)) == sorted(loads)


def test_among_equally_full_blocks_best_fit_takes_the_one_that_came_to_it_first():
    assert best_fit([4, 5, 3, 3, 2, 2], 7) == [[1, 4], [0, 2], [3, 5]]  # 2 fits behind 5 exactly; the other 2 behind 3
    assert best_fit([6, 6, 2], 8) == [[0, 2], [1]]


def test_best_fit_refuses_a_sequence_longer_than_a_block():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a block of 8"):
        best_fit([3, 9, 8], 8)


@given(st.lists(sequences(), min_size=1, max_size=6), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_wrapped_blocks_are_the_joined_tokens_cut_at_every_length(batch, length):
    joined = [pair for s in batch for pair in [*zip(s.ids.tolist(), s.mask.tolist(), strict=True), (99, True)]]
    cut = [joined[i : i + length] for i in range(0, len(joined), length)]
    expected = [block for block in cut if len(block) == length and any(target for _, target in block[1:])]
    if not expected:
        with pytest.raises(ValueError, match=f"{len(joined)} tokens do not fill one block of {length} with something"):
            wrapped(batch, length, separator=99)
        return
    blocks = wrapped(batch, length, separator=99)
    assert [list(zip(b.ids.tolist(), b.mask.tolist(), strict=True)) for b in blocks] == expected


def test_a_wrapped_sequence_that_ends_in_the_separator_gets_no_second_one():
    ended = EncodedSequence(np.array([5, 6, 9], np.int32), np.array([True] * 3), ORIGIN)
    (block,) = wrapped([ended, ended], 6, separator=9)
    assert block.ids.tolist() == [5, 6, 9, 5, 6, 9]


def test_a_wrapped_block_without_a_target_is_left_out():
    """A batch of such blocks would have no loss: 0 / 0."""
    prompt, mask = array([1, 2, 3, 4, 5, 6, 7]), np.zeros(7, dtype=bool)
    blocks = wrapped([EncodedSequence(prompt, mask, ORIGIN)], 4, separator=9)
    assert [block.ids.tolist() for block in blocks] == [[5, 6, 7, 9]]


# ---- what the model makes of a row ----


def small_model(**changes) -> Phi2ForCausalLM:
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, resid_pdrop=0.0)
    model = Phi2ForCausalLM(Phi2Config(vocab_size=VOCABULARY, initializer_range=0.3, **{**shape, **changes}))
    model.init_weights(0)
    return model.eval()


def logps_of(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    hidden = model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.logits_indices, row.targets)[0]


def logps_alone(model: Phi2ForCausalLM, context: np.ndarray, answer: np.ndarray) -> Tensor:
    """Log-probabilities of an answer from whole logits, without anything that packing uses."""
    ids = torch.from_numpy(np.concatenate([context, answer]).astype(np.int64))
    logps = model(ids[None]).log_softmax(-1)[0]
    places = torch.arange(len(context), len(ids))
    return logps[places - 1, ids[places]]


def gradients(model: Phi2ForCausalLM, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum with different weights, so that two log-probabilities exchanged do not go unseen."""
    model.zero_grad()
    (logps * torch.linspace(0.5, 1.5, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_to_the_model(model: Phi2ForCausalLM, row: TokenRow, alone: Callable[[], list[Tensor]]) -> None:
    together, apart = logps_of(model, row), torch.cat(alone())
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    expected = gradients(model, apart)
    for name, gradient in gradients(model, together).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
@given(batch=st.lists(pairs(), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
def test_prefix_shared_pairs_equal_separate_sequences_in_values_and_gradients(batch, checkpointing, kv_heads):
    model = small_model(num_key_value_heads=kv_heads)
    model.model.activation_checkpointing = checkpointing
    answers = [(pair.prompt, answer) for pair in batch for answer in (pair.chosen, pair.rejected)]
    assert_same_to_the_model(model, row_of_answers(batch), lambda: [logps_alone(model, *answer) for answer in answers])


@pytest.mark.parametrize("checkpointing", [False, True])
@given(batch=st.lists(sequences(), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_packed_sequences_equal_separate_ones_in_values_and_gradients(batch, checkpointing):
    model = small_model()
    model.model.activation_checkpointing = checkpointing

    def alone() -> list[Tensor]:
        return [logps_alone(model, s.ids[:1], s.ids[1:])[torch.from_numpy(s.mask[1:])] for s in batch]

    assert_same_to_the_model(model, row_of_sequences(batch), alone)


def test_qk_layernorm_models_pack_too():
    model = small_model(qk_layernorm=True)
    pair = EncodedPreference(array([1, 2, 3]), (array([4, 5]), array([6, 7, 8])), PAIR, ORIGIN, {})
    alone = [logps_alone(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
    torch.testing.assert_close(logps_of(model, row_of_answers([pair])), torch.cat(alone), rtol=1e-5, atol=1e-5)
