"""Adapters on a small random Phi: what they change, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from phi2.config import Phi2Config
from phi2.lora import (
    Computed,
    LoraLinear,
    adapter_state,
    attach,
    disabled,
    has_adapter,
    lora_modules,
    merge,
)
from phi2.lora_config import LoraConfig
from phi2.lora_targets import target_names
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM

SMALL = Phi2Config(
    vocab_size=67,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    resid_pdrop=0.0,
    eos_token_id=0,
    bos_token_id=0,
)
SEVEN = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")
IDS = torch.randint(SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def small_model(dtype=torch.float32, **changes) -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(dataclasses.replace(SMALL, **changes))
    model.init_weights(0)
    return model.to(dtype).eval()


def adapted_model(dtype=torch.float32, **settings) -> Phi2ForCausalLM:
    """With an adapter that has learned something: B is not zero."""
    model = small_model(dtype)
    attach(model, LoraConfig(**{"r": 4, "target_modules": SEVEN, **settings}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.weight.normal_(0, 0.1, generator=generator)
    return model


def loss_of(model: Phi2ForCausalLM) -> torch.Tensor:
    return model(IDS).float().log_softmax(-1).square().mean()


# ---- attach ----


def test_a_dict_is_no_config_of_adapters():
    with pytest.raises(ValueError, match="^config must be a LoraConfig, got dict$"):
        attach(small_model(), {"r": 4})


def test_a_fresh_adapter_changes_nothing():
    model = small_model()
    before = model(IDS)
    attach(model, LoraConfig(target_modules=SEVEN))
    assert torch.equal(model(IDS), before)


def test_only_the_adapter_is_left_to_train():
    model = small_model()
    attach(model, LoraConfig(r=4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_state(model))


def test_base_parameters_keep_their_names_and_stay_the_same_objects():
    model = small_model()
    before = dict(model.named_parameters())
    attach(model, LoraConfig(target_modules=SEVEN))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_the_seed_alone_decides_the_fresh_adapter():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # the global generator must not matter
        model = small_model()
        attach(model, LoraConfig(r=4), seed=seed)
        states.append(adapter_state(model))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.fc1.lora_A.weight"], other["model.layers.0.mlp.fc1.lora_A.weight"])
    q, k = (first[f"model.layers.0.self_attn.{name}.lora_A.weight"] for name in ("q_proj", "k_proj"))
    assert not torch.equal(q, k)


def test_attach_leaves_the_global_generator_alone():
    model = small_model()
    before = torch.get_rng_state()
    attach(model, LoraConfig(r=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_starts_uniform_within_one_over_the_square_root_of_its_width():
    model = small_model()
    attach(model, LoraConfig(r=16))
    start = model.model.layers[0].mlp.fc2.lora_A.weight  # (16, 96)
    bound = 96**-0.5
    assert start.abs().max() <= bound
    assert start.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_on_a_half_precision_base(dtype):
    model = adapted_model(dtype)
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert model(IDS).dtype == dtype


def test_phi_2_with_the_recipe_of_phi_2_instruct_has_24438672_parameters_to_train():
    with torch.device("meta"):
        model = Phi2ForCausalLM(Phi2Config(vocab_size=50297))
    attach(model, LoraConfig(r=16, target_modules=SEVEN))
    assert sum(p.numel() for p in trainable(model)) == 24_438_672
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_target_that_matches_nothing_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"o_proj, Wqkv match no linear layer.*q_proj, k_proj.*lm_head"):
        attach(small_model(), LoraConfig(target_modules=("q_proj", "o_proj", "Wqkv")))


def test_a_single_name_that_matches_nothing_is_said_to_be_a_pattern():
    with pytest.raises(ValueError, match=r"q_proj match no .*is a pattern.*in a list, \[q_proj\]\); layers"):
        attach(small_model(), LoraConfig(target_modules="q_proj"))


def test_an_embedding_is_no_target():
    with pytest.raises(ValueError, match="embed_tokens match no linear layer"):
        attach(small_model(), LoraConfig(target_modules=("embed_tokens",)))


def test_a_pattern_that_matches_no_targeted_layer_is_named():
    with pytest.raises(ValueError, match="rank_pattern fc1 match no targeted layer"):
        attach(small_model(), LoraConfig(target_modules=("q_proj",), rank_pattern={"fc1": 2}))


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(adapted_model(), LoraConfig())


# ---- the configuration ----


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("q_proj",), 2),
        (("layers.0.mlp.fc1", "lm_head"), 2),
        (("proj",), 0),  # endings are whole parts of a name
        ("all-linear", 12),
        (r".*\.layers\.1\..*_proj", 3),
        ("q_proj", 0),  # one string is an expression for the whole name
    ],
)
def test_targets_choose_layers_as_in_peft(targets, count):
    assert len(target_names(small_model(), LoraConfig(target_modules=targets))) == count


def test_scaling_follows_the_patterns_and_rslora():
    config = LoraConfig(r=16, lora_alpha=32, rank_pattern={"fc1": 4, r"layers\.1\..*": 8}, alpha_pattern={"fc1": 2})
    assert config.scaling("model.layers.0.self_attn.q_proj") == 2.0
    assert config.rank("model.layers.1.mlp.fc1") == 4  # the first pattern that matches
    assert config.scaling("model.layers.1.mlp.fc1") == 0.5
    assert config.rank("model.layers.1.mlp.fc2") == 8
    assert dataclasses.replace(config, use_rslora=True).scaling("lm_head") == 8.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", 8.0),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_dropout", 1.0),
        ("target_modules", ()),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", "(unclosed"),
        ("use_rslora", "yes"),
        ("rank_pattern", ["fc1"]),
        ("rank_pattern", {"fc1": 1.5}),
        ("alpha_pattern", {"(?i)fc1": 2}),
    ],
)
def test_a_wrong_value_is_one_line_naming_it(name, value):
    with pytest.raises(ValueError, match=name) as error:
        LoraConfig(**{name: value})
    assert "\n" not in str(error.value)


# ---- forward and backward ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_formula(checkpointing):
    model = adapted_model(lora_alpha=6)
    model.model.activation_checkpointing = checkpointing
    loss_of(model).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == adapter_state(model).keys()
    explicit = small_model()  # the same model with its changed weights written out
    changed = {n: m.weight + 1.5 * m.lora_B.weight @ m.lora_A.weight for n, m in lora_modules(model).items()}
    weights = {f"{name}.weight": weight for name, weight in changed.items()}
    logits = torch.func.functional_call(explicit, weights, (IDS,))
    wanted = torch.autograd.grad(logits.log_softmax(-1).square().mean(), trainable(model))
    for name, grad in zip(adapter_state(model), wanted, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_is_drawn_again_alike_under_activation_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapted_model(lora_dropout=0.5).train()
        model.model.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        loss_of(model).backward()
        grads.append([p.grad for p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_on_the_adapter_alone_and_only_while_training():
    model = adapted_model(lora_dropout=0.5)
    quiet = model(IDS)
    assert torch.equal(model(IDS), quiet)
    model.train()
    assert not torch.equal(model(IDS), quiet)
    with disabled(model):
        assert torch.equal(model(IDS), small_model()(IDS))


def test_under_autocast_the_adapter_runs_in_half_precision_and_learns_in_float32():
    model = adapted_model()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS)
        loss_of(model).backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(IDS), rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in trainable(model)} == {torch.float32}


def test_the_head_computes_the_adapted_log_probabilities_without_calling_lm_head():
    model = adapted_model(lora_alpha=12)
    hidden, targets = model.model(IDS), torch.arange(IDS.numel())
    got, _ = target_logps(model, hidden, torch.arange(IDS.numel()), targets)
    wanted = model.lm_head(hidden).flatten(0, 1).log_softmax(-1)[targets, targets]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# ---- disabled ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_the_model_is_its_base_bit_for_bit(dtype):
    model = adapted_model(dtype)
    adapted = model(IDS)
    with disabled(model):
        assert torch.equal(model(IDS), small_model(dtype)(IDS))
    assert torch.equal(model(IDS), adapted)


def test_disabled_nests():
    model = adapted_model()
    with disabled(model):
        with disabled(model):
            pass
        assert model.lm_head.adapter is None
    assert model.lm_head.adapter


def test_an_exception_inside_disabled_switches_the_adapter_on_again():
    model = adapted_model()
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert all(module.adapter for module in lora_modules(model).values())


def test_disabled_needs_an_adapter():
    with pytest.raises(ValueError, match="no adapter"), disabled(small_model()):
        pass


# ---- merge ----


def test_a_merged_model_computes_what_the_adapted_one_did():
    model = adapted_model(lora_alpha=12)
    before = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), before, rtol=1e-5, atol=1e-6)


def test_a_merged_model_is_a_plain_one():
    model = adapted_model()
    merge(model)
    assert not has_adapter(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in small_model().modules()]
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_merging_rounds_the_sum_once():
    model = adapted_model(torch.bfloat16)
    fc1 = model.model.layers[0].mlp.fc1
    exact = fc1.weight.double() + fc1.active.scaling * (fc1.lora_B.weight.double() @ fc1.lora_A.weight.double())
    merge(model)
    merged = model.model.layers[0].mlp.fc1.weight
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.999  # the rest: float32 falls on a tie


def test_a_sum_that_is_not_finite_names_its_layer_and_leaves_its_weight():
    model = adapted_model(torch.float16)
    fc2 = model.model.layers[1].mlp.fc2
    before = fc2.weight.clone()
    fc2.lora_B.weight.data[3] = 1e6
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.fc2: .*not finite in torch.float16"):
        merge(model)
    assert torch.equal(fc2.weight, before)


def test_merge_needs_an_adapter():
    with pytest.raises(ValueError, match="no adapter"):
        merge(small_model())


def test_after_merging_a_new_adapter_can_be_attached():
    model = adapted_model()
    merge(model)
    attach(model, LoraConfig(r=2))
    assert len(lora_modules(model)) == 12


def test_a_layer_keeps_its_training_mode():
    layer = LoraLinear(nn.Linear(3, 2).eval(), Computed())
    layer.add("a", 1, 1.0, 0.0)
    layer.activate("a")
    assert not layer.training and not layer.lora_dropout.training


def test_what_is_excluded_may_be_a_whole_target():
    model = small_model()
    attach(model, LoraConfig(target_modules=("q_proj", "fc1"), exclude_modules=("fc1",)))
    assert {name.rpartition(".")[2] for name in lora_modules(model)} == {"q_proj"}


@pytest.mark.parametrize(
    ("restriction", "message"),
    [
        ({"exclude_modules": ("k_proj",)}, "^exclude_modules k_proj match no targeted layer, such as"),
        ({"exclude_modules": "nothing"}, "^exclude_modules nothing match no targeted layer, such as"),
        ({"layers_to_transform": (0, 9)}, "^layers_to_transform 9 match no targeted layer, such as"),
        ({"exclude_modules": ("q_proj", "fc1")}, "^exclude_modules and layers_to_transform leave none of the"),
        ({"layers_pattern": "layers"}, "^layers_pattern layers needs layers_to_transform, got none"),
        ({"layers_to_transform": -1}, "^layers_to_transform must be a number of a block, or a list of them, got -1"),
    ],
    ids=str,
)
def test_a_restriction_that_restricts_nothing_or_leaves_nothing_is_refused(restriction, message):
    with pytest.raises(ValueError, match=message):
        attach(small_model(), LoraConfig(target_modules=("q_proj", "fc1"), **restriction))
