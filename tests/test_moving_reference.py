"""A reference that follows the policy: its weights are the sums that its papers define, with LoRA too."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from phi2.checkpoints.weights import load_model
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.lora import LoraLinear, attach, lora_modules
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.training import dpo, loop
from phi2.training.config import BemaConfig
from phi2.training.moving_reference import ADAPTER, STACKED, Change, MovingReference, best_of_rank
from phi2.training.packing import row_of_answers
from phi2.training.reference import moving, score
from phi2.training.session import start

LORA = LoraConfig(r=4, lora_alpha=12, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
IDS = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [3, 4, 5], [6])]
PAIRS = [EncodedPreference(IDS[0], (IDS[1], IDS[2]), PAIR, Origin("rows.jsonl", 1), {})]
BEMA = BemaConfig(ema_power=0.4, bias_power=0.3, lag=2.0, multiplier=0.5)
RULES = {"mixing": {"ref_model_mixup_alpha": 0.3}, "bema": {"bema": BEMA}}
MOVING = dict(sync_ref_model=True, ref_model_sync_steps=1)

Weights = dict[str, Tensor]


def policy_of(tiny_phi: Path, lora: bool) -> Phi2ForCausalLM:
    model = load_model(tiny_phi)
    if lora:
        attach(model, LORA)
    return model


@torch.no_grad()
def train(model: Phi2ForCausalLM, step: int) -> None:
    """Moves every weight that trains."""
    generator = torch.Generator().manual_seed(step)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@torch.no_grad()
def whole_weights(model: Phi2ForCausalLM, name: str = "default") -> Weights:
    """What a model computes with, an adapter merged."""
    changes = {f"{layer}.weight": module.adapters[name].change() for layer, module in lora_modules(model).items()}
    weights = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" not in name}
    return {name: weight + changes.get(name, 0) for name, weight in weights.items()}


def reference_weights(reference: MovingReference, model: Phi2ForCausalLM) -> Weights:
    return whole_weights(model, ADAPTER) if lora_modules(model) else whole_weights(reference.copy.copy)


def logps_of(weights: Weights, tiny_phi: Path) -> Tensor:
    model = load_model(tiny_phi)
    model.load_state_dict(weights)
    return score(model, row_of_answers(PAIRS))


def expected_weights(rule: str, policies: list[Weights]) -> Weights:
    """By the formulas of the papers, on whole weights; the first policy is the start."""
    reference = average = first = policies[0]
    for step, policy in enumerate(policies[1:], start=1):
        if rule == "mixing":
            reference = {name: 0.3 * policy[name] + 0.7 * reference[name] for name in policy}
        else:
            beta, gain = (2 + 0.5 * step) ** -0.4, (2 + 0.5 * step) ** -0.3
            average = {name: (1 - beta) * average[name] + beta * policy[name] for name in policy}
            reference = {name: average[name] + gain * (policy[name] - first[name]) for name in policy}
    return reference


# ---- what its weights are ----


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("rule", RULES)
def test_its_weights_are_those_sums_of_the_policys_weights_with_an_adapter_merged(dpo_config, tiny_phi, rule, lora):
    model = policy_of(tiny_phi, lora)
    reference = moving(dpo_config(**MOVING, **RULES[rule]), model, None)
    policies = [whole_weights(model)]
    for step in range(1, 6):
        train(model, step)
        policies.append(whole_weights(model))
        reference.follow(step)
    expected = expected_weights(rule, policies)
    assert max((policies[0][name] - expected[name]).abs().max() for name in expected) > 0.05
    torch.testing.assert_close(reference_weights(reference, model), expected, rtol=0, atol=1e-5)
    told = reference(PAIRS, row_of_answers(PAIRS))
    torch.testing.assert_close(told, logps_of(expected, tiny_phi), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_before_its_first_move_it_is_the_policy_at_the_start(dpo_config, tiny_phi, lora):
    model = policy_of(tiny_phi, lora)
    expected = score(model, row_of_answers(PAIRS))
    reference = moving(dpo_config(**{**MOVING, "ref_model_sync_steps": 3}), model, None)
    for step in (1, 2):
        train(model, step)
        reference.follow(step)
    assert torch.equal(reference(PAIRS, row_of_answers(PAIRS)), expected)
    reference.follow(3)
    assert not torch.equal(reference(PAIRS, row_of_answers(PAIRS)), expected)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_hard_update_makes_it_the_policy_to_the_last_bit(dpo_config, tiny_phi, lora):
    model = policy_of(tiny_phi, lora)
    reference = moving(dpo_config(**MOVING, ref_model_mixup_alpha=1.0), model, None)
    for step in (1, 2):
        train(model, step)
        reference.follow(step)
        assert torch.equal(reference(PAIRS, row_of_answers(PAIRS)), score(model, row_of_answers(PAIRS)))
    policy, copied = reference.copy.policy(), reference.copy.reference()
    assert all(torch.equal(a, b) for name in policy for a, b in zip(policy[name], copied[name], strict=True))


def test_with_lora_a_long_sum_stays_small_and_near(dpo_config, tiny_phi):
    """A policy that drifts, as one in training does: what is cut off of the sum is little of what it learned."""
    model = policy_of(tiny_phi, lora=True)
    reference = moving(dpo_config(**MOVING, ref_model_mixup_alpha=0.1), model, None)
    policies, drift = [whole_weights(model)], torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=drift) for p in model.parameters() if p.requires_grad]
    for step in range(1, 31):
        with torch.no_grad():
            for parameter, way in zip((p for p in model.parameters() if p.requires_grad), ways, strict=True):
                noise = torch.randn(parameter.shape, generator=drift)
                parameter.add_(0.005 * way + 0.005 * noise)
        policies.append(whole_weights(model))
        reference.follow(step)
    assert {len(piece.A) for piece in reference.copy.reference().values()} <= set(range(4, 33))
    found, exact = reference_weights(reference, model), policies[0]
    for policy in policies[1:]:
        exact = {name: 0.1 * policy[name] + 0.9 * exact[name] for name in policy}
    missed = math.sqrt(sum((found[name] - exact[name]).square().sum().item() for name in exact))
    learned = math.sqrt(sum((exact[name] - policies[0][name]).square().sum().item() for name in exact))
    assert missed < 0.01 * learned


def test_what_is_kept_of_a_sum_is_its_best_part():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(12, 40, generator=generator), torch.randn(30, 12, generator=generator)
    kept = best_of_rank(Change(A, B), 5)
    U, S, Vh = torch.linalg.svd(B @ A)
    torch.testing.assert_close(kept.B @ kept.A, U[:, :5] @ S[:5].diag() @ Vh[:5], rtol=0, atol=1e-4)
    assert kept.A.shape == (5, 40) and kept.B.shape == (30, 5)


# ---- in a run ----


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_moves_it_when_it_is_due(dpo_config, metrics_of, lora, rule):
    """The same rows in every update: what the reference says of them changes with it alone."""
    config = dpo_config(lora=lora, **{**MOVING, "ref_model_sync_steps": 2}, **RULES[rule], shuffle=False)
    config = dataclasses.replace(config, per_device_train_batch_size=11, gradient_accumulation_steps=1)
    said = [line["ref_logps/chosen"] for line in metrics_of(dpo.train(config))]
    assert [abs(b - a) > 1e-3 for a, b in zip(said, said[1:], strict=False)] == [False, True, False, True, False]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"lora": None}], ids=str)
def test_a_hard_update_behind_every_update_leaves_the_loss_where_it_begins(dpo_config, metrics_of, changes):
    lines = metrics_of(dpo.train(dpo_config(**MOVING, ref_model_mixup_alpha=1.0, **changes)))
    assert [line["loss"] for line in lines] == pytest.approx([math.log(2)] * 6, abs=1e-6)
    assert lines[0]["logps/chosen"] != pytest.approx(lines[-1]["logps/chosen"], rel=1e-3)


def test_fused_blocks_give_the_run_of_plain_ones(dpo_config, metrics_of, tmp_path):
    lines = [
        metrics_of(dpo.train(dpo_config(**MOVING, fuse=fuse, output=str(tmp_path / str(fuse)))))
        for fuse in (False, True)
    ]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], abs=1e-4)


def test_the_adapter_that_is_trained_further_is_where_it_starts(dpo_config, tmp_path, metrics_of):
    first = dpo.train(dpo_config(output=str(tmp_path / "first"))) / "adapter"
    settings = dict(adapter=str(first), lora=LoraConfig(), shuffle=False)
    still = metrics_of(dpo.train(dpo_config(**settings, output=str(tmp_path / "still"))))
    moves = metrics_of(
        dpo.train(dpo_config(**settings, **{**MOVING, "ref_model_sync_steps": 4}, output=str(tmp_path / "moves")))
    )
    assert moves[:4] == still[:4] and moves[4] != still[4]


@pytest.mark.parametrize("rule", RULES)
def test_compiling_for_it_before_the_first_update_moves_no_bit(dpo_config, tmp_path, metrics_of, monkeypatch, rule):
    """Its second form is asked for then, and again only once it has moved."""
    runs, ranks = [], []
    put = LoraLinear.put
    monkeypatch.setattr(LoraLinear, "put", lambda layer, name, A, B: (ranks.append(len(A)), put(layer, name, A, B))[1])
    for on in (False, True):
        monkeypatch.setattr(loop, "compiles", lambda device, on=on: on)
        config = dpo_config(**MOVING, **RULES[rule], max_steps=4, output=str(tmp_path / str(on)))
        runs.append((metrics_of(dpo.train(config)), ranks.copy()))
        ranks.clear()
    (expected, without), (found, asked) = runs
    layers = len(without) // 5  # each is put at the start and behind each update
    small, large = [without[0]] * layers, [STACKED * without[0]] * layers
    assert found == expected and without == [*small, *large * 4] and asked == [*small, *large, *small, *large * 4]


def test_a_fit_leaves_the_base_of_its_session_as_it_was(dpo_config, tmp_path, metrics_of):
    config = dpo_config(max_steps=3)
    session = start(config)
    before = {name: tensor.clone() for name, tensor in session.base.state_dict().items()}
    dpo.fit(session, dataclasses.replace(config, **MOVING))
    after = session.base.state_dict()
    assert not session.base.adapters and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    second = dpo.fit(session, dataclasses.replace(config, **MOVING, output=str(tmp_path / "second")))
    assert metrics_of(second) == metrics_of(config.output)


# ---- kill and resume ----


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("rule", RULES)
def test_a_stopped_run_resumes_bit_for_bit(
    dpo_config, metrics_of, monkeypatch, tmp_path, rule, lora, assert_same_weights
):
    """Past the update where a sum of changes is cut, and from a checkpoint between two moves."""

    class Stop(Exception):
        pass

    def stop(loss: float, step: int) -> None:
        if step == 13:
            raise Stop

    settings = dict(lora=lora, **{**MOVING, "ref_model_sync_steps": 1 if lora else 2}, **RULES[rule])
    settings |= dict(max_steps=14, save_steps=11, learning_rate=1e-3)
    whole = dpo.train(dpo_config(**settings))
    config = dpo_config(**settings, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "require_finite", stop)
        dpo.train(config)
    assert (tmp_path / "stopped" / "checkpoints" / "step-11" / "reference.safetensors").is_file()
    resumed = dpo.train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


def test_a_killed_run_resumes_bit_for_bit(dpo_config, train_and_kill, metrics_of, tmp_path, assert_same_weights):
    noise = dict(lora=dataclasses.replace(LORA, lora_dropout=0.2), disable_dropout=False)
    settings = {**noise, **MOVING, "ref_model_sync_steps": 2, "save_steps": 3}
    whole = dpo.train(dpo_config(**settings))
    config = dpo_config(**settings, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    resumed = dpo.train(dataclasses.replace(config, resume=True))
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_weights(resumed, whole)


def test_a_damaged_reference_of_a_checkpoint_is_named_in_one_line(dpo_config):
    config = dpo_config(**MOVING, max_steps=1)
    path = dpo.train(config) / "checkpoints" / "step-1" / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"^{path}: cannot resume from this reference") as caught:
        dpo.train(dataclasses.replace(config, resume=True))
    assert "\n" not in str(caught.value)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precompute_ref_log_probs": True}, "it needs precompute_ref_log_probs false, got true"),
        ({"reference": "microsoft/phi-2"}, "moves a reference that starts as the policy, got microsoft/phi-2"),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha must be in (0, 1], got 0.0"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha must be in (0, 1], got 1.5"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1, got 0"),
        ({"ref_model_mixup_alpha": 0.5, "bema": BEMA}, "ref_model_mixup_alpha 0.5 needs a reference that moves by mix"),
        ({"sync_ref_model": False, "ref_model_mixup_alpha": 0.5}, "mixup_alpha 0.5 needs sync_ref_model true, got"),
        ({"sync_ref_model": False, "bema": BEMA}, "needs sync_ref_model true, got False"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(dpo_config, settings, told):
    with pytest.raises(ValueError) as caught:
        dpo_config(**{"sync_ref_model": True, **settings})
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_settings_of_bema_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="^lag must be at least 1, got 0$"):
        BemaConfig(lag=0)
    with pytest.raises(ValueError, match="^bias_power must not be negative, got -1$"):
        BemaConfig(bias_power=-1)


def test_a_loss_without_a_reference_has_none_to_move(dpo_config):
    with pytest.raises(ValueError, match="^loss simpo needs no reference: leave .* sync_ref_model unset$"):
        dpo.train(dpo_config(loss="simpo", **MOVING))


def test_a_run_in_which_it_would_never_move_is_refused(dpo_config):
    with pytest.raises(ValueError, match="^sync_ref_model: ref_model_sync_steps 512 outlasts the run of 6 updates$"):
        dpo.train(dpo_config(sync_ref_model=True))
