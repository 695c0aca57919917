"""Log-probabilities from hidden states against whole logits, with and without LoRA on the head, in every precision."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from phi2.config import Phi2Config
from phi2.inference.scoring import logits_of
from phi2.lora import attach, disabled, lora_modules
from phi2.lora_config import LoraConfig
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model

SHAPE = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
ROWS = torch.tensor([0, 9, 3, 3, 6])  # out of order and repeated, as prefix-shared pairs name them
TARGETS = torch.tensor([5, 59, 0, 17, 2])


def small_model(dtype: torch.dtype = torch.float32, lora: bool = False, dropout: float = 0.0) -> Phi2ForCausalLM:
    """Its LoRA has learned something: B is not zero."""
    model = Phi2ForCausalLM(Phi2Config(**SHAPE, initializer_range=0.3, resid_pdrop=0.0))
    model.init_weights(0)
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(4))
    model.to(dtype).eval()
    if lora:
        attach(model, LoraConfig(r=4, target_modules=("lm_head",), lora_alpha=8, lora_dropout=dropout))
        torch.nn.init.normal_(model.lm_head.lora_B.weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    return model


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def hooked(head: torch.nn.Module, calls: list) -> None:
    head.register_forward_hook(lambda *given: calls.append("called"))


def patched(head: torch.nn.Module, calls: list) -> None:
    own = head.forward
    head.forward = lambda x: (calls.append("called"), own(x))[1]


def watched(head: torch.nn.Module, calls: list) -> None:
    register_module_forward_hook(lambda module, *given: calls.append("called") if module is head else None)


def test_a_head_that_lora_was_put_on_is_called_too():
    model, calls = small_model(), []
    hooked(model.lm_head, calls)
    attach(model, LoraConfig(r=4, target_modules=("lm_head",)))
    target_logps(model, hidden_states(), ROWS, TARGETS)
    assert calls == ["called"]


def test_logits_of_scores_are_those_of_a_head_that_must_be_called():
    model, hidden = small_model(), hidden_states().flatten(0, 1)
    before = logits_of(model, hidden)
    model.lm_head.register_forward_hook(lambda module, given, logits: 5 * logits)
    torch.testing.assert_close(logits_of(model, hidden), 5 * before)


def test_ids_that_a_hook_rules_out_add_nothing_to_the_entropy():
    model, rules = small_model(), torch.zeros(60)
    rules[40:] = -torch.inf
    model.lm_head.register_forward_hook(lambda module, given, logits: logits + rules)
    targets = TARGETS.clamp(max=39)
    logps, entropies = target_logps(model, hidden_states(), ROWS, targets, entropy=True)
    assert logps.isfinite().all() and ((entropies > 0) & (entropies < math.log(40))).all()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("change", [hooked, patched, watched])
def test_a_head_that_has_to_be_called_is_and_says_the_same(change, entropy, lora, monkeypatch):
    monkeypatch.setattr("torch.nn.modules.module._global_forward_hooks", OrderedDict())
    model, hidden, calls = small_model(lora=lora), hidden_states(), []
    expected = target_logps(model, hidden, ROWS, TARGETS, entropy=entropy)
    (gradient,) = torch.autograd.grad(expected[0].sum(), hidden)
    change(model.lm_head, calls)
    found = target_logps(model, hidden, ROWS, TARGETS, entropy=entropy)
    assert calls == ["called"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0].sum(), hidden)[0], gradient)


def from_whole_logits(model: Phi2ForCausalLM, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies."""
    logps = model.lm_head(hidden).float().flatten(0, 1).log_softmax(-1)
    return logps[ROWS, TARGETS], -(logps.exp() * logps).sum(-1)[ROWS]


@pytest.mark.parametrize("lora", [False, True])
def test_values_equal_those_of_whole_logits(lora):
    model, hidden = small_model(lora=lora), hidden_states()
    logps, entropy = target_logps(model, hidden, ROWS, TARGETS, entropy=True)
    expected_logps, expected_entropy = from_whole_logits(model, hidden)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_quantised_head_counts_by_the_numbers_that_its_codes_stand_for(lora):
    model, hidden = small_model(), hidden_states()
    quantize_model(model, "int8")
    if lora:
        attach(model, LoraConfig(r=4, target_modules=("lm_head",)))
        torch.nn.init.normal_(model.lm_head.lora_B.weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    logps, _ = target_logps(model, hidden, ROWS, TARGETS)
    expected, _ = from_whole_logits(model, hidden)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    found = [torch.autograd.grad(each.sum(), hidden)[0] for each in (logps, expected)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_equal_those_of_whole_logits(lora):
    weights = torch.linspace(-1, 2, len(ROWS))
    found = []
    for function in (lambda m, h: target_logps(m, h, ROWS, TARGETS)[0], lambda m, h: from_whole_logits(m, h)[0]):
        model, hidden = small_model(lora=lora), hidden_states()
        (function(model, hidden) * weights).sum().backward()
        found.append({n: p.grad for n, p in model.lm_head.named_parameters() if p.requires_grad} | {"h": hidden.grad})
    ours, theirs = found
    assert (
        ours.keys() == theirs.keys() == ({"lora_A.weight", "lora_B.weight", "h"} if lora else {"weight", "bias", "h"})
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_switched_off_lora_is_the_base_head():
    hidden = hidden_states()
    expected, _ = target_logps(small_model(), hidden, ROWS, TARGETS)
    adapted = small_model(lora=True)
    assert not torch.equal(target_logps(adapted, hidden, ROWS, TARGETS)[0], expected)
    with disabled(adapted):
        assert torch.equal(target_logps(adapted, hidden, ROWS, TARGETS)[0], expected)


def test_dropout_on_the_heads_lora_acts_in_training_alone():
    model, hidden = small_model(lora=True, dropout=0.5), hidden_states()
    expected, _ = target_logps(model, hidden, ROWS, TARGETS)
    assert torch.equal(target_logps(model, hidden, ROWS, TARGETS)[0], expected)
    assert not torch.equal(target_logps(model.train(), hidden, ROWS, TARGETS)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [False, True])
def test_half_precision_weights_give_float32_log_probabilities_as_exact_as_their_inputs(dtype, lora):
    model, hidden = small_model(dtype, lora), hidden_states(dtype)
    logps, _ = target_logps(model, hidden, ROWS, TARGETS)
    assert logps.dtype == torch.float32
    exact, _ = from_whole_logits(model.float(), hidden.float())  # the same rounded numbers, computed in float32
    torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_trained_gets_no_gradient():
    model = small_model(lora=True)
    target_logps(model, hidden_states(), ROWS, TARGETS)[0].sum().backward()
    assert model.lm_head.weight.grad is None and model.lm_head.bias.grad is None
    assert lora_modules(model)["lm_head"].lora_A.weight.grad.abs().max() > 0


def test_autocast_rounds_hidden_states_and_weight_to_its_dtype_and_trains_float32_weights():
    model, hidden = small_model(), hidden_states()
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = target_logps(model, hidden, ROWS, TARGETS)
    rounded = small_model(torch.bfloat16).float()
    rounded.lm_head.bias = model.lm_head.bias
    expected, _ = from_whole_logits(rounded, hidden.bfloat16().float())
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32 and model.lm_head.weight.grad.abs().max() > 0


def test_no_targets_give_no_log_probabilities():
    none = torch.zeros(0, dtype=torch.long)
    logps, entropy = target_logps(small_model(), hidden_states(), none, none)
    assert logps.shape == (0,) and entropy is None
