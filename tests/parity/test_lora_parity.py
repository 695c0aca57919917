"""Our adapters against peft's: the same numbers forward, backward and merged, and files that go both ways."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.config import Phi2Config
from phi2.lora import Computed, LoraLinear, adapter_state, attach, disabled, merge
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM

SIX = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
VARIANTS = {
    "plain": dict(r=4, lora_alpha=4),
    "scaled": dict(r=4, lora_alpha=12),
    "head": dict(r=4, lora_alpha=12, target_modules=[*SIX, "lm_head"]),
    "rslora": dict(r=4, lora_alpha=12, use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=12,
        rank_pattern={"fc1": 2, r"layers\.1\..*_proj": 3, "^model.layers.0.mlp.fc2": 1},
        alpha_pattern={"q_proj|k_proj": 5, "layers.0.mlp.fc1": 7},
    ),
    "all-linear": dict(r=2, lora_alpha=8, target_modules="all-linear"),
    "expression": dict(r=2, lora_alpha=8, target_modules=r".*layers\.1\.(self_attn\.dense|mlp\.fc\d)"),
}
IDS = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(1))


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_pair(dtype=torch.float32, vocab_size=67) -> tuple[Phi2ForCausalLM, PhiForCausalLM]:
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2)
    ids = dict(bos_token_id=0, eos_token_id=0)
    hf = PhiForCausalLM(PhiConfig(vocab_size=vocab_size, resid_pdrop=0.0, **shape, **ids)).eval()
    ours = Phi2ForCausalLM(Phi2Config.from_dict(hf.config.to_dict())).eval()
    ours.load_state_dict(hf.state_dict())
    return ours.to(dtype), hf.to(dtype)


def adapted_pair(dtype=torch.float32, **config) -> tuple[Phi2ForCausalLM, peft.PeftModel]:
    """The same trained-looking adapter in our model and in peft's."""
    config = {"target_modules": SIX, **config}
    ours, hf = base_pair(dtype)
    theirs = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    attach(ours, LoraConfig(**config))
    generator = torch.Generator().manual_seed(2)
    state = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in adapter_state(ours).items()}
    ours.load_state_dict(state, strict=False)
    missing = peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v for k, v in state.items()})
    assert not missing.unexpected_keys
    return ours, theirs


def peft_gradients(theirs: peft.PeftModel) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    return {name.replace(".default", ""): p.grad for name, p in named.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_peft(variant):
    ours, theirs = adapted_pair(**VARIANTS[variant])
    mine, reference = ours(IDS), theirs(IDS).logits
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    for logits in (mine, reference):
        logits.log_softmax(-1).square().mean().backward()
    grads = peft_gradients(theirs)
    assert grads.keys() == adapter_state(ours).keys()
    for name, parameter in zip(adapter_state(ours), trainable(ours), strict=True):
        error = (parameter.grad - grads[name]).abs().max() / grads[name].abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e} of its largest"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_one_layer_is_pefts_bit_for_bit_when_the_scaling_is_a_power_of_two(dtype, dropout, autocast):
    settings = dict(r=4, lora_alpha=8, lora_dropout=dropout)
    base = nn.Linear(48, 40).to(dtype)
    theirs = peft.tuners.lora.Linear(
        nn.Linear(48, 40).to(dtype), "default", peft.LoraConfig(**settings), r=4, lora_alpha=8
    )
    theirs.base_layer.load_state_dict(base.state_dict())
    theirs.lora_A.float(), theirs.lora_B.float()  # what get_peft_model does on a half-precision base
    mine = LoraLinear(base, Computed("default"))
    mine.add("default", 4, 2.0, dropout)
    mine.activate("default")
    pairs = ((mine.lora_A, theirs.lora_A["default"]), (mine.lora_B, theirs.lora_B["default"]))
    with torch.no_grad():
        for ours, other in pairs:
            ours.weight.copy_(other.weight.normal_())
    x = torch.randn(7, 48).to(dtype)
    outputs = []
    for layer in (mine, theirs):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(layer(x))
        outputs[-1].float().square().sum().backward()
    assert torch.equal(*outputs) and outputs[0].dtype == outputs[1].dtype
    for ours, other in pairs:
        torch.testing.assert_close(ours.weight.grad, other.weight.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_peft_by_no_more_than_rounding(dtype):
    ours, theirs = adapted_pair(dtype, **VARIANTS["head"])
    mine, reference = ours(IDS), theirs(IDS).logits
    assert mine.dtype == reference.dtype == dtype
    step = torch.finfo(dtype).eps * reference.abs().max()
    assert (mine.float() - reference.float()).abs().max() <= 2 * step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_weights_equal_peft(dtype):
    ours, theirs = adapted_pair(dtype, **VARIANTS["head"])
    merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == merged.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_switched_off_both_are_the_base():
    ours, theirs = adapted_pair(**VARIANTS["head"])
    base, _ = base_pair()
    with disabled(ours), theirs.disable_adapter():
        assert torch.equal(ours(IDS), base(IDS))
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_peft_loads_what_we_save(variant, tmp_path):
    ours, _ = adapted_pair(**VARIANTS[variant])
    save_adapter(ours, tmp_path, "some/base")
    theirs = peft.PeftModel.from_pretrained(base_pair()[1], tmp_path).eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_we_load_what_peft_saves(variant, tmp_path):
    expected, theirs = adapted_pair(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours, _ = base_pair()
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(IDS), expected(IDS))
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_our_files_hold_the_keys_and_shapes_of_pefts(tmp_path):
    ours, theirs = adapted_pair(**VARIANTS["head"])
    save_adapter(ours, tmp_path / "ours", "base")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, reference = (
        safetensors.torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")
    )
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in reference.items()}
    with safetensors.safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert configs[0].keys() <= configs[1].keys()


def test_an_adapter_of_a_cut_vocabulary_loads_onto_the_whole_base(tmp_path):
    """The form of phi-2-instruct: 51200 rows cut to 50297 for ChatML, then LoRA on lm_head as well."""
    ours, hf = base_pair(vocab_size=80)
    hf.save_pretrained(tmp_path / "base")
    hf = PhiForCausalLM.from_pretrained(tmp_path / "base")
    hf.resize_token_embeddings(67)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **VARIANTS["head"])
    theirs = peft.get_peft_model(hf, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="67 vocabulary rows, the model has 80"):
        load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_grown_vocabulary_loads_as_transformers_grows_it(tmp_path):
    ours, hf = base_pair(vocab_size=60)
    hf.resize_token_embeddings(67)  # new rows: the mean of the others, and a little noise
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **VARIANTS["head"])
    theirs = peft.get_peft_model(hf, config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="67 vocabulary rows, the model has 60"):
        load_adapter(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("also", [dict(use_dora=True), dict(lora_bias=True), dict(init_lora_weights="olora")])
def test_what_peft_computes_otherwise_is_refused_by_name(also, tmp_path):
    _, hf = base_pair()
    peft.get_peft_model(hf, peft.LoraConfig(r=2, target_modules=SIX, **also)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"not supported: {next(iter(also))}"):
        load_adapter(base_pair()[0], tmp_path)


def resized_base(folder, rows):
    """A base of 80 rows on disk, and peft's user's model: the same one with another number of rows."""
    _, hf = base_pair(vocab_size=80)
    hf.save_pretrained(folder)
    hf = PhiForCausalLM.from_pretrained(folder)
    hf.resize_token_embeddings(rows, mean_resizing=False)
    return hf


def assert_loads_and_merges(ours, theirs, folder, ids=IDS):
    load_adapter(ours, folder)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-5)
        merge(ours)
        torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-5)


def trained(config, hf):
    """peft's model with adapters, and modules that are saved whole, away from where they start."""
    theirs = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return theirs.eval()


RESTRICTED = {
    "excluded by ending": dict(target_modules=SIX, exclude_modules=["layers.1.mlp.fc1", "layers.0.mlp.fc2"]),
    "excluded by expression": dict(target_modules="all-linear", exclude_modules=r".*layers\.0\..*|.*fc2"),
    "one block": dict(target_modules=SIX, layers_to_transform=1),
    "blocks of a pattern": dict(target_modules=SIX, layers_to_transform=[0], layers_pattern="layers"),
    "a whole name, and blocks": dict(target_modules=["lm_head", "fc1"], layers_to_transform=[1]),
}


@pytest.mark.parametrize("config", RESTRICTED.values(), ids=RESTRICTED)
def test_restricted_adapters_go_both_ways(config, tmp_path):
    ours, hf = base_pair()
    theirs = trained(config, hf)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", "base")
    back = peft.PeftModel.from_pretrained(base_pair()[1], tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert_loads_and_merges(base_pair()[0], theirs, tmp_path / "theirs")


@pytest.mark.parametrize("config", RESTRICTED.values(), ids=RESTRICTED)
def test_the_layers_chosen_are_pefts(config):
    ours, hf = base_pair()
    attach(ours, LoraConfig(**config))
    theirs = peft.get_peft_model(hf, peft.LoraConfig(**config))
    names = {name.removeprefix("base_model.model.") for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert {name.replace(".default", "") for name in names} == {
        name for name in adapter_state(ours) if "lora_A" in name
    }


@pytest.mark.parametrize("rows", [80, 67, 91])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_modules_saved_whole_load_and_merge(saved, rows, tmp_path):
    theirs = trained(dict(target_modules=SIX, modules_to_save=saved), resized_base(tmp_path / "base", rows))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert_loads_and_merges(base_pair(vocab_size=80)[0], theirs, tmp_path / "adapter")


def test_a_whole_embedding_that_a_resized_vocabulary_leaves_loads_and_merges(tmp_path):
    theirs = trained(dict(target_modules=SIX), resized_base(tmp_path / "base", 67))
    theirs.save_pretrained(tmp_path / "adapter")
    assert_loads_and_merges(base_pair(vocab_size=80)[0], theirs, tmp_path / "adapter")


def test_a_part_saved_whole_is_not_trained_further_nor_lost_in_silence(tmp_path):
    theirs = trained(dict(target_modules=SIX, modules_to_save=["lm_head"]), base_pair()[1])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="brings its own lm_head.weight, lm_head.bias, not to be trained on"):
        load_adapter(base_pair()[0], tmp_path, trainable=True)
    ours = base_pair()[0]
    load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="brought its own lm_head.weight, lm_head.bias: merge it"):
        save_adapter(ours, tmp_path / "again", "base")
    merge(ours)
    attach(ours, LoraConfig(target_modules=("q_proj",)))
    save_adapter(ours, tmp_path / "another", "merged")
