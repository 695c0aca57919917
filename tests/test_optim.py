"""The optimizer: schedules by their definition, what decays, clipping, skipped float16 updates, state in and out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from phi2.training.optim import Optimizer, parameter_groups, schedule_factor


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def optimizer_of(model: nn.Module, sft_config, total: int = 10, scale_loss: bool = False, **changes) -> Optimizer:
    settings = {"learning_rate": 0.1, "max_grad_norm": 0.0, **changes}
    return Optimizer(model, sft_config(**settings), total, scale_loss)


def loss_of(model: nn.Module, size: float = 1.0) -> Tensor:
    return size * (model(torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7]])) - 3.0).square().mean()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- schedule ----


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
    ],
)
def test_the_schedule_rises_over_the_warm_up_and_then_falls(kind, factors):
    assert [schedule_factor(kind, step, warmup=2, total=6) for step in range(6)] == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_schedule_never_falls_below_zero(kind):
    assert schedule_factor(kind, 12, warmup=0, total=10) >= 0


@pytest.mark.parametrize(("warmup", "updates"), [(0, 0), (3, 3), (0.25, 3), (0.999, 10)])
def test_a_warm_up_below_one_is_a_share_of_all_updates_rounded_up(sft_config, warmup, updates):
    assert optimizer_of(net(), sft_config, total=10, warmup_steps=warmup).warmup == updates


def test_the_learning_rate_of_the_next_update_is_the_one_it_uses(sft_config):
    """With AdamW's first update each weight moves by the learning rate, whatever its gradient."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = optimizer_of(model, sft_config, total=4, warmup_steps=2, adam_epsilon=1e-30)
    optimizer.backward(model(torch.ones(2)).sum())
    assert optimizer.learning_rate == 0.0
    optimizer.step()
    assert optimizer.learning_rate == pytest.approx(0.05)
    before = weights_of(model)[0]
    optimizer.backward(model(torch.ones(2)).sum())
    optimizer.step()
    torch.testing.assert_close(before - model.weight, torch.full((1, 2), 0.05))


# ---- an update ----


def test_matrices_decay_and_vectors_and_frozen_weights_do_not():
    model = net()
    model[0].weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.3)
    assert matrices["weight_decay"] == 0.3 and [id(p) for p in matrices["params"]] == [id(model[2].weight)]
    assert vectors["weight_decay"] == 0.0
    assert {id(p) for p in vectors["params"]} == {id(p) for p in model.parameters() if p.ndim == 1}


def test_updates_are_those_of_adamw(sft_config):
    ours, theirs = net(), net()
    optimizer = optimizer_of(ours, sft_config, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.99)
    adamw = torch.optim.AdamW(parameter_groups(theirs, 0.1), lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(3):
        optimizer.backward(loss_of(ours))
        optimizer.step()
        adamw.zero_grad()
        loss_of(theirs).backward()
        adamw.step()
    torch.testing.assert_close(weights_of(ours), weights_of(theirs))


def test_micro_batches_add_up_and_gradients_are_cleared_after_the_update(sft_config):
    model, other = net(), net()
    halves, whole = optimizer_of(model, sft_config), optimizer_of(other, sft_config)
    for _ in range(2):
        halves.backward(loss_of(model, 0.5))
    whole.backward(loss_of(other))
    torch.testing.assert_close(halves.step(), whole.step())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(weights_of(model), weights_of(other))


@pytest.mark.parametrize("scale_loss", [False, True])
def test_the_norm_is_that_of_the_true_gradient_before_clipping(sft_config, scale_loss):
    model = net()
    optimizer = optimizer_of(model, sft_config, scale_loss=scale_loss, max_grad_norm=1e-3)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model), list(model.parameters()))]).norm()
    optimizer.backward(loss_of(model))
    torch.testing.assert_close(optimizer.step(), expected)


@pytest.mark.parametrize(("limit", "share"), [(0.5, 0.5), (0.0, None)])
def test_gradients_are_scaled_down_to_the_limit_and_zero_leaves_them_alone(sft_config, limit, share):
    model = nn.Linear(3, 1, bias=False)
    optimizer = optimizer_of(model, sft_config, max_grad_norm=limit)
    optimizer.backward(model(torch.tensor([3.0, 0.0, 4.0])).sum())  # gradient (3, 0, 4), norm 5
    optimizer.step()
    first_moment = optimizer.tensors()["weight.exp_avg"] / 0.1  # (1 - beta1) * gradient
    assert first_moment.norm().item() == pytest.approx(share or 5.0, rel=1e-4)


# ---- float16 ----


def test_an_update_that_overflowed_is_left_out_and_does_not_move_the_schedule(sft_config):
    model = net()
    optimizer = optimizer_of(model, sft_config, scale_loss=True)
    before, scale, rate = weights_of(model), optimizer.scaler.get_scale(), optimizer.learning_rate
    optimizer.backward(loss_of(model, 1e38))
    assert not math.isfinite(optimizer.step())
    assert (optimizer.updates, optimizer.learning_rate) == (0, rate)
    assert optimizer.scaler.get_scale() == scale / 2
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    optimizer.backward(loss_of(model))
    assert math.isfinite(optimizer.step()) and optimizer.updates == 1 and optimizer.learning_rate < rate
    assert not torch.equal(model[0].weight, before[0])


def test_without_loss_scaling_a_gradient_that_is_not_finite_does_not_reach_weights_or_moments(sft_config):
    model = net()
    optimizer = optimizer_of(model, sft_config)
    optimizer.backward(loss_of(model))
    optimizer.step()
    before, moments = weights_of(model), {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    optimizer.backward(loss_of(model, math.inf))
    assert not optimizer.step().isfinite()
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.tensors(), moments, rtol=0, atol=0)


# ---- state ----


@pytest.mark.parametrize("scale_loss", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(sft_config, scale_loss):
    model = net()
    optimizer = optimizer_of(model, sft_config, scale_loss=scale_loss, warmup_steps=2)

    def update(model: nn.Module, optimizer: Optimizer, size: float = 1.0) -> None:
        optimizer.backward(loss_of(model, size))
        optimizer.step()

    if scale_loss:
        update(model, optimizer, 1e38)  # overflows: scale and schedule now differ from their start
    update(model, optimizer)
    other = net()
    other.load_state_dict(model.state_dict())
    restored = optimizer_of(other, sft_config, scale_loss=scale_loss, warmup_steps=2)
    restored.restore({name: t.clone() for name, t in optimizer.tensors().items()}, optimizer.numbers())
    for _ in range(2):
        update(model, optimizer)
        update(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))
    assert restored.numbers() == optimizer.numbers()


def test_state_is_named_after_the_parameters(sft_config):
    model = net()
    optimizer = optimizer_of(model, sft_config)
    optimizer.backward(loss_of(model))
    optimizer.step()
    names = {f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert optimizer.tensors().keys() == names
