"""A resumed run notices that its rows or its frozen weights are not those it began with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from phi2.training.inputs import digest_of_frozen
from phi2.training.sft import train
from phi2.weights import load_model


@pytest.fixture
def begun(sft_config, sft_data, tiny_phi, tmp_path):
    """A finished run over its own copies of the model and the data, and its configuration."""
    model, data = shutil.copytree(tiny_phi, tmp_path / "model"), shutil.copy(sft_data, tmp_path / "rows.jsonl")
    config = sft_config(model=str(model), data=str(data), max_steps=2)
    train(config)
    return config


def test_a_run_resumes_over_the_same_inputs(begun):
    assert train(dataclasses.replace(begun, resume=True)) == Path(begun.output)


def test_rows_that_changed_are_noticed(begun):
    with Path(begun.data).open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(ValueError, match="the data changed since this run began; it cannot be resumed"):
        train(dataclasses.replace(begun, resume=True))


def test_another_base_under_the_same_name_is_noticed(begun, make_phi):
    shutil.copy(make_phi(seed=1) / "model.safetensors", begun.model)
    with pytest.raises(ValueError, match="the base model changed since this run began"):
        train(dataclasses.replace(begun, resume=True))


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.1.mlp.fc1.weight"])
def test_every_frozen_weight_counts(tiny_phi, name):
    model = load_model(tiny_phi).requires_grad_(False)
    before = digest_of_frozen(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.001)
    assert digest_of_frozen(model) != before


def test_weights_that_train_do_not_count(tiny_phi):
    model = load_model(tiny_phi).requires_grad_(True)
    assert digest_of_frozen(model) == digest_of_frozen(torch.nn.Linear(2, 2))
