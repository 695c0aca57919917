"""Scores of continuations: a trie of prefixes gives each request what it gets alone, and reads no prefix twice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.checkpoints.weights import load_model
from phi2.inference.scoring import Request, TrieRow, passes, score
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.quantize import quantize_model

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=7)  # so few that prefixes are often shared
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_phi):
    return load_model(tiny_phi, CPU, torch.float32)


@torch.no_grad()
def alone(model, request: Request) -> tuple[list[float], list[int]]:
    """Log-probabilities and most likely tokens of one request in a pass of its own."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    logps = model(ids[:, :-1])[0, -len(request.continuation) :].log_softmax(dim=-1)
    return logps.gather(1, ids[0, -len(request.continuation) :, None])[:, 0].tolist(), logps.argmax(dim=-1).tolist()


def assert_as_alone(model, requests: list[Request], **settings) -> None:
    scores = dict(score(model, requests, **settings))
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        logps, best = alone(model, request)
        assert scores[index].logprobs == pytest.approx(logps, abs=2e-5)
        assert (scores[index].best, scores[index].is_greedy) == (best, best == list(request.continuation))


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12), st.sampled_from([1, 8, 20, 4096]))
@settings(deadline=None, max_examples=60)
def test_every_request_is_scored_as_it_is_alone(model, requests, tokens_per_pass):
    assert_as_alone(model, [Request(*pair) for pair in requests], tokens_per_pass=tokens_per_pass)


def test_many_leaves_behind_a_long_prefix_are_scored_as_alone(model):
    shots, draw = list(range(200)), torch.Generator().manual_seed(0)
    ends = [torch.randint(256, (n,), generator=draw).tolist() for n in (3, 9, 1, 4, 12, 2, 7, 30, 5, 5)]
    assert_as_alone(model, [Request(shots, end) for end in ends])


def test_the_likeliest_tokens_are_told_with_their_log_probs(model):
    ((_, scored),) = score(model, [Request([5, 6], [7, 8, 9])], top_logprobs=3)
    with torch.no_grad():
        values, ids = model(torch.tensor([[5, 6, 7, 8]]))[0, 1:].log_softmax(dim=-1).topk(3)
    assert [[token_id for token_id, _ in place] for place in scored.top] == ids.tolist()
    told = [logp for place in scored.top for _, logp in place]
    assert told == pytest.approx(values.flatten().tolist(), abs=2e-5)


def test_a_greedy_continuation_is_known_as_one(model):
    context = [5, 6, 7]
    said = []
    for _ in range(4):
        said.append(int(model(torch.tensor([context + said]))[0, -1].argmax()))
    (_, greedy), (_, other) = sorted(score(model, [Request(context, said), Request(context, [*said[:-1], 3])]))
    assert greedy.is_greedy and greedy.best == said and not other.is_greedy
    assert greedy.total == pytest.approx(sum(greedy.logprobs))


@given(st.lists(TOKENS, min_size=1, max_size=12))
@settings(deadline=None)
def test_a_row_holds_every_prefix_once_and_who_sees_whom(sequences):
    row, places, before = TrieRow(), [], []
    for ids in sorted(sequences):
        shared = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
        places.append(row.add(ids, min(shared, len(ids))))
        before = ids
    until = row.tensors(CPU)["visible_until"][0].tolist()
    assert len(row.ids) == len({tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))})
    for ids, path in zip(sorted(sequences), places, strict=True):
        assert [row.ids[i] for i in path] == ids and [row.positions[i] for i in path] == list(range(len(ids)))
        assert [j for j in range(path[-1] + 1) if path[-1] < until[j]] == path


def drawn_sequences() -> st.SearchStrategy:
    """(length, tokens shared with the one before), as of sorted sequences."""
    one = st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
    return st.lists(one, min_size=1, max_size=40)


@given(drawn_sequences(), st.integers(1, 100))
def test_passes_hold_everything_once_and_no_more_than_allowed(sequences, tokens):
    lengths, shared = [n for n, _ in sequences], [s for _, s in sequences]
    cuts = list(passes(lengths, shared, tokens))
    assert [i for start, end in cuts for i in range(start, end)] == list(range(len(lengths)))
    for start, end in cuts:
        row = lengths[start] + sum(lengths[i] - shared[i] for i in range(start + 1, end))
        assert row <= tokens or end == start + 1


def test_a_pass_is_cut_where_little_is_shared():
    # Questions of 10 tokens, 8 of them shared with their options; a new question shares 2.
    lengths, shared = [10] * 12, [0, 8, 8, 8, 2, 8, 8, 8, 2, 8, 8, 8]
    assert list(passes(lengths, shared, 36)) == [(0, 8), (8, 12)]


def test_half_precision_logits_are_not_rounded_to_halves(tiny_phi):
    half = load_model(tiny_phi, CPU, torch.bfloat16)
    ((_, scored),) = score(half, [Request([1, 2, 3], [4])])
    with torch.no_grad():
        hidden = half.model(torch.tensor([[1, 2, 3]]))[0, -1].float()
        logits = hidden @ half.lm_head.weight.float().T + half.lm_head.bias.float()
    assert scored.total == pytest.approx(logits.log_softmax(-1)[4].item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["an adapter on the head", "int8", "both"])
def test_the_head_is_scored_in_every_form_it_has(tiny_phi, kind):
    model = load_model(tiny_phi, CPU, torch.float32)
    if kind != "an adapter on the head":
        quantize_model(model, "int8")
    if kind != "int8":
        attach(model, LoraConfig(r=4, target_modules=("q_proj", "lm_head")), seed=0)
        torch.nn.init.normal_(model.lm_head.lora_B.weight, generator=torch.Generator().manual_seed(0))
    assert_as_alone(model.eval(), [Request([1, 2], [3, 4]), Request([1, 2], [5])])


def test_dropout_is_off_while_scoring_and_on_again_afterwards(tiny_phi_with_dropout):
    model = load_model(tiny_phi_with_dropout, CPU, torch.float32).train()
    scores = [dict(score(model, [Request([1, 2, 3], [4, 5])]))[0] for _ in range(2)]
    assert scores[0] == scores[1] and model.training


def test_what_cannot_be_scored_is_named(model):
    long, fine = Request([1] * 200, [2] * 58), Request([1], [2])
    for request, reason in (
        (Request([], [1]), "request 2: context and continuation need a token each at least"),
        (Request([1], []), "request 2: context and continuation need a token each at least"),
        (long, "request 2: 257 tokens are to be read, the model's context is 256"),
        (Request([1], [272]), "request 2 has token id 272, the model knows ids below 272"),
    ):
        with pytest.raises(ValueError, match=reason):
            score(model, [fine, request])


def test_logits_that_are_not_finite_name_their_module(tiny_phi):
    model = load_model(tiny_phi, CPU, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"non-finite logits; first in model.layers.1.mlp.fc1"):
        list(score(model, [Request([1, 2], [3])]))
