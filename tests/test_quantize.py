"""Quantised models: how far they are from the model they were, what they weigh, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phi2
from phi2.checkpoints.peft_files import save_adapter
from phi2.config import Phi2Config
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.quantize import FORMATS, GROUP, QuantizedLinear, quantize_model
from phi2_kernels import weight_forms
from phi2_kernels.weight_forms import quantize_int4

PROMPTS = ["The cat", "What is", "Count"]
TOLERANCE = {"int8": 2e-4, "int4": 4e-3}  # nats a token; bfloat16 alone costs 5e-5


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tiny_model(dtype: torch.dtype = torch.float32, **changes) -> Phi2ForCausalLM:
    shape = dict(vocab_size=75, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    model = Phi2ForCausalLM(Phi2Config(**{**shape, "initializer_range": 0.2, **changes})).to(dtype)
    model.init_weights(seed=1)
    return model.eval()


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.no_grad()
def divergence(model: nn.Module, reference: nn.Module, sequences: list[Tensor]) -> float:
    """Mean KL(reference | model) of a token, in nats."""
    p, q = (torch.cat([m(ids[None])[0].double().log_softmax(-1) for ids in sequences]) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def nano() -> tuple[Phi2ForCausalLM, list[Tensor]]:
    """The embedded model in float32, and what it says."""
    model, tokenizer = phi2.load("nano", "cpu", "float32")
    said = phi2.generate(model, tokenizer, PROMPTS * 4, max_new_tokens=40, temperature=1.0)
    return model, [torch.tensor(reply.token_ids) for reply in said]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_model_predicts_what_the_model_did(nano, format, dtype):
    model, _ = phi2.load("nano", "cpu", dtype, quantize=format)
    assert 0 < divergence(model, *nano) < TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_scales_of_other_rows_are_noticed(nano, format):
    """The tolerance above is no tolerance for a wrong formula."""
    model, _ = phi2.load("nano", "cpu", "float32", quantize=format)
    for name, buffer in model.model.layers.named_buffers():
        if name.endswith("scales"):
            buffer.copy_(buffer.roll(1, dims=0))
    assert divergence(model, *nano) > 5 * TOLERANCE[format]  # int4: 10 on average over many texts, 8 to 13 of a few


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4 + 2 * 16 / GROUP)])
@torch.no_grad()
def test_the_weights_of_the_blocks_take_their_bits(format, bits):
    model = tiny_model(torch.bfloat16)
    blocks = model.model.layers
    weights = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    rows = sum(m.out_features for m in blocks.modules() if isinstance(m, nn.Linear))
    rest = size(blocks) - 2 * weights
    quantize_model(model, format)
    assert size(blocks) == rest + weights * bits / 8 + (2 * rows if format == "int8" else 0)


class Peak(TorchDispatchMode):
    """The most bytes of a device that were in use at a time, of what was made within."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.most, self.known = device, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                storage = tensor.untyped_storage()
                self.known[StorageWeakRef(storage)] = storage.nbytes()
        self.known = {storage: size for storage, size in self.known.items() if not storage.expired()}
        self.most = max(self.most, sum(self.known.values()))
        return made


@pytest.mark.parametrize("format", FORMATS)
def test_a_device_never_holds_more_than_the_quantised_model_and_one_weight(format, monkeypatch):
    monkeypatch.setattr(weight_forms, "SLICE", 256)
    model, device = tiny_model(torch.bfloat16, vocab_size=600, intermediate_size=256), torch.device("meta")
    largest = 2 * model.lm_head.weight.numel()
    with Peak(device) as peak:
        quantize_model(model, format, device)
    assert {tensor.device for tensor in model.state_dict().values()} == {device}
    assert size(model) < peak.most < 1.05 * size(model) + largest


def test_the_head_stays_int8_where_the_blocks_are_int4():
    model = tiny_model()
    quantize_model(model, "int4")
    assert model.lm_head.form.zeros is None and model.model.layers[0].mlp.fc1.form.group == GROUP


@torch.no_grad()
def test_torchs_packed_codes_are_our_codes():
    """One product by torch's kernel for bfloat16 on a CPU, and by the formula of `gemv` in float64."""
    linear, x = nn.Linear(64, 48).bfloat16(), torch.randn(3, 5, 64, dtype=torch.bfloat16)
    weight = quantize_int4(linear.weight.detach(), GROUP).dense().double()
    expected = x.double() @ weight.T + linear.bias.double()
    model = nn.ModuleDict({"fc": linear})
    quantize_model(model, "int4")
    assert not isinstance(model["fc"], QuantizedLinear)
    assert (model["fc"](x) - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_model_generates_in_the_dtype_of_its_embeddings(tiny_tokenizer, format):
    model = tiny_model(torch.bfloat16, vocab_size=300)
    plain = phi2.generate(model, tiny_tokenizer, "abc", max_new_tokens=8)
    quantize_model(model, format)
    assert model.dtype == torch.bfloat16
    said = phi2.generate(model, tiny_tokenizer, "abc", max_new_tokens=8)
    assert len(said.token_ids) == len(plain.token_ids) and said.token_ids[0] == plain.token_ids[0]


def test_loading_merges_an_adapter_before_it_quantises(tiny_phi, tmp_path):
    adapted, _ = phi2.load(tiny_phi, "cpu", "float32")
    attach(adapted, LoraConfig(r=4))
    for parameter in trainable(adapted):
        nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, tmp_path, str(tiny_phi))
    quantised, _ = phi2.load(tiny_phi, "cpu", "float32", adapter=tmp_path, quantize="int8")
    base, _ = phi2.load(tiny_phi, "cpu", "float32")
    sequences = [torch.randint(0, 256, (20,))]
    assert divergence(quantised, adapted, sequences) < 0.05 * divergence(base, adapted, sequences)


def test_a_cpu_loads_quantised_weights_in_bfloat16_unless_told(tiny_phi):
    assert phi2.load(tiny_phi, "cpu", quantize="int8")[0].dtype == torch.bfloat16
    assert phi2.load(tiny_phi, "cpu", "float32", quantize="int8")[0].dtype == torch.float32


def test_what_cannot_be_quantised_is_refused(tiny_tokenizer, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="the format must be one of int8, int4, got 'int3'"):
        quantize_model(model, "int3")
    with pytest.raises(ValueError, match="groups of 32, model.layers.0.self_attn.q_proj has 80 columns"):
        quantize_model(tiny_model(hidden_size=80), "int4")
    attach(model, LoraConfig(r=4))
    with pytest.raises(ValueError, match="merge it before quantising"):
        quantize_model(model, "int8")


def test_a_quantised_model_is_neither_quantised_again_nor_saved(tiny_tokenizer, tmp_path):
    model = tiny_model()
    quantize_model(model, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, "int4")
    with pytest.raises(ValueError, match="the model is quantised"):
        phi2.save_pretrained(model, tiny_tokenizer, tmp_path / "model")
