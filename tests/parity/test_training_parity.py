"""Twenty steps of our training loops and of trl's, from the same weights over the same rows: the same losses.

Both sides run as their users run them, `train(config)` here and `Trainer.train()` there, each in its own default order
of the data, over more than one epoch. trl keeps its defaults too: checkpointed activations, padded batches, two rows a
pair. The learning rates are high, so that every loss moves by far more than the 1e-4 by which the two may differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.weights import load_model
from phi2.lora import attach
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
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
SAME = dict(max_steps=STEPS, seed=SEED, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1)
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


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi of transformers, biases and LayerNorms included."""
    folder = tmp_path_factory.mktemp("base")
    tiny_tokenizer.save(folder)
    shape = dict(vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    eos = tiny_tokenizer.eos_id
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**shape, bos_token_id=eos, eos_token_id=eos))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fresh_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What our loop starts a new adapter from, as peft reads it."""
    folder = tmp_path_factory.mktemp("fresh")
    model = load_model(base, torch.device("cpu"), torch.float32)
    attach(model, LoraConfig(**LORA), SEED)
    save_adapter(model, folder, "base")
    return folder


@pytest.fixture
def ours(base: Path, rows: list[dict], write_rows, metrics_of, tmp_path: Path) -> Callable[..., Curve]:
    """Runs our loop and returns its metrics: ours(dpo, **what differs from the common settings)."""

    def run(loop, **options: Any) -> Curve:
        where = dict(
            model=str(base), data=write_rows(rows_for(loop, rows)), output=str(tmp_path / "ours"), device="cpu"
        )
        config = dpo.DPOConfig if loop is dpo else sft.SFTConfig
        return metrics_of(loop.train(config(**{**where, "lora": LoraConfig(**LORA), **SAME, **options})))

    return run


@pytest.fixture
def theirs(base: Path, fresh_adapter: Path, rows: list[dict], tmp_path: Path) -> Callable[..., Curve]:
    """Runs trl's trainer and returns its logs: theirs(dpo, **what differs).

    A new adapter is trl's own, given our starting weights; `adapter` goes on with one, and `lora=None` has none.
    """

    def run(
        loop,
        adapter: Path | None = None,
        lora: dict | None = LORA,
        callbacks: Sequence[transformers.TrainerCallback] = (),
        trainer_class: type | None = None,
        **options: Any,
    ) -> Curve:
        model, extra = transformers.PhiForCausalLM.from_pretrained(base, dtype=torch.float32), {}
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        elif lora is not None:
            extra["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
        plain = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
        Config, Trainer = (trl.DPOConfig, trl.DPOTrainer) if loop is dpo else (trl.SFTConfig, trl.SFTTrainer)
        trainer = (trainer_class or Trainer)(
            model,
            args=Config(str(tmp_path / "theirs"), **{**plain, **SAME, **options}),
            train_dataset=datasets.Dataset.from_list(rows_for(loop, rows)),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            callbacks=[*callbacks],
            **extra,
        )
        if extra:
            start = peft.load_peft_weights(fresh_adapter, device="cpu")
            assert not peft.set_peft_model_state_dict(trainer.model, start).unexpected_keys
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    return run


def rows_for(loop, rows: list[dict]) -> list[dict]:
    return rows if loop is dpo else [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def assert_same_losses(ours: Curve, theirs: Curve) -> None:
    assert len(ours) == len(theirs) >= 5
    mine, reference = ([step["loss"] for step in curve] for curve in (ours, theirs))
    assert max(reference) - min(reference) > 1000 * TOLERANCE, "the loss hardly moves: this comparison shows nothing"
    torch.testing.assert_close(mine, reference, rtol=0, atol=TOLERANCE)
    for name in ("learning_rate", "grad_norm"):
        assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], rel=1e-3)


def assert_same_metrics(ours: Curve, theirs: Curve) -> None:
    """Log-probabilities are sums over hundreds of tokens, and rewards those times beta: their rounding is larger."""
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        mine, reference = ([step[name] for step in curve] for curve in (ours, theirs))
        assert mine == pytest.approx(reference, rel=1e-5, abs=10 * TOLERANCE), name
    assert [step["rewards/accuracies"] for step in ours] == [step["rewards/accuracies"] for step in theirs]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_over_more_than_one_epoch(ours, theirs, loss):
    mine, reference = ours(dpo, loss=loss, **LOSSES[loss]), theirs(dpo, loss_type=[loss], **LOSSES[loss])
    assert len(mine) == STEPS
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_with_every_loss_of_both(ours, theirs, loss):
    knobs = LOSSES[loss]
    mine, reference = ours(dpo, loss=loss, **knobs, **FIVE), theirs(dpo, loss_type=[loss], **knobs, **FIVE)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


@pytest.mark.parametrize("loss", WINDOWS)
def test_dpo_with_every_loss_of_windows_of_both(ours, theirs, loss):
    name, knobs = {"sft": "sft_tokens"}.get(loss, loss), WINDOWS[loss]
    reference = theirs(dpo, loss_type=[loss], **knobs, **FIVE)
    assert_same_losses(ours(dpo, loss=name, **knobs, **FIVE), reference)


@pytest.mark.parametrize("loss", WINDOWS)
def test_a_window_of_two_micro_batches_is_trls_batch(ours, theirs, loss, tmp_path):
    """What trl has no setting for: its batch of four in two passes."""
    name, knobs = {"sft": "sft_tokens"}.get(loss, loss), WINDOWS[loss]
    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_losses(ours(dpo, loss=name, **knobs, **FIVE, **cut), theirs(dpo, loss_type=[loss], **knobs, **FIVE))


@pytest.mark.parametrize(
    ("divergence", "loss"),
    [*((name, "sigmoid") for name in DIVERGENCES), ("forward_kl", "ipo"), ("js_divergence", "hinge")],
)
def test_dpo_with_every_divergence_of_both(ours, theirs, divergence, loss):
    knobs = dict(f_divergence_type=divergence, **DIVERGENCES[divergence])
    mine = ours(dpo, loss=loss, beta=0.2, loss_args=knobs, **FIVE)
    assert_same_losses(mine, theirs(dpo, loss_type=[loss], beta=0.2, **knobs, **FIVE))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_that_counts_the_longer_tail_less(ours, theirs, loss):
    mine = ours(dpo, loss=loss, beta=0.2, loss_args={"ld_alpha": 0.3}, **FIVE)
    assert_same_losses(mine, theirs(dpo, loss_type=[loss], beta=0.2, ld_alpha=0.3, **FIVE))


def test_dpo_with_a_mixture_and_a_likelihood_per_token(ours, theirs):
    """trl's MPO: its `sft` is a mean over the tokens of a micro-batch, which here is the whole update."""
    mixed = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    mine = ours(dpo, loss="trl:mpo", beta=0.2, nll_weight=1.0, **FIVE)
    assert_same_losses(mine, theirs(dpo, beta=0.2, **mixed, **FIVE))


def test_dpo_that_goes_on_with_a_trained_adapter(ours, theirs, base, fresh_adapter, tmp_path):
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
def test_accumulated_micro_batches(ours, theirs, loop):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_losses(ours(loop, **split), theirs(loop, **split))


@pytest.mark.parametrize("loop", [dpo, sft])
def test_rows_cut_at_max_length(ours, theirs, loop):
    assert_same_losses(ours(loop, max_length=80), theirs(loop, max_length=80))


def test_sft_with_a_warmed_up_cosine_schedule(ours, theirs):
    schedule = dict(lr_scheduler_type="cosine", warmup_steps=4)
    assert_same_losses(ours(sft, **schedule), theirs(sft, **schedule))


def test_sft_of_packed_rows(ours, theirs):
    size = dict(per_device_train_batch_size=2)
    mine = ours(sft, packing="best_fit", packing_length=256, **size)
    assert_same_losses(mine, theirs(sft, packing=True, max_length=256, **size))


@pytest.mark.parametrize("loop", [dpo, sft])
def test_all_weights_with_weight_decay(ours, theirs, loop):
    """In DPO both keep a second model as the reference."""
    assert_same_losses(ours(loop, lora=None, weight_decay=0.5), theirs(loop, lora=None, weight_decay=0.5))


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_that_the_policy_is_mixed_into(ours, theirs, alpha):
    """TR-DPO, of all weights: trl has no adapters for it."""
    moves = dict(lora=None, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=alpha)
    mine, reference = ours(dpo, **moves), theirs(dpo, **moves)
    assert_same_losses(mine, reference)
    assert_same_metrics(mine, reference)


def test_a_reference_that_is_a_bias_corrected_average(ours, theirs):
    bema = pytest.importorskip("trl.experimental.bema_for_ref_model")
    powers = dict(ema_power=0.4, bias_power=0.3, lag=3, multiplier=0.5)
    every = dict(update_freq=3, update_ref_model=True, ref_model_update_freq=3)
    callback = bema.BEMACallback(**every, **powers)
    reference = theirs(dpo, lora=None, callbacks=[callback], trainer_class=bema.DPOTrainer)
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
