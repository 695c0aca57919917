"""Preference runs end to end on a tiny Phi: one gradient however a window is cut, their metrics, their losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import phi2
from phi2.checkpoints.weights import load_model
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.lora import disabled, lora_modules
from phi2.lora_config import LoraConfig
from phi2.losses.batch import PairBatch
from phi2.losses.bound import bind_loss
from phi2.model import Phi2ForCausalLM
from phi2.training import reference
from phi2.training.dpo import DPOConfig, make_reference, train
from phi2.training.objective import Objective
from phi2.training.optim import Optimizer
from phi2.training.passes import Cut, Passes
from phi2.training.scoring import Scored, answer_batch
from phi2.training.session import start

LORA = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
# One loss of each file of phi2/losses that needs no column; what a loss is by itself, tests/test_losses.py proves.
LOSSES = ["sigmoid", "ipo", "apo_zero", "cpo"]
TRAIN_METRICS = {
    *("step", "type", "loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "length/chosen", "length/rejected"),
}
REFERENCE_METRICS = {"ref_logps/chosen", "ref_logps/rejected", "kl"}


def in_parts(*sizes: int) -> Cut:
    """Cuts a window into passes of so many samples, whatever their tokens."""
    ends = np.cumsum(sizes).tolist()
    return lambda tokens: [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


WHOLE = Passes(10**9).cut


class Recorder(Optimizer):
    """Keeps the gradients of an update and leaves the weights alone."""

    def step(self) -> Tensor:
        self.gradients = {name: p.grad.clone() for p, name in self.names.items()}
        self.adamw.zero_grad()
        return torch.zeros(())


def move_adapter(model: Phi2ForCausalLM) -> Phi2ForCausalLM:
    """Adapters that have learned something: the policy is not its reference any more."""
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def pairs_of(config: DPOConfig) -> list[EncodedPreference]:
    return start(config).rows.train


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- one gradient, however the window is cut ----


def answer_logps(model: Phi2ForCausalLM, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """(1, n): one sequence alone, whole logits."""
    ids = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))
    logps = model(ids[None]).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, ids[len(prompt) :, None]).T


def by_definition(
    config: DPOConfig, model: Phi2ForCausalLM, base: Phi2ForCausalLM, pairs: list[EncodedPreference]
) -> Tensor:
    """Mean loss of the pairs plus nll_weight times the mean NLL of all chosen tokens, pair by pair, row by row."""
    loss, losses, chosen_logps = bind_loss(config.loss, config.knobs), [], []
    free = loss.reference_free
    for pair in pairs:
        policy = [answer_logps(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        with torch.no_grad():
            ref = [None if free else answer_logps(base, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        losses.append(loss(PairBatch(*policy, *(torch.ones_like(p, dtype=torch.bool) for p in policy), *ref)))
        chosen_logps.append(policy[0])
    return torch.cat(losses).mean() - config.nll_weight * torch.cat(chosen_logps, dim=1).mean()


SPLITS = {  # sizes of the micro-batches, activation checkpointing, nll_weight
    "one batch": ([11], False, 0.0),
    "two batches": ([7, 4], False, 0.5),
    "one pair a batch": ([1] * 11, True, 0.5),
}


MIXED = "sigmoid:0.8,sft:0.2"
KINDS = [*((loss, LORA) for loss in (*LOSSES, MIXED)), ("sigmoid", None), ("simpo", None)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("loss", "lora"), KINDS, ids=lambda value: "" if isinstance(value, LoraConfig) else str(value))
def test_the_gradient_is_that_of_the_mean_over_the_windows_pairs(dpo_config, loss, lora, split):
    sizes, checkpointing, nll_weight = SPLITS[split]
    config = dpo_config(loss=loss, lora=lora, gradient_checkpointing=checkpointing, nll_weight=nll_weight)
    base, pairs = load_model(config.model), pairs_of(config)
    model = start(config).load_policy(config)
    live = make_reference(start(config), config, model, None, pairs)
    move_adapter(model)
    if lora is None:
        with torch.no_grad():
            model.lm_head.bias.add_(torch.linspace(-1, 1, model.config.vocab_size))
    expected_loss = by_definition(config, model, base, pairs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(expected_loss, list(trained.values())), strict=True))

    recorder = Recorder(model, config, 1, scale_loss=False)
    objective = Objective(config, model, live, bind_loss(loss), {}, in_parts(*sizes))
    metrics = objective.update(recorder, pairs).wait()
    assert metrics["loss"] == pytest.approx(expected_loss.item(), rel=1e-4)
    for name, gradient in recorder.gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("max_tokens", [1, 50, 10**6])
def test_evaluation_is_the_mean_over_all_pairs_whatever_the_passes(dpo_config, max_tokens):
    config = dpo_config(nll_weight=0.3)
    model, pairs = move_adapter(start(config).load_policy(config)), pairs_of(config)
    live = make_reference(start(config), config, model, None, pairs)
    found = Objective(config, model.train(), live, bind_loss("sigmoid"), {}, Passes(max_tokens).cut).evaluate(pairs)
    expected = by_definition(config, model.eval(), load_model(config.model), pairs)
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    lengths = [len(pair.chosen) for pair in pairs]
    assert found["eval_length/chosen"] == pytest.approx(sum(lengths) / len(lengths))


def test_metrics_are_means_over_the_whole_window(dpo_config):
    config = dpo_config()
    model, pairs = move_adapter(start(config).load_policy(config)), pairs_of(config)
    live, loss = make_reference(start(config), config, model, None, pairs), bind_loss("sigmoid", {})
    whole, cut = (
        Objective(config, model, live, loss, {}, cut).update(Recorder(model, config, 1, False), pairs).wait()
        for cut in (WHOLE, in_parts(1, 3, len(pairs) - 4))
    )
    assert cut == pytest.approx(whole, rel=1e-4)


def test_metrics_mean_what_they_say(dpo_config):
    config = dpo_config(beta=0.5)
    model, (pair, *_) = move_adapter(start(config).load_policy(config)), pairs_of(config)
    live, loss = make_reference(start(config), config, model, None, [pair]), bind_loss("sigmoid", {"beta": 0.5})
    found = Objective(config, model, live, loss, {}, WHOLE).update(Recorder(model, config, 1, False), [pair]).wait()
    policy = [answer_logps(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
    with disabled(model), torch.no_grad():
        ref = [answer_logps(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
    chosen, rejected = (0.5 * (p.sum() - r.sum()).item() for p, r in zip(policy, ref, strict=True))
    expected = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": float(chosen > rejected),
        "logps/chosen": policy[0].sum().item(),
        "logps/rejected": policy[1].sum().item(),
        "ref_logps/chosen": ref[0].sum().item(),
        "ref_logps/rejected": ref[1].sum().item(),
        "kl": (ref[0] - policy[0]).mean().item(),
        "length/chosen": len(pair.chosen),
        "length/rejected": len(pair.rejected),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


# ---- whole runs ----


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_run_learns_and_leaves_its_folder(dpo_config, pair_data, lora):
    config = dpo_config(lora=lora, eval_data=pair_data, eval_steps=3, save_steps=3, learning_rate=3e-3)
    run = train(dataclasses.replace(config, sample_prompts=["Q?"]))
    result = "model" if lora is None else "adapter"
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "environment.json", "inputs.json", "data_audit.json", "eval_audit.json", "ledger"),
        *("metrics.jsonl", "samples.jsonl", "README.md", "checkpoints", result),
    }
    lines = lines_of(run)
    updates = [line for line in lines if line["type"] == "train"]
    assert all(line.keys() == TRAIN_METRICS | REFERENCE_METRICS for line in updates)
    assert [line["step"] for line in updates] == [1, 2, 3, 4, 5, 6]
    first, second = (line for line in lines if line["type"] == "eval")
    assert second["eval_loss"] < first["eval_loss"] < 0.6931
    assert second["eval_rewards/margins"] > first["eval_rewards/margins"] > 0
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("loss", [*LOSSES, MIXED])
def test_every_loss_widens_the_margin(dpo_config, loss):
    run = train(dpo_config(loss=loss, max_steps=5, learning_rate=3e-3))
    margins = [line["logps/chosen"] - line["logps/rejected"] for line in lines_of(run)]
    model, _ = phi2.load(dpo_config().model, device="cpu", adapter=run / "adapter")
    pairs, base = pairs_of(dpo_config()), load_model(dpo_config().model)

    def margin(model: Phi2ForCausalLM) -> float:
        answers = [(answer_logps(model, p.prompt, p.chosen), answer_logps(model, p.prompt, p.rejected)) for p in pairs]
        return sum((chosen.mean() - rejected.mean()).item() for chosen, rejected in answers)

    assert len(margins) == 5 and margin(model) > margin(base) + 0.5


def test_the_first_update_starts_at_log_2_with_no_reward(dpo_config):
    first, second, *_ = lines_of(train(dpo_config(max_steps=2)))
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    names = ("rewards/chosen", "rewards/rejected", "kl", "rewards/accuracies")
    assert [first[name] for name in names] == [0.0] * 4 and second["kl"] != 0


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_reference_free_loss_computes_no_reference(dpo_config, loss, monkeypatch):
    monkeypatch.setattr(reference, "score", None)
    lines = lines_of(train(dpo_config(loss=loss, max_steps=2)))
    assert all(line.keys() == TRAIN_METRICS for line in lines)


def test_nll_weight_holds_the_chosen_answers_up(dpo_config, tmp_path):
    plain, held = (
        lines_of(train(dpo_config(nll_weight=weight, output=str(tmp_path / str(weight)))))[-1]["logps/chosen"]
        for weight in (0.0, 1.0)
    )
    assert held > plain + 1.0


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_begin_at_log_2_and_learn(dpo_config, dtype, lora):
    run = train(dpo_config(lora=lora, dtype=dtype, max_steps=8))
    lines = lines_of(run)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert lines[-1]["loss"] < 0.6


def test_dropout_is_off_unless_asked_for(dpo_config, tiny_phi_with_dropout, tiny_phi, tmp_path):
    lora = dataclasses.replace(LORA, lora_dropout=0.2)
    runs = {
        name: lines_of(train(dpo_config(**changes, max_steps=2, output=str(tmp_path / name))))
        for name, changes in {
            "plain": {},
            "off": {"model": str(tiny_phi_with_dropout)},
            "on": {"model": str(tiny_phi_with_dropout), "lora": lora, "disable_dropout": False},
        }.items()
    }
    plain, off, on = ([line["logps/chosen"] for line in runs[name]] for name in ("plain", "off", "on"))
    assert off == pytest.approx(plain, rel=1e-5) and on[0] != pytest.approx(plain[0], rel=1e-3)


def test_columns_of_the_data_reach_a_loss_from_the_users_own_file(dpo_config, registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import phi2\n"
        '@phi2.preference_loss("weighted")\n'
        "def weighted(pairs, *, beta: float = 0.1, scale: float = 1.0):\n"
        "    return scale * pairs.columns['weight'] + 0 * beta * pairs.margin\n"
    )
    config = dpo_config(loss="weighted", loss_file=str(path), loss_args={"scale": 2.0}, max_steps=1, shuffle=False)
    (line,) = lines_of(train(config))
    assert line["loss"] == pytest.approx(2.0 * (1 + 2 + 3 + 4) / 4)  # the weights of the first four rows


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": "dpo"}, ValueError, "loss must be one of .*sigmoid.*, got 'dpo'"),
        ({"loss_args": {"gamma": 1.0}}, ValueError, "loss 'sigmoid' does not take 'gamma'; its knobs are beta, label_"),
        ({"loss": "simpo", "label_smoothing": 0.1}, ValueError, "loss 'simpo' does not take 'label_smoothing'"),
        ({"label_smoothing": 0.7}, ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.7"),
        ({"loss_file": "nowhere.py", "loss": "mine"}, FileNotFoundError, "loss_file nowhere.py: no such file"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused_before_anything_is_written(dpo_config, changes, error, message):
    config = dpo_config(**changes)
    with pytest.raises(error, match=message):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("changes", "beta", "loss_args"),
    [
        ({"loss": "simpo"}, 2.0, {"gamma": 1.0}),
        ({"loss": "simpo", "beta": 3.0, "loss_args": {"gamma": 0.5}}, 3.0, {"gamma": 0.5}),
        ({"loss": "sigmoid_norm"}, 5.0, {}),
    ],
)
def test_the_run_folder_tells_the_knobs_that_were_used(dpo_config, changes, beta, loss_args):
    run = train(dpo_config(max_steps=1, **changes))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["beta"], settings["loss_args"]) == (beta, loss_args)
    assert f"| beta | `{beta}` |" in (run / "README.md").read_text()


def test_a_mixture_leaves_its_parts_in_the_run_folder_and_goes_on_from_there(dpo_config):
    config = dpo_config(loss=MIXED, beta=0.3, loss_args={"ld_alpha": 0.5}, max_steps=1)
    run = train(config)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    knobs = {"beta": 0.3, "label_smoothing": 0.0, "ld_alpha": 0.5}
    assert settings["loss"] == [
        {"loss": "sigmoid", "weight": 0.8, "args": knobs},
        {"loss": "sft", "weight": 0.2, "args": {"ld_alpha": 0.5}},
    ]
    assert "with the loss `sigmoid:0.8,sft:0.2`" in (run / "README.md").read_text()
    again = dpo_config(loss=settings["loss"], max_steps=1, output=str(run) + "-again")
    assert lines_of(train(again))[0]["loss"] == lines_of(run)[0]["loss"]
    train(dataclasses.replace(config, resume=True))


def test_a_modifier_that_changes_nothing_is_refused_before_anything_is_loaded(dpo_config, monkeypatch):
    monkeypatch.setattr("phi2.training.session.Session.load_policy", None)
    with pytest.raises(ValueError, match="f_divergence_type forward_kl changes nothing in loss 'hdpo'"):
        train(dpo_config(loss="hdpo", loss_args={"f_divergence_type": "forward_kl"}))


def test_a_column_weighs_the_pairs_of_a_run(dpo_config):
    config = dpo_config(loss_args={"weight_column": "weight"}, max_steps=1, shuffle=False)
    assert lines_of(train(config))[0]["loss"] == pytest.approx((1 + 2 + 3 + 4) / 4 * np.log(2))


def test_a_pair_longer_than_the_models_context_is_refused_before_the_first_update(dpo_config, write_rows):
    data = write_rows([{"prompt": "Q", "chosen": "a", "rejected": "b" * 300}])
    with pytest.raises(ValueError, match="row 1 has .* tokens, more than the model's context of 256"):
        train(dpo_config(data=data))


def test_a_loss_that_is_no_number_stops_the_run(dpo_config, registry):
    @phi2.preference_loss("log_of_margin")
    def log_of_margin(pairs: PairBatch) -> Tensor:
        return pairs.margin.abs().log()  # -inf where the policy is the reference

    with pytest.raises(ValueError, match="step 1: loss 'log_of_margin' is -inf"):
        train(dpo_config(loss="log_of_margin"))


def test_after_that_the_same_folder_can_be_used_with_better_settings(dpo_config, registry):
    @phi2.preference_loss("no_number")
    def no_number(pairs: PairBatch) -> Tensor:
        return pairs.margin / 0

    with pytest.raises(ValueError, match="step 1"):
        train(dpo_config(loss="no_number"))
    assert (train(dpo_config(max_steps=1)) / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nll_weight": -0.1}, "nll_weight must not be negative, got -0.1"),
        ({"reference": "adapters_off", "lora": None}, "reference adapters_off is the start of a new adapter only"),
        (
            {"reference": "adapters_off", "adapter": "x", "lora": LoraConfig()},
            "reference adapters_off is the start of a new adapter only",
        ),
        ({"beta": 0.1, "loss_args": {"beta": 0.2}}, "beta is given twice, also in loss_args"),
        ({"reference_cache": "x"}, "reference_cache needs precompute_ref_log_probs: true"),
        ({"train_on": "all"}, "train_on must be completion for preference rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(dpo_config, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dpo_config(**changes))


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **columns) -> EncodedPreference:
    parts = [np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)]
    return EncodedPreference(parts[0], (parts[1], parts[2]), PAIR, Origin("rows.jsonl", 1), columns)


def test_only_columns_that_are_numbers_in_every_row_become_tensors():
    rows = [pair([1], [2], [3], a=1, b=2.5, c="x", d=1), pair([1], [2], [3], a=4, b=0.5, c=3)]
    logps = torch.zeros(4)
    columns = answer_batch(rows, Scored(logps, logps, {})).columns
    assert {name: values.tolist() for name, values in columns.items()} == {"a": [1.0, 4.0], "b": [2.5, 0.5]}


@pytest.mark.parametrize("loss", [*LOSSES, MIXED])
def test_answers_of_no_and_of_one_token_train(dpo_config, loss):
    """A whole pass of empty rejected answers, and one of single tokens."""
    config = dpo_config(loss=loss, nll_weight=0.1)
    window, cut = [pair([1, 2], [3, 4], []), pair([1], [5], []), pair([1], [2], [3])], in_parts(2, 1)
    model = start(config).load_policy(config)
    live = make_reference(start(config), config, model, None, [])
    objective = Objective(config, model, live, bind_loss(loss), {}, cut)
    if live is not None:
        dataclasses.replace(objective, cut=WHOLE).check_start(window)
    recorder = Recorder(model, config, 1, False)
    metrics = objective.update(recorder, window).wait()
    assert all(np.isfinite(value) for value in metrics.values())
    assert all(gradient.isfinite().all() for gradient in recorder.gradients.values())


class Reads(TorchDispatchMode):
    """Counts the numbers that the host asks a device for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [4096, 40])
def test_an_update_asks_the_device_for_nothing(dpo_config, monkeypatch, tokens):
    counts, update = [], Objective.update

    def counted(*arguments):
        with Reads() as reads:
            metrics = update(*arguments)
        counts.append(reads.count)
        return metrics

    monkeypatch.setattr(Objective, "update", counted)
    train(dpo_config(max_steps=2, max_tokens_per_pass=tokens))
    assert counts == [0, 0]
