"""A folder with an adapter: what comes back from it, what it must refuse, and that a bad moment does not destroy it."""

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

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.config import Phi2Config
from phi2.lora import adapter_state, attach, lora_modules
from phi2.lora_config import LoraConfig
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


def small_model(**changes) -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(dataclasses.replace(SMALL, **changes))
    model.init_weights(0)
    return model.eval()


def adapted_model(**settings) -> Phi2ForCausalLM:
    """With an adapter that has learned something: B is not zero."""
    model = small_model()
    attach(model, LoraConfig(**{"r": 4, "target_modules": SEVEN, **settings}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.weight.normal_(0, 0.1, generator=generator)
    return model


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
        "modules_to_save": ["final_layernorm"],
        "layer_replication": [[0, 1]],
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
        ("modules_to_save", ["input_layernorm"]),
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


def test_a_field_that_nobody_knows_is_named(saved, tmp_path):
    folder = write_folder(tmp_path / "x", {**saved[1], "use_whatever": True, "and_this": None}, saved[2])
    with pytest.warns(UserWarning, match="not read: use_whatever True$"):
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


def test_an_adapter_is_the_same_file_whenever_it_is_saved(tmp_path):
    model = adapted_model()
    for number in range(8):
        save_adapter(model, tmp_path / str(number), "base")
    files = {(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(8)}
    assert len(files) == 1


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
