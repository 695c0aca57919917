"""An adapter on another base than its own is told of; on its own, in whatever precision, nothing is said."""

from __future__ import annotations

import warnings

import pytest
import safetensors.torch
import torch

from phi2.checkpoints.convert import convert, merge_adapter
from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.same_base import is_same_base, sample_of_base
from phi2.checkpoints.weights import load, load_model
from phi2.lora import attach, lora_modules, merge
from phi2.lora_config import LoraConfig


@pytest.fixture
def adapter(tiny_phi, tmp_path):
    """The folder of an adapter trained on `tiny_phi`."""
    model = load_model(tiny_phi)
    attach(model, LoraConfig(r=4))
    save_adapter(model, tmp_path / "adapter", "my/base")
    return tmp_path / "adapter"


def test_another_base_of_the_same_shape_is_told_of_when_loading_and_merging(adapter, make_phi, tmp_path):
    other = make_phi(seed=1)
    told = "adapter: trained on my/base, whose weights differ from those of this model"
    with pytest.warns(UserWarning, match=told):
        load(other, adapter=adapter)
    with pytest.warns(UserWarning, match=told):
        merge_adapter(str(other), str(adapter), str(tmp_path / "merged"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_copy_of_the_base_in_another_precision_is_the_same_base(adapter, tiny_phi, tmp_path, stored, dtype):
    copy = convert(str(tiny_phi), str(tmp_path / "copy"), dtype=stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copy, dtype=dtype, adapter=adapter)


def test_another_vocabulary_is_not_another_base(adapter, tiny_phi, tmp_path):
    resized = convert(str(tiny_phi), str(tmp_path / "resized"), vocab_size=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(resized, adapter=adapter)


def test_an_adapter_that_says_nothing_of_its_base_loads_in_silence(adapter, make_phi):
    path = adapter / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(load_model(make_phi(seed=1)), adapter)


def test_a_small_change_of_a_few_layers_makes_another_base(tiny_phi):
    """As a merged adapter does that was trained for a while: its shares of the smallest weights are large."""
    model = load_model(tiny_phi)
    before = sample_of_base(model)
    attach(model, LoraConfig(r=4, target_modules=("q_proj",)))
    for module in lora_modules(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=1e-3)
    merge(model)
    assert not is_same_base(model, before)


def test_the_base_under_an_adapter_is_the_base_alone(tiny_phi):
    model = load_model(tiny_phi)
    before = sample_of_base(model)
    attach(model, LoraConfig(r=4))
    assert sample_of_base(model) == before
