"""No compilation in mid-run: what Triton would compile for random batches, counted without compiling anything.

A launch is compiled once for each of its variants: types, constants, and of each argument whether it is 1 and whether
16 divides it. The ops run on the CPU as in the interpreter, and where a kernel would be launched its variant is noted.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from phi2.config import Phi2Config
from phi2.data.encoded import EncodedPreference, EncodedSequence
from phi2.data.records import Origin
from phi2.fused import fuse
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request
from phi2.lora import attach, disabled
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model
from phi2.training.config import BemaConfig
from phi2.training.packing import row_of_answers, row_of_sequences
from phi2.training.reference import moving
from phi2.training.scoring import row_logps
from phi2.training.sft import forward
from phi2_kernels import block, quantized_matmul

from .conftest import INTERPRETED
from .forms import Form

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")

BATCHES, MOST = 300, 2  # passes of a run, and variants of a kernel
LINEARS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
CONFIG = Phi2Config(
    vocab_size=96, hidden_size=160, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1,
    max_position_embeddings=1024, partial_rotary_factor=0.4,
)  # fmt: skip
Variants = dict[str, set[str]]  # of each kernel


@pytest.fixture
def variants(monkeypatch) -> Iterator[Variants]:
    """Filled by what is launched; nothing is computed."""
    from triton.runtime.interpreter import InterpretedFunction

    found: Variants = defaultdict(set)

    def note(kernel, *args, grid, warmup, **constants) -> Form:
        form = Form(kernel, args, constants)
        found[f"{kernel.fn.__module__.split('.')[-1]} {kernel.fn.__name__}"].add(form.variant)
        return form

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(block, "_KNOWN", {})
    monkeypatch.setattr("phi2_kernels._dispatch.default_impl", "triton")
    yield found


def make(lora: bool = True, fused: bool = False, quantized: str | None = None) -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(CONFIG)
    if quantized:
        quantize_model(model, quantized)  # in float32, of which a CPU has no form of its own
    model.to(torch.bfloat16)
    if lora:
        attach(model, LoraConfig(r=4, target_modules=LINEARS), 0)
    if fused:
        fuse(model)
    return model.train()


def tokens(rng: random.Random, most: int, least: int = 1) -> np.ndarray:
    return np.array([rng.randrange(90) for _ in range(rng.randint(least, most))], dtype=np.int32)


def pairs(rng: random.Random) -> list[EncodedPreference]:
    def row() -> EncodedPreference:
        return EncodedPreference(tokens(rng, 40), (tokens(rng, 30), tokens(rng, 30)), (1.0, 0.0), Origin("x", 1), {})

    return [row() for _ in range(rng.randint(1, 4))]


def sequences(rng: random.Random) -> list[EncodedSequence]:
    ids = [tokens(rng, 60) for _ in range(rng.randint(1, 4))]
    return [EncodedSequence(each, np.ones(len(each), dtype=bool), Origin("x", 1)) for each in ids if len(each) > 1]


def train_on_pairs(model: Phi2ForCausalLM, rng: random.Random) -> None:
    row = row_of_answers(pairs(rng))
    with torch.no_grad(), disabled(model):
        row_logps(model, row)
    row_logps(model, row).sum().backward()


def train_on_sequences(model: Phi2ForCausalLM, rng: random.Random) -> None:
    if rows := sequences(rng):
        forward(model, row_of_sequences(rows)).sum().backward()


RUNS = {
    "dpo": (train_on_pairs, {}),
    "dpo, fused": (train_on_pairs, {"fused": True}),
    "dpo, int4": (train_on_pairs, {"quantized": "int4"}),
    "sft, all weights": (train_on_sequences, {"lora": False}),
    "sft, fused": (train_on_sequences, {"fused": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_asks_for_two_forms_of_a_kernel_at_most_and_all_within_two_passes(variants, monkeypatch, name):
    train, kind = RUNS[name]
    monkeypatch.setattr(quantized_matmul, "_COMPILED", set())
    monkeypatch.setattr(quantized_matmul, "DENSE_FROM", 150)  # more than some passes here, and less than others
    rng, model = random.Random(0), make(**kind)
    train(model, rng)
    train(model, rng)
    first = {kernel: set(found) for kernel, found in variants.items()}
    for _ in range(BATCHES - 2):
        train(model, rng)
    assert (
        len(variants) > 5
        and {kernel: len(found) for kernel, found in variants.items() if len(found) > most(kernel)} == {}
    )
    assert variants == first


MOVES = {
    "mixing": {"ref_model_mixup_alpha": 0.5},
    "hard": {"ref_model_mixup_alpha": 1.0},
    "bema": {"bema": BemaConfig()},
}


@pytest.mark.parametrize("rule", MOVES)
def test_a_reference_that_moves_asks_for_no_form_that_was_not_there_at_the_start(variants, dpo_config, rule):
    config = dpo_config(sync_ref_model=True, ref_model_sync_steps=1, **MOVES[rule])
    model, rows = make(fused=True), pairs(random.Random(0))
    reference, row = moving(config, model, None), row_of_answers(rows)
    reference(rows, row)
    if reference.grows:
        with reference.grown():
            reference(rows, row)
    first = {kernel: set(found) for kernel, found in variants.items()}
    for step in range(1, 15):  # a sum has grown beyond its largest rank, been cut, and grown again
        reference.follow(step)
        reference(rows, row)
    assert len(first) > 5 and variants == first


def most(kernel: str) -> int:
    """LoRA's are made for each of the matmuls that have adapters, three with residual dropout, and for A and for B."""
    return 2 * 3 if kernel.startswith("block_adapters") else MOST


def answer(model: Phi2ForCausalLM, slots: int, rng: random.Random) -> None:
    """Prompts of every length from 9 tokens on come and go; shorter ones are read as if they were decoded."""
    engine = Engine(model, choices=90, slots=slots)
    for _ in range(BATCHES):
        ids = tokens(rng, 60, least=9).tolist()
        engine.add(Request(ids, SamplingParams(max_new_tokens=rng.randint(1, 6))))
        while len(engine.waiting) >= slots:
            engine.step()


@pytest.mark.parametrize("slots, most", [(1, 2), (8, 6)])  # a block's four weights or the head alone, 1, 2 or more rows
def test_a_generation_asks_for_few_forms_of_a_kernel(recordings, variants, monkeypatch, slots, most):
    model = make(lora=False).eval()
    monkeypatch.setattr(torch, "empty", torch.zeros)  # of which nothing is computed
    answer(model, slots, random.Random(0))
    assert len(variants) > 5 and {kernel: len(found) for kernel, found in variants.items() if len(found) > most} == {}
