"""The reference: which model it is, that it stays that model, and a cache that is never a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from phi2.checkpoints.weights import load_model
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.lora import attach, lora_modules
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.reference import adapters_off, another_model, frozen_copy, score
from phi2.training.reference_cache import Reference, answer_keys, fingerprint, precomputed

CPU = torch.device("cpu")


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


# ---- the cache ----


class Counted:
    """A reference that knows for how many rows and answers it was asked."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.pairs, self.answers = reference, 0, []

    def __call__(self, pairs: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        self.pairs += len(pairs)
        self.answers.append(sum(len(each.answers) for each in pairs))
        return self.reference(pairs, row)


@pytest.fixture
def live(model) -> Counted:
    return Counted(another_model(model))


def test_precomputed_log_probabilities_are_the_live_ones(live, tmp_path):
    reference = precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    torch.testing.assert_close(ask(reference), ask(live), rtol=0, atol=1e-5)
    assert ask(reference).dtype == torch.float32


def test_they_are_served_for_any_pairs_in_any_order(live, tmp_path):
    reference = precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    chosen = [PAIRS[2], PAIRS[0], PAIRS[2]]
    torch.testing.assert_close(ask(reference, chosen), ask(live, chosen), rtol=0, atol=1e-5)


def test_each_pair_is_scored_once_for_all_runs(live, tmp_path):
    precomputed(live, "a" * 64, PAIRS[:2], 2, tmp_path, CPU)
    assert live.pairs == 2
    precomputed(live, "a" * 64, PAIRS[:2], 1, tmp_path, CPU)  # another batch size
    assert live.pairs == 2
    reference = precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)  # one pair more
    assert live.pairs == 3
    assert torch.equal(ask(precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)), ask(reference))
    assert live.pairs == 3


def test_what_was_scored_before_an_interruption_is_kept(live, tmp_path):
    def interrupted(pairs: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        if live.pairs == 2:
            raise KeyboardInterrupt
        return live(pairs, row)

    with pytest.raises(KeyboardInterrupt):
        precomputed(interrupted, "a" * 64, PAIRS, 2, tmp_path, CPU)
    reference = precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    assert live.pairs == 3
    torch.testing.assert_close(ask(reference), ask(live), rtol=0, atol=1e-5)


def test_an_interruption_before_the_first_score_leaves_no_file(tmp_path):
    def interrupted(pairs: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precomputed(interrupted, "a" * 64, PAIRS, 2, tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_another_reference_has_a_cache_of_its_own(live, tmp_path):
    for name in ("a" * 64, "b" * 64):
        precomputed(live, name, PAIRS, 2, tmp_path, CPU)
    assert live.pairs == 2 * len(PAIRS) and len(list(tmp_path.iterdir())) == 2


def test_answers_differ_by_tokens_and_by_where_they_begin():
    pairs = [pair([1, 2], [3], [4]), pair([1], [2, 3], [4]), pair([1, 2, 3], [], [4, 0]), pair([1, 2], [3, 0], [5])]
    assert len(set(answer_keys(pairs))) == 8


def test_swapped_pairs_lists_and_answers_alone_share_what_is_known(live, tmp_path):
    one, other = [1, 2, 3], [4, 5]
    precomputed(live, "a" * 64, [pair([7, 8], one, other)], 2, tmp_path, CPU)
    prompt, *answers = (np.array(ids, dtype=np.int32) for ids in ([7, 8], other, one, [6]))
    alone = EncodedPreference(prompt, (answers[0],), (1.0,), Origin("rows.jsonl", 1), {})
    ranked = EncodedPreference(prompt, tuple(answers), (3.0, 2.0, 1.0), Origin("rows.jsonl", 2), {})
    reference = precomputed(live, "a" * 64, [pair([7, 8], other, one), alone, ranked], 2, tmp_path, CPU)
    assert live.answers == [2, 1]  # the pair at first, then the third answer of the list alone
    torch.testing.assert_close(ask(reference, [ranked]), ask(live, [ranked]), rtol=0, atol=1e-5)


def test_a_write_on_a_full_disk_leaves_the_cache_as_it_was(live, tmp_path, full_disk):
    precomputed(live, "a" * 64, PAIRS[:1], 2, tmp_path, CPU)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    with full_disk(len(before)), pytest.raises(OSError, match="File too large"):
        precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def rename_tensors(path: Path) -> None:
    safetensors.numpy.save_file({"other": np.zeros(3)}, path)


def drop_a_key(path: Path) -> None:
    stored = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**stored, "keys": stored["keys"][1:].copy()}, path)


@pytest.mark.parametrize("damage", [truncate, rename_tensors, drop_a_key])
def test_a_damaged_cache_is_named_in_one_line_with_the_remedy(live, tmp_path, damage: Callable[[Path], None]):
    precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    damage(next(tmp_path.iterdir()))
    with pytest.raises(ValueError, match="a{16}.safetensors: not a reference cache .*; delete it") as caught:
        precomputed(live, "a" * 64, PAIRS, 2, tmp_path, CPU)
    assert "\n" not in str(caught.value)


# ---- what names a cache ----


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
