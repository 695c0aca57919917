"""The reference: which model it is, that it stays that model, and what names what it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from phi2.checkpoints.weights import load_model
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.lora import attach, lora_modules
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import row_of_answers
from phi2.training.reference import adapters_off, another_model, frozen_copy, score
from phi2.training.reference_cache import Reference, answer_keys, fingerprint


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> EncodedPreference:
    parts = [np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)]
    return EncodedPreference(parts[0], (parts[1], parts[2]), PAIR, Origin("rows.jsonl", 1), {})


PAIRS = [pair([1, 2], [3, 4, 5], [6]), pair([7], [8], [9, 10, 11, 12]), pair([1, 2, 3], [4], [5, 6])]


@pytest.fixture
def model(tiny_phi) -> Phi2ForCausalLM:
    return load_model(tiny_phi)


@pytest.fixture
def adapted(model) -> Phi2ForCausalLM:
    """With an adapter that has learned something, also on the head."""
    attach(model, LoraConfig(r=4, target_modules=("q_proj", "fc2", "lm_head"), lora_dropout=0.5))
    move_adapter(model)
    return model


@torch.no_grad()
def move_adapter(model: Phi2ForCausalLM) -> None:
    for module in lora_modules(model).values():
        module.lora_B.weight.add_(0.1)


def ask(reference: Reference, pairs: Sequence[EncodedPreference] = PAIRS) -> Tensor:
    return reference(pairs, row_of_answers(pairs))


# ---- the three kinds ----


def test_the_policy_with_its_adapters_off_is_its_base(tiny_phi, adapted):
    expected = ask(another_model(load_model(tiny_phi)))
    assert not torch.allclose(score(adapted, row_of_answers(PAIRS)), expected, atol=1e-3)
    assert torch.equal(ask(adapters_off(adapted)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_asking_it_leaves_the_policy_as_it_was(adapted, training):
    adapted.train(training)
    ask(adapters_off(adapted))
    assert {module.training for module in adapted.modules()} == {training}
    assert all(module.adapter for module in lora_modules(adapted).values())


def test_it_has_no_dropout_though_the_policy_trains_with_it(make_phi):
    model = load_model(make_phi(resid_pdrop=0.5))
    attach(model, LoraConfig(r=4))
    expected = ask(adapters_off(model))
    assert torch.equal(ask(adapters_off(model.train())), expected)


def test_a_frozen_copy_stays_where_the_policy_began(adapted):
    copy = frozen_copy(adapted)
    expected = ask(another_model(copy))
    assert torch.equal(expected, score(adapted.eval(), row_of_answers(PAIRS)))
    move_adapter(adapted)
    assert torch.equal(ask(another_model(copy)), expected)
    assert not torch.allclose(score(adapted, row_of_answers(PAIRS)), expected, atol=1e-3)


def test_a_frozen_copy_shares_the_weights_that_do_not_train_and_trains_nothing(adapted):
    copy = dict(frozen_copy(adapted).named_parameters())
    for name, parameter in adapted.named_parameters():
        assert (copy[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    assert not any(parameter.requires_grad for parameter in copy.values())
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_frozen_copy_of_a_model_that_trains_throughout_shares_nothing(model):
    copy = frozen_copy(model)
    with torch.no_grad():
        model.lm_head.bias.add_(1.0)
        model.model.embed_tokens.weight.mul_(2.0)
    assert not torch.allclose(ask(another_model(copy)), score(model, row_of_answers(PAIRS)), atol=1e-3)


def test_no_reference_builds_a_graph(adapted):
    references = [adapters_off(adapted), another_model(frozen_copy(adapted))]
    assert not any(ask(reference).requires_grad for reference in references)


# ---- what names a cache ----


def test_answers_differ_by_tokens_and_by_where_they_begin():
    pairs = [pair([1, 2], [3], [4]), pair([1], [2, 3], [4]), pair([1, 2, 3], [], [4, 0]), pair([1, 2], [3, 0], [5])]
    assert len(set(answer_keys(pairs))) == 8


def name_of(model: Phi2ForCausalLM, adapters: bool = True, dtype: torch.dtype = torch.float32) -> str:
    return fingerprint(model, adapters, dtype)


def test_the_same_weights_have_the_same_name(tiny_phi, model):
    assert name_of(load_model(tiny_phi)) == name_of(model)


def test_one_changed_number_is_another_name(model):
    before = name_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.fc2.bias[0] += 1e-3
    assert name_of(model) != before


def test_another_precision_of_the_weights_or_of_the_computation_is_another_name(tiny_phi, model):
    names = {name_of(model), name_of(model, dtype=torch.bfloat16), name_of(load_model(tiny_phi, dtype="bfloat16"))}
    assert len(names) == 3


def test_another_setting_of_the_same_weights_is_another_name(make_phi):
    names = {
        name_of(load_model(make_phi(**changes))) for changes in ({}, {"rope_theta": 500.0}, {"layer_norm_eps": 1e-4})
    }
    assert len(names) == 3


def test_an_adapter_that_is_off_does_not_count_and_one_that_is_on_does(tiny_phi, adapted):
    base = name_of(load_model(tiny_phi), adapters=False)
    assert name_of(adapted, adapters=False) == base
    on = name_of(adapted, adapters=True)
    assert on != base
    move_adapter(adapted)
    assert name_of(adapted, adapters=True) != on and name_of(adapted, adapters=False) == base


def test_the_same_adapter_weights_scaled_otherwise_are_another_name(adapted):
    before = name_of(adapted)
    for module in lora_modules(adapted).values():
        object.__setattr__(module.active, "scaling", 2 * module.active.scaling)
    assert name_of(adapted) != before
