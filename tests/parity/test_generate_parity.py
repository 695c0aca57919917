"""Generation against transformers: the same processed logits, and the same greedy tokens from twin models."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM
from transformers.generation import logits_process as hf

from phi2.checkpoints.weights import load
from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.generate import generate
from phi2.inference.sampling import Settings, Stages, pack, process_logits
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

V = 40


def byte_tokenizer() -> Tokenizer:
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(order)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {})


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def twins() -> tuple[Phi2ForCausalLM, PhiForCausalLM]:
    torch.manual_seed(0)
    shape = dict(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4, intermediate_size=320)
    config = PhiConfig(
        **shape,
        vocab_size=len(TOKENIZER),
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=TOKENIZER.eos_id,
        eos_token_id=TOKENIZER.eos_id,
    )
    theirs = PhiForCausalLM(config).eval()
    ours = Phi2ForCausalLM(Phi2Config.from_dict(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def their_scores(logits: torch.Tensor, said: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The processors that transformers' _get_logits_processor makes for these settings, in its order."""
    chain = hf.LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty))
    if params.temperature != 1.0:
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(top_p=params.top_p))
    chain.append(hf.MinPLogitsWarper(min_p=params.min_p))
    return chain(said, logits)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, V, 10 * V]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    rounded=st.booleans(),
)
def test_processed_logits_equal_those_of_transformers(seed, rounded, **settings):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, V, generator=generator)
    logits = logits.round() if rounded else logits  # rounded: with ties
    said = torch.randint(V, (3, 7), generator=generator)
    seen = torch.zeros(3, V, dtype=torch.bool).scatter_(1, said, True)
    params = SamplingParams(**settings)
    rows = Settings.unpack(torch.stack([pack(params)] * 3))
    assert torch.equal(
        process_logits(logits, rows, Stages.of(params), seen), their_scores(logits.clone(), said, params)
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.no_grad()
def test_greedy_tokens_equal_transformers(twins, penalty):
    ours, theirs = twins
    ids = torch.tensor([TOKENIZER.encode("def fib(n):")])
    expected = theirs.generate(ids, max_new_tokens=60, do_sample=False, repetition_penalty=penalty)[0, ids.shape[1] :]
    reply = generate(ours, TOKENIZER, "def fib(n):", max_new_tokens=60, repetition_penalty=penalty)
    assert reply.token_ids == expected.tolist()
    assert len(set(reply.token_ids)) > 5


@torch.no_grad()
def test_greedy_tokens_of_a_left_padded_batch_equal_transformers(twins):
    ours, theirs = twins
    prompts = ["a", "What is the capital of France?", "def fib(n):"]
    rows = [TOKENIZER.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[TOKENIZER.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=60, do_sample=False, pad_token_id=TOKENIZER.pad_id
    )
    for reply, row in zip(generate(ours, TOKENIZER, prompts, max_new_tokens=60), expected[:, width:], strict=True):
        assert reply.token_ids == row[: len(reply.token_ids)].tolist()
        assert len(reply.token_ids) == 60 or reply.token_ids[-1] == TOKENIZER.eos_id


@pytest.mark.parametrize("strength", [0.0, 4.0, 8.0])
@torch.no_grad()
def test_a_reply_ends_at_the_same_token_as_in_transformers(twins, strength):
    ours, theirs = twins
    for model in twins:
        model.lm_head.bias[TOKENIZER.eos_id] = strength
    expected = theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=40, do_sample=False)[0, 2:].tolist()
    reply = generate(ours, TOKENIZER, TOKENIZER.decode([5, 6]), max_new_tokens=40)
    for model in twins:
        model.lm_head.bias[TOKENIZER.eos_id] = 0.0
    assert reply.token_ids == expected
    assert reply.finish_reason == ("stop" if expected[-1] == TOKENIZER.eos_id else "length")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@torch.no_grad()
def test_an_end_that_a_file_lists_ends_a_reply_where_it_does_in_transformers(twins, tmp_path, file):
    ours, theirs = twins
    ids = torch.tensor([TOKENIZER.encode("def fib(n):")])
    said = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, "eos_token_id": [TOKENIZER.eos_id, said[7]]}))
    again = PhiForCausalLM.from_pretrained(tmp_path)
    expected = again.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    reply = generate(*load(tmp_path, "cpu", "float32"), "def fib(n):", max_new_tokens=20)
    assert reply.token_ids == expected and len(expected) < 20 and reply.finish_reason == "stop"
