"""Runs of ours and of trl's trainers for other answers than pairs, and without a reference: the same losses.

Labelled answers (KTO), pairs with a third answer to imitate (TPO), pairs without a reference (CPO, ORPO). As in
`test_training_parity.py` both start from the same weights over the same rows.
"""

from __future__ import annotations

import random

import pytest

from phi2.training import dpo

trl = pytest.importorskip("trl")

WORDS = "a small red boat went out to sea and came home by nine for one cat".split()
FIVE = dict(max_steps=5)
CUT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_tokens_per_pass=300)  # two passes or more


def turn(draw: random.Random, role: str, longest: int) -> list[dict[str, str]]:
    return [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))}]


@pytest.fixture(scope="module")
def labelled() -> list[dict]:
    """Twenty answers with a label, more good than bad ones, of very different lengths."""
    draw = random.Random(0)
    return [
        {"prompt": turn(draw, "user", 9), "completion": turn(draw, "assistant", 20), "label": draw.random() < 0.6}
        for _ in range(20)
    ]


@pytest.fixture(scope="module")
def triples() -> list[dict]:
    """Twenty pairs with a third answer."""
    draw = random.Random(1)
    answers = ("chosen", "rejected", "reference")
    return [
        {"prompt": turn(draw, "user", 9), **{name: turn(draw, "assistant", 20) for name in answers}} for _ in range(20)
    ]


# ---- labelled answers ----

KTO = {
    "kto": dict(beta=1.0),
    "kto, weighted": dict(beta=1.0, desirable_weight=0.5, undesirable_weight=2.0),
    "apo_zero_unpaired": dict(beta=0.3, desirable_weight=1.5),
}


@pytest.mark.parametrize("case", KTO)
def test_kto_with_what_it_tells(run_ours, run_theirs, assert_same_losses, labelled, case):
    """trl reports nothing of good answers where an update has none, and so do we."""
    knobs, name = KTO[case], case.partition(",")[0]
    mine = run_ours(dpo, labelled, loss=name, **as_ours(knobs), shuffle=False, **FIVE)
    reference = run_theirs(trl.KTOConfig, trl.KTOTrainer, labelled, loss_type=name, **knobs, **FIVE)
    assert_same_losses(mine, reference)
    for step, (found, expected) in enumerate(zip(mine, reference, strict=True)):
        told = {key: value for key, value in expected.items() if key.startswith(("rewards/", "logps/"))}
        assert {key: found.get(key) for key in told} == pytest.approx(told, rel=1e-4, abs=1e-3), step
    assert case != "kto" or sum(step["kl"] > 0 for step in reference) >= 2  # z counts


def test_kto_in_several_passes_of_what_is_trls_batch(run_ours, run_theirs, assert_same_losses, labelled):
    """trl sets answers behind other prompts within its batch, here within an update, however that is cut."""
    cut = {**CUT, "max_tokens_per_pass": 160}
    mine = run_ours(dpo, labelled, loss="kto", **as_ours(KTO["kto"]), shuffle=False, **FIVE, **cut)
    assert_same_losses(mine, run_theirs(trl.KTOConfig, trl.KTOTrainer, labelled, **KTO["kto"], **FIVE))


def as_ours(knobs: dict) -> dict:
    named = ("beta", "label_smoothing", "learning_rate")
    others = {key: value for key, value in knobs.items() if key not in named}
    return {**{key: value for key, value in knobs.items() if key in named}, "loss_args": others}


# ---- an answer to imitate ----

TPO = {  # by their loss types, in which tpo_l has another hyphen
    "sigmoid": dict(beta=0.2, label_smoothing=0.1, tpo_alpha=0.5),
    "hinge": dict(beta=0.1),
    "ipo": dict(beta=0.3),
    "tpo-l": dict(beta=2.0, tpo_l_gamma=0.4),
}


@pytest.mark.parametrize("contrast", TPO)
def test_tpo(run_ours, run_theirs, assert_same_losses, triples, contrast):
    """Its likelihood is a mean over the tokens of trl's batch, which is an update here, in two passes or more."""
    tpo = pytest.importorskip("trl.experimental.tpo")
    knobs = TPO[contrast]
    given = as_ours({**knobs, "contrast": contrast.replace("-", "_")})
    mine = run_ours(dpo, triples, loss="tpo", **given, **FIVE, **CUT)
    assert_same_losses(mine, run_theirs(tpo.TPOConfig, tpo.TPOTrainer, triples, loss_type=contrast, **knobs, **FIVE))


# ---- without a reference ----


def texts(prompt: str) -> list[dict]:
    """Twenty pairs of texts, to which both put one end token; the prompt begins with what trl would put before it."""
    draw = random.Random(2)

    def text(longest: int) -> str:
        return "".join(f" {word}" for word in draw.choices(WORDS, k=draw.randint(1, longest)))

    return [{"prompt": f"<|im_start|>{prompt}", "chosen": text(20), "rejected": text(20)} for _ in range(20)]


PER_TOKEN = "a likelihood over the tokens of the batch, as trl has it"
CPO = {
    "sigmoid": (dict(beta=0.2, label_smoothing=0.1, cpo_alpha=0.0), "cpo", dict(cpo_alpha=0.0)),
    f"sigmoid and {PER_TOKEN}": (dict(beta=0.2, cpo_alpha=0.7), "cpo:1,sft_tokens:0.7", dict(cpo_alpha=0.0)),
    f"simpo and {PER_TOKEN}": (dict(beta=2.0, simpo_gamma=0.5), "simpo:1,sft_tokens:1", dict(gamma=0.5)),
}


@pytest.mark.parametrize("case", CPO)
def test_cpo(run_ours, run_theirs, assert_same_losses, case):
    cpo = pytest.importorskip("trl.experimental.cpo")
    knobs, name, own = CPO[case]
    both = {key: knobs[key] for key in ("beta", "label_smoothing") if key in knobs}
    rows, kind = texts("a small red boat"), case.partition(" ")[0]
    mine = run_ours(dpo, rows, loss=name, **both, loss_args=own, **FIVE, **CUT)
    assert_same_losses(mine, run_theirs(cpo.CPOConfig, cpo.CPOTrainer, rows, loss_type=kind, **knobs, **FIVE))


def test_orpo(run_ours, run_theirs, assert_same_losses):
    """The likelihood of trl's counts the prompt: of one token, which nothing predicts, it is that of the answer. It is
    a mean over the tokens of its batch, ours per sequence: the same for chosen answers of one length."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    rows = [{**row, "chosen": f" {row['chosen']:.<24}"[:24]} for row in texts("")]
    mine = run_ours(dpo, rows, loss="orpo", beta=0.4, **FIVE, **CUT)
    assert_same_losses(mine, run_theirs(orpo.ORPOConfig, orpo.ORPOTrainer, rows, beta=0.4, **FIVE))
