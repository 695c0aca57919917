"""Twenty steps of our training loops and of trl's, from the same weights over the same rows: the same losses.

Both sides run as their users run them, `train(config)` here and `Trainer.train()` there, each in its own default order
of the data, over more than one epoch. trl keeps its defaults too: checkpointed activations, padded batches, two rows a
pair. The learning rates are high, so that every loss moves by far more than the 1e-4 by which the two may differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.weights import load_model
from phi2.lora_config import LoraConfig
from phi2.training import dpo, sft
from phi2.training.config import BemaConfig
from phi2.training.packing import best_fit
from phi2.training.window import Windows

trl = pytest.importorskip("trl")
accelerate = pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STEPS, SEED = 20, 11
TOLERANCE = 1e-4  # nats
FIVE = dict(max_steps=5)  # for what differs in its loss alone
LOSSES = {
    "sigmoid": dict(beta=0.2),
    "ipo": dict(beta=0.3),
    "hinge": dict(beta=0.05),
    "exo_pair": dict(beta=0.2, label_smoothing=0.1),
    "nca_pair": dict(beta=0.2),
    "robust": dict(beta=0.2, label_smoothing=0.2),
    "bco_pair": dict(beta=0.2),
    "sppo_hard": dict(beta=0.5, learning_rate=1e-3),  # squares of sums: they grow fast
    "apo_zero": dict(beta=0.2),
    "apo_down": dict(beta=0.2),
    "discopop": dict(beta=0.2),
    "sigmoid_norm": dict(beta=5.0),
}
WINDOWS = {  # losses over the pairs of a micro-batch there, and of an update here: the same where one is the other
    "aot": dict(beta=0.2),
    "aot_unpaired": dict(beta=0.2, label_smoothing=0.1),
    "sft": {},
}
DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {},
    "js_divergence": {},
    "alpha_divergence": dict(f_alpha_divergence_coef=0.3),
}
WORDS = "a small red boat went out to sea and came home with nine fish for the cat".split()

Curve = list[dict[str, float]]  # the metrics of every step


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Conversations of one or two questions, with two answers each, all of very different lengths."""
    draw = random.Random(0)

    def turn(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))}

    history = [[], [turn("user", 5), turn("assistant", 3)]]
    return [
        {
            "prompt": [*history[i % 2], turn("user", 9)],
            "chosen": [turn("assistant", 20)],
            "rejected": [turn("assistant", 20)],
        }
        for i in range(24)
    ]


@pytest.fixture
def ours(run_ours, rows: list[dict]) -> Callable[..., Curve]:
    """ours(dpo, **what differs from the common settings)."""
    return lambda loop, **options: run_ours(loop, rows_for(loop, rows), **options)


@pytest.fixture
def theirs(run_theirs, rows: list[dict]) -> Callable[..., Curve]:
    """theirs(dpo, **what differs)."""

    def run(loop, trainer: type | None = None, **options: Any) -> Curve:
        kind = (trl.DPOConfig, trainer or trl.DPOTrainer) if loop is dpo else (trl.SFTConfig, trl.SFTTrainer)
        return run_theirs(*kind, rows_for(loop, rows), **options)

    return run


def rows_for(loop, rows: list[dict]) -> list[dict]:
    return rows if loop is dpo else [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def assert_same_metrics(ours: Curve, theirs: Curve) -> None:
    """Log-probabilities are sums over hundreds of tokens, and rewards those times beta: their rounding is larger."""
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        mine, reference = ([step[name] for step in curve] for curve in (ours, theirs))
        assert mine == pytest.approx(reference, rel=1e-5, abs=10 * TOLERANCE), name
    assert [step["rewards/accuracies"] for step in ours] == [step["rewards/accuracies"] for step in theirs]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_over_more_than_one_epoch(ours, theirs, assert_same_losses, loss):
    mine, reference = ours(dpo, loss=loss, **LOSSES[loss]), theirs(dpo, loss_type=[loss], **LOSSES[loss])
    assert len(mine) == STEPS
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_with_every_loss_of_both(ours, theirs, assert_same_losses, loss):
    knobs = LOSSES[loss]
    mine, reference = ours(dpo, loss=loss, **knobs, **FIVE), theirs(dpo, loss_type=[loss], **knobs, **FIVE)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


@pytest.mark.parametrize("loss", WINDOWS)
def test_dpo_with_every_loss_of_windows_of_both(ours, theirs, assert_same_losses, loss):
    name, knobs = {"sft": "sft_tokens"}.get(loss, loss), WINDOWS[loss]
    reference = theirs(dpo, loss_type=[loss], **knobs, **FIVE)
    assert_same_losses(ours(dpo, loss=name, **knobs, **FIVE), reference)


@pytest.mark.parametrize("loss", WINDOWS)
def test_a_window_of_two_micro_batches_is_trls_batch(ours, theirs, assert_same_losses, loss, tmp_path):
    """What trl has no setting for: its batch of four in two passes."""
    name, knobs = {"sft": "sft_tokens"}.get(loss, loss), WINDOWS[loss]
    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_losses(ours(dpo, loss=name, **knobs, **FIVE, **cut), theirs(dpo, loss_type=[loss], **knobs, **FIVE))


@pytest.mark.parametrize(
    ("divergence", "loss"),
    [*((name, "sigmoid") for name in DIVERGENCES), ("forward_kl", "ipo"), ("js_divergence", "hinge")],
)
def test_dpo_with_every_divergence_of_both(ours, theirs, assert_same_losses, divergence, loss):
    knobs = dict(f_divergence_type=divergence, **DIVERGENCES[divergence])
    mine = ours(dpo, loss=loss, beta=0.2, loss_args=knobs, **FIVE)
    assert_same_losses(mine, theirs(dpo, loss_type=[loss], beta=0.2, **knobs, **FIVE))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_that_counts_the_longer_tail_less(ours, theirs, assert_same_losses, loss):
    mine = ours(dpo, loss=loss, beta=0.2, loss_args={"ld_alpha": 0.3}, **FIVE)
    assert_same_losses(mine, theirs(dpo, loss_type=[loss], beta=0.2, ld_alpha=0.3, **FIVE))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_that_weighs_pairs_by_how_likely_they_are(ours, theirs, assert_same_losses, loss):
    mine = ours(dpo, loss=loss, beta=0.2, loss_args={"use_weighting": True}, **FIVE)
    assert_same_losses(mine, theirs(dpo, loss_type=[loss], beta=0.2, use_weighting=True, **FIVE))


def test_dpo_with_a_mixture_and_a_likelihood_per_token(ours, theirs, assert_same_losses):
    """trl's MPO: its `sft` is a mean over the tokens of a micro-batch, which here is the whole update."""
    mixed = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    mine = ours(dpo, loss="trl:mpo", beta=0.2, nll_weight=1.0, **FIVE)
    assert_same_losses(mine, theirs(dpo, beta=0.2, **mixed, **FIVE))


def test_dpo_that_goes_on_with_a_trained_adapter(ours, theirs, assert_same_losses, base, fresh_adapter, tmp_path):
    """The reference is the adapter as it was, not the base: trl keeps a second adapter, we a frozen copy."""
    trained = tmp_path / "trained"
    model = load_model(base, torch.device("cpu"), torch.float32)
    load_adapter(model, fresh_adapter)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    save_adapter(model, trained, "base")
    mine, reference = ours(dpo, adapter=str(trained), lora=LoraConfig()), theirs(dpo, adapter=trained)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


@pytest.mark.parametrize("loop", [dpo, sft])
def test_accumulated_micro_batches(ours, theirs, assert_same_losses, loop):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_losses(ours(loop, **split), theirs(loop, **split))


@pytest.mark.parametrize("loop", [dpo, sft])
def test_rows_cut_at_max_length(ours, theirs, assert_same_losses, loop):
    assert_same_losses(ours(loop, max_length=80), theirs(loop, max_length=80))


def test_sft_with_a_warmed_up_cosine_schedule(ours, theirs, assert_same_losses):
    schedule = dict(lr_scheduler_type="cosine", warmup_steps=4)
    assert_same_losses(ours(sft, **schedule), theirs(sft, **schedule))


def test_sft_of_packed_rows(ours, theirs, assert_same_losses):
    size = dict(per_device_train_batch_size=2)
    mine = ours(sft, packing="best_fit", packing_length=256, **size)
    assert_same_losses(mine, theirs(sft, packing=True, max_length=256, **size))


@pytest.mark.parametrize("loop", [dpo, sft])
def test_all_weights_with_weight_decay(ours, theirs, assert_same_losses, loop):
    """In DPO both keep a second model as the reference."""
    assert_same_losses(ours(loop, lora=None, weight_decay=0.5), theirs(loop, lora=None, weight_decay=0.5))


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_that_the_policy_is_mixed_into(ours, theirs, assert_same_losses, alpha):
    """TR-DPO, of all weights: trl has no adapters for it."""
    moves = dict(lora=None, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=alpha)
    mine, reference = ours(dpo, **moves), theirs(dpo, **moves)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


def test_a_reference_that_is_a_bias_corrected_average(ours, theirs, assert_same_losses):
    bema = pytest.importorskip("trl.experimental.bema_for_ref_model")
    powers = dict(ema_power=0.4, bias_power=0.3, lag=3, multiplier=0.5)
    every = dict(update_freq=3, update_ref_model=True, ref_model_update_freq=3)
    callback = bema.BEMACallback(**every, **powers)
    reference = theirs(dpo, lora=None, callbacks=(callback,), trainer=bema.DPOTrainer)
    moves = dict(lora=None, sync_ref_model=True, ref_model_sync_steps=3, bema=BemaConfig(**powers))
    mine = ours(dpo, **moves)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


def test_data_comes_in_the_order_of_transformers():
    """`Trainer` shuffles with accelerate's sampler, seeded with its `seed`."""
    sampler = accelerate.data_loader.SeedableRandomSampler(range(29), data_seed=SEED)
    windows = Windows(29, size=8, seed=SEED)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        steps = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        assert [i for step in steps for i in windows.at(step)] == list(sampler)


@pytest.mark.parametrize("capacity", [16, 100])
def test_blocks_hold_the_rows_of_trl_blocks(capacity):
    draw = random.Random(capacity)
    lengths = [draw.randint(1, capacity) for _ in range(500)]
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * length for i, length in enumerate(lengths)]})
    packed = trl.pack_dataset(rows, capacity, "bfd")
    assert best_fit(lengths, capacity) == [list(dict.fromkeys(block)) for block in packed["input_ids"]]
