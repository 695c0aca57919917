"""Models that answer side by side: who shares a base, what they are called, and what cannot stand beside another."""

from __future__ import annotations

import json

import pytest
import torch

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.weights import load
from phi2.inference.config import SamplingParams
from phi2.inference.generate import generate
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.serve.policies import loaded_policies
from phi2.serve.side_by_side import ask, stream

HELLO = [{"role": "user", "content": "Hello"}]


def make_adapter(base, folder, seed=0, base_name=None, **config):
    """An adapter that changes what its base says."""
    model, tokenizer = load(base, "cpu")
    attach(model, LoraConfig(r=4, **config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, base_name or str(base))
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_phi, tmp_path_factory):
    """The folders of two LoRA runs on one base, as a run leaves its adapter."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("sft", "dpo")):
        make_adapter(tiny_phi, folder / name / "adapter", seed)
    return folder


def test_adapters_share_their_base_and_each_answers_as_it_would_alone(tiny_phi, runs):
    params = SamplingParams(max_new_tokens=8)
    with loaded_policies([f"base={tiny_phi}"], [str(runs / "sft"), f"other={runs / 'dpo'}"], "cpu") as policies:
        answers = [ask(policy, HELLO, params) for policy in policies]
        list(stream(answers))
        assert [policy.name for policy in policies] == ["base", "sft", "other"]
        assert len({policy.model for policy in policies}) == len({policy.worker for policy in policies}) == 1
    alone = [load(tiny_phi, "cpu", adapter=a) for a in (None, runs / "sft" / "adapter", runs / "dpo" / "adapter")]
    expected = [generate(*loaded, HELLO, max_new_tokens=8).token_ids for loaded in alone]
    assert [[chunk.token_id for chunk in answer.chunks] for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) == 3


def test_a_lora_run_brings_its_base(tiny_phi, runs):
    with loaded_policies([str(runs / "dpo"), str(runs / "sft" / "adapter")], device="cpu") as policies:
        assert [policy.name for policy in policies] == [tiny_phi.name, "dpo", "sft"]
        assert len({policy.model for policy in policies}) == 1


def test_an_adapter_finds_its_base_among_several(make_phi, tiny_phi, runs):
    with loaded_policies([f"a={make_phi(5)}", f"b={tiny_phi}"], [str(runs / "dpo")], "cpu") as policies:
        assert [(policy.name, policy.adapter) for policy in policies] == [("a", None), ("b", None), ("dpo", "dpo")]
        assert policies[1].model is policies[2].model is not policies[0].model


def test_an_adapter_of_other_weights_is_told_of_and_goes_on_the_first(make_phi, runs):
    with pytest.warns(UserWarning, match="whose weights differ"):
        with loaded_policies([f"a={make_phi(5)}"], [str(runs / "dpo")], "cpu") as policies:
            assert policies[0].model is policies[1].model


def test_what_is_trained_in_full_is_a_model(tiny_phi, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model").symlink_to(tiny_phi)
    with loaded_policies([str(tmp_path / "sft")], device="cpu") as policies:
        assert [(policy.name, policy.adapter) for policy in policies] == [("sft", None)]


def refused(models, adapters=()) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        with loaded_policies(models, adapters, "cpu"):
            pass
    return str(told.value)


def test_two_of_one_name_are_refused(tiny_phi, runs):
    assert refused([f"dpo={tiny_phi}"], [str(runs / "dpo")]) == (
        "two models are called dpo: name them, as in NAME=FOLDER"
    )


def test_a_model_is_no_adapter(tiny_phi):
    assert "adapter_config.json: no such file" in refused([f"a={tiny_phi}"], [f"b={tiny_phi}"])


def test_adapters_that_read_otherwise_do_not_share_a_base(tiny_phi, runs, tmp_path):
    other = make_adapter(tiny_phi, tmp_path / "other", 2)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    told = refused([f"a={tiny_phi}"], [str(runs / "sft"), str(other)])
    assert told == f"{other}: its tokenizer or chat template is not that of {runs / 'sft' / 'adapter'}"


def test_an_adapter_with_a_head_of_its_own_does_not_change_its_base_unasked(tiny_phi, tmp_path, make_phi):
    folder = make_adapter(tiny_phi, tmp_path / "headed", 3, target_modules=("q_proj", "lm_head"))
    model, _ = load(make_phi(8), "cpu")
    with pytest.warns(UserWarning, match="whose weights differ"):
        load_adapter(model, folder)
    with pytest.warns(UserWarning, match="whose weights differ"):
        told = refused([f"a={make_phi(8)}"], [str(folder)])
    assert told == f"{folder}: brings a head or embedding of its own: merge it, and give that as a model"


def test_an_adapter_without_a_base_says_so(tiny_phi, tmp_path):
    folder = make_adapter(tiny_phi, tmp_path / "lost")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "does not name its base; give that as the model" in refused([str(folder)])
