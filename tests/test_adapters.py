"""Several adapters by name on one base, and a base of any form under an adapter."""

from __future__ import annotations

import copy

import pytest
import torch

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.config import Phi2Config
from phi2.fused import fuse
from phi2.lora import (
    LoraLinear,
    activate,
    adapter_state,
    attach,
    computing,
    copy_adapter,
    detach,
    disabled,
    has_adapter,
    lora_modules,
    merge,
)
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.quantize import Int4LinearOnCPU, QuantizedLinear, quantize_model

SHAPE = dict(vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
IDS = torch.randint(80, (2, 9), generator=torch.Generator().manual_seed(1))
SEVEN = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")


def make_model(dtype: torch.dtype = torch.float32) -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(Phi2Config(**SHAPE, resid_pdrop=0.0, initializer_range=0.1)).to(dtype)
    model.init_weights(0)
    return model.eval()


def learn(model: Phi2ForCausalLM, seed: int) -> None:
    """Moves the active adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.normal_(0, 0.1, generator=generator)


def adapted_alone(seed: int, config: LoraConfig) -> torch.Tensor:
    """Logits of a model that has this adapter and no other."""
    model = make_model()
    attach(model, config)
    learn(model, seed)
    return model(IDS)


# ---- by name ----


@pytest.mark.parametrize("second", [("q_proj", "fc2"), ("dense", "lm_head")], ids=["same layers", "other layers"])
def test_each_adapter_computes_as_if_it_were_alone(second):
    configs = {"a": LoraConfig(r=4, target_modules=("q_proj", "fc2")), "b": LoraConfig(r=2, target_modules=second)}
    model = make_model()
    for seed, (name, config) in enumerate(configs.items()):
        attach(model, config, name=name)
        learn(model, seed)
    for seed, (name, config) in enumerate(configs.items()):
        activate(model, name)
        assert torch.equal(model(IDS), adapted_alone(seed, config))
        assert model.lora_config == config
    with disabled(model):
        assert torch.equal(model(IDS), make_model()(IDS))


def test_only_the_active_adapter_is_part_of_the_model():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=2, target_modules=("fc1",)), name="b")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_state(model)) == set(model.state_dict()) - set(make_model().state_dict())
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained} == {"fc1"}


def test_an_adapter_that_comes_back_is_still_trained():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=2), name="b")
    activate(model, "a")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_state(model))


def test_an_adapter_that_rests_moves_along_with_the_model():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=4), name="b")
    model.double()
    activate(model, "a")
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {torch.float64}


def test_a_copy_shares_nothing_with_its_original():
    model = make_model()
    attach(model, LoraConfig(r=4, target_modules=SEVEN))
    twin = copy.deepcopy(model)
    before = twin(IDS)
    learn(model, 1)
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight.zero_()
    assert torch.equal(twin(IDS), before)


def test_an_adapter_that_is_kept_under_another_name_stays_as_it_was_and_trains_nothing():
    model = make_model()
    attach(model, LoraConfig(r=4, lora_alpha=12, target_modules=("q_proj", "fc2", "lm_head")))
    learn(model, 0)
    trained, expected = [name for name, p in model.named_parameters() if p.requires_grad], model(IDS)
    copy_adapter(model, "before")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    learn(model, 1)
    assert not torch.equal(model(IDS), expected)
    with computing(model, "before"):
        assert torch.equal(model(IDS), expected)
    with pytest.raises(ValueError, match="^the model has an adapter 'before' already$"):
        copy_adapter(model, "before")


def test_what_is_detached_leaves_the_model_as_it_was():
    model = make_model()
    names, before = list(dict(model.named_parameters())), copy.deepcopy(model.state_dict())
    attach(model, LoraConfig(r=4, target_modules=SEVEN))
    learn(model, 1)
    detach(model)
    assert list(dict(model.named_parameters())) == names and not has_adapter(model) and model.lora_config is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_one_adapter_is_detached_and_the_other_stays():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    learn(model, 1)
    expected = model(IDS)
    attach(model, LoraConfig(r=2, target_modules=SEVEN), name="b")
    detach(model, "b")
    activate(model, "a")
    assert torch.equal(model(IDS), expected) and list(model.adapters) == ["a"]


def test_a_name_that_is_not_there_is_told_with_those_that_are():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    with pytest.raises(ValueError, match="no adapter 'b'; it has a$"):
        activate(model, "b")


def test_two_adapters_are_not_merged_at_once():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=4), name="b")
    with pytest.raises(ValueError, match="adapters a, b: detach all but one"):
        merge(model)


def test_a_second_adapter_with_another_head_under_it_is_refused(tmp_path):
    model, other = make_model(), make_model()
    for one, name in ((model, "a"), (other, "b")):
        if name == "b":
            with torch.no_grad():
                other.lm_head.weight.add_(1.0)
        attach(one, LoraConfig(r=4, target_modules=SEVEN))
        save_adapter(one, tmp_path / name, "base")
    before = model(IDS)
    with pytest.raises(ValueError, match="b: brings its own lm_head.weight, not for a model with other adapters"):
        load_adapter(model, tmp_path / "b", adapter_name="b")
    assert torch.equal(model(IDS), before)
    load_adapter(model, tmp_path / "a", adapter_name="again")
    assert torch.equal(model(IDS), before)


def test_an_adapter_with_a_float_head_is_not_put_on_codes(tmp_path):
    model, quantised = make_model(), make_model()
    attach(model, LoraConfig(r=4, target_modules=SEVEN))
    save_adapter(model, tmp_path, "base")
    quantize_model(quantised, "int8")
    with pytest.raises(ValueError, match="brings its own lm_head.weight: load it before the model is quantised"):
        load_adapter(quantised, tmp_path)


def test_a_model_with_an_adapter_that_rests_is_neither_quantised_nor_merged():
    model = make_model()
    attach(model, LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=4), name="b")
    detach(model, "b")
    with pytest.raises(ValueError, match="has an adapter: merge it before quantising"):
        quantize_model(model, "int8")
    with pytest.raises(ValueError, match="no adapter is active; the model has a"):
        merge(model)


def test_blocks_of_codes_are_not_fused():
    model = make_model()
    quantize_model(model, "int8")
    with pytest.raises(ValueError, match="multiply with float weights, and this model's are torch.int8"):
        fuse(model)


# ---- on any base ----


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_a_quantised_base_learns_as_on_the_same_numbers_in_float(form, dtype):
    quantised = make_model(dtype)
    quantize_model(quantised, form)
    floating = make_model(dtype)
    with torch.no_grad():
        for name, linear in quantised.named_modules():
            if isinstance(linear, QuantizedLinear | Int4LinearOnCPU):
                floating.get_submodule(name).weight.copy_(linear.dense())
    losses, gradients = [], []
    for model in (quantised, floating):
        attach(model, LoraConfig(r=4))
        learn(model, 1)
        loss = -model(IDS).float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()


def test_an_adapter_on_a_quantised_base_keeps_the_names_of_the_base():
    model = make_model()
    quantize_model(model, "int8")
    before = set(model.state_dict())
    attach(model, LoraConfig(r=4))
    assert set(model.state_dict()) - before == set(adapter_state(model))
    assert len(lora_modules(model)) == 12


def test_an_adapter_is_not_merged_into_codes():
    model = make_model()
    quantize_model(model, "int8")
    attach(model, LoraConfig(r=4))
    with pytest.raises(ValueError, match=r"q_proj: an adapter can be merged into a float weight only, got torch.int8"):
        merge(model)
