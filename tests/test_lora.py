"""Adapters on a small random Phi: what they change, what they leave alone, and what a folder of them must refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phi2.config import Phi2Config
from phi2.lora import (
    LoraConfig,
    LoraLinear,
    adapter_parameters,
    adapter_state,
    attach,
    disabled,
    has_adapter,
    lora_modules,
    merge,
    target_names,
)
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.peft_files import load_adapter, save_adapter

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


def write_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict, dict[str, torch.Tensor]]:
    """A folder that loads, and what is in it."""
    folder = tmp_path / "adapter"
    save_adapter(adapted_model(), folder, "base")
    return (
        folder,
        json.loads((folder / "adapter_config.json").read_text()),
        safetensors.torch.load_file(folder / "adapter_model.safetensors"),
    )


# ---- attach ----


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
    assert {id(p) for p in adapter_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


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
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert model(IDS).dtype == dtype


def test_phi_2_with_the_recipe_of_phi_2_instruct_has_24438672_parameters_to_train():
    with torch.device("meta"):
        model = Phi2ForCausalLM(Phi2Config(vocab_size=50297))
    attach(model, LoraConfig(r=16, target_modules=SEVEN))
    assert sum(p.numel() for p in adapter_parameters(model)) == 24_438_672
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_target_that_matches_nothing_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"o_proj, Wqkv match no linear layer.*q_proj, k_proj.*lm_head"):
        attach(small_model(), LoraConfig(target_modules=("q_proj", "o_proj", "Wqkv")))


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
    wanted = torch.autograd.grad(logits.log_softmax(-1).square().mean(), adapter_parameters(model))
    for name, grad in zip(adapter_state(model), wanted, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_is_drawn_again_alike_under_activation_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapted_model(lora_dropout=0.5).train()
        model.model.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        loss_of(model).backward()
        grads.append([p.grad for p in adapter_parameters(model)])
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
    assert {p.grad.dtype for p in adapter_parameters(model)} == {torch.float32}


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
        assert not model.lm_head.enabled
    assert model.lm_head.enabled


def test_an_exception_inside_disabled_switches_the_adapter_on_again():
    model = adapted_model()
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert all(module.enabled for module in lora_modules(model).values())


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
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_merging_rounds_the_sum_once():
    model = adapted_model(torch.bfloat16)
    fc1 = model.model.layers[0].mlp.fc1
    exact = fc1.weight.double() + fc1.scaling * (fc1.lora_B.weight.double() @ fc1.lora_A.weight.double())
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


# ---- files ----


@pytest.mark.parametrize("settings", [{}, {"target_modules": "all-linear"}, {"rank_pattern": {"fc1": 2}}])
def test_a_saved_adapter_loads_to_the_same_model(tmp_path, settings):
    model = adapted_model(**settings)
    save_adapter(model, tmp_path, "base")
    again = small_model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert again.lora_config == model.lora_config


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_trains_only_when_asked_to(saved, trainable):
    model = small_model()
    load_adapter(model, saved[0], trainable=trainable)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == (list(adapter_state(model)) * trainable)


def test_an_adapter_on_lm_head_brings_its_head(saved):
    other = small_model()
    nn.init.ones_(other.lm_head.weight)
    load_adapter(other, saved[0])
    assert torch.equal(other(IDS), adapted_model()(IDS))


@pytest.mark.parametrize(("had", "warning"), [(80, "last embeddings are dropped"), (60, "mean of the others")])
def test_the_vocabulary_follows_the_head_of_the_adapter(saved, had, warning):
    model = small_model(vocab_size=had)
    old = model.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match=f"67 vocabulary rows, the model has {had}: .*{warning}"):
        load_adapter(model, saved[0])
    new = model.model.embed_tokens.weight
    assert model.model.embed_tokens.num_embeddings == model.lm_head.out_features == 67
    assert new.shape[0] == model.config.vocab_size == model.model.config.vocab_size == 67
    assert torch.equal(new[: min(had, 67)], old[:67])
    for row in new[had:]:
        torch.testing.assert_close(row, old.mean(0))
    assert torch.equal(model.lm_head(old), adapted_model().lm_head(old))


def test_targets_of_other_architectures_are_passed_over(saved, tmp_path):
    _, config, tensors = saved
    folder = write_folder(tmp_path / "x", {**config, "target_modules": [*SEVEN, "o_proj"], "brand_new": 3}, tensors)
    model = small_model()
    load_adapter(model, folder)
    assert len(lora_modules(model)) == 13


def test_every_unsupported_feature_is_named_in_one_line(saved, tmp_path):
    _, config, tensors = saved
    changes = {
        "use_dora": True,
        "bias": "lora_only",
        "init_lora_weights": "pissa_niter_4",
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [0],
        "trainable_token_indices": [1],
    }
    tensors = {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(1)}
    folder = write_folder(tmp_path / "x", {**config, **changes}, tensors)
    with pytest.raises(ValueError, match="not supported") as error:
        load_adapter(small_model(), folder)
    message = str(error.value)
    assert all(name in message for name in (*changes, "LoRA on embed_tokens", str(folder))) and "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "ADALORA"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["fc1"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("target_parameters", ["fc1.weight"]),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_each_unsupported_feature_is_refused(saved, tmp_path, key, value):
    folder = write_folder(tmp_path / "x", {**saved[1], key: value}, saved[2])
    with pytest.raises(ValueError, match=f"not supported: {key}"):
        load_adapter(small_model(), folder)


def test_missing_unexpected_and_misshapen_tensors_are_told_together_and_the_model_is_untouched(saved, tmp_path):
    _, config, tensors = saved
    prefix = "base_model.model.model.layers.0.mlp."
    del tensors[f"{prefix}fc1.lora_A.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors[f"{prefix}fc2.lora_B.weight"] = torch.zeros(3, 4)
    folder = write_folder(tmp_path / "x", config, tensors)
    model = small_model(vocab_size=80)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as error:
        load_adapter(model, folder)
    message = str(error.value)
    for part in (
        "adapter_model.safetensors",
        "1 tensors missing: model.layers.0.mlp.fc1.lora_A.weight",
        "1 tensors unexpected: stranger",
        "model.layers.0.mlp.fc2.lora_B.weight (3, 4), not (64, 4)",
    ):
        assert part in message
    assert model.config.vocab_size == 80
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


@pytest.mark.parametrize("changes", [{"r": None}, {"target_modules": ["Wqkv"]}, {"r": "16"}, {"lora_alpha": 0}])
def test_a_wrong_adapter_config_is_one_line_naming_the_file(saved, tmp_path, changes):
    folder = write_folder(tmp_path / "x", {**saved[1], **changes}, saved[2])
    with pytest.raises(ValueError, match=r"x/adapter_config.json: ") as error:
        load_adapter(small_model(), folder)
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(LoraConfig)] + ["bias", "peft_type", "use_dora"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=4,
        ),
    )
)
def test_no_adapter_config_makes_anything_but_a_value_error(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        save_adapter(adapted_model(), folder, "base")
    path = folder / "adapter_config.json"
    config = {"r": 4, "lora_alpha": 16, "target_modules": list(SEVEN)}
    path.write_text(json.dumps({**config, **changes}))
    try:
        load_adapter(small_model(), folder)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_a_broken_weights_file_is_one_line_naming_it(saved, content):
    (saved[0] / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a readable safetensors file") as error:
        load_adapter(small_model(), saved[0])
    assert "\n" not in str(error.value)


def test_a_broken_config_file_is_one_line_naming_it(saved):
    (saved[0] / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not valid JSON"):
        load_adapter(small_model(), saved[0])


def test_an_adapter_that_is_only_a_pickle_is_refused_with_the_reason(saved):
    (saved[0] / "adapter_model.safetensors").rename(saved[0] / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        load_adapter(small_model(), saved[0])


def test_a_second_adapter_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(adapted_model(), tmp_path / "nowhere")


def test_saving_over_an_adapter_replaces_it_and_leaves_other_files(saved):
    folder = saved[0]
    (folder / "README.md").write_text("card")
    model = adapted_model(r=2)
    save_adapter(model, folder, "base")
    again = small_model()
    load_adapter(again, folder)
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_whoever_reads_the_old_adapter_while_a_new_one_is_saved_keeps_it_whole(saved):
    path = saved[0] / "adapter_model.safetensors"
    old = path.read_bytes()
    with open(path, "rb") as reader:
        save_adapter(adapted_model(r=2), saved[0], "base")
        assert reader.read() == old
    assert path.read_bytes() != old


def test_a_full_disk_leaves_the_old_adapter_whole(saved, monkeypatch):
    folder, _, tensors = saved

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted_model(r=2), folder, "base")
    assert len(list(folder.iterdir())) == 2
    again = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_saved_adapter_can_be_read_by_whoever_may_read_other_files(saved):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved[0].iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_saving_needs_an_adapter_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(small_model(), tmp_path, "base")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        save_adapter(adapted_model(), tmp_path / "file", "base")


def test_a_layer_keeps_its_training_mode():
    assert not LoraLinear(nn.Linear(3, 2).eval(), 1, 1.0, 0.0).training
