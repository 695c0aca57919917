"""Checkpoints against transformers, both ways: what it saves loads here, what we save loads there, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi2.checkpoints.weights import load_model, save_pretrained
from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SHAPES = {
    "phi-2": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4, resid_pdrop=0.1),
    "phi-1.5": dict(hidden_size=256, num_attention_heads=4, partial_rotary_factor=0.5),
    "qk-layernorm": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4, qk_layernorm=True),
    "grouped": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4, num_key_value_heads=2),
}
EXTRA = dict(vocab_size=331, intermediate_size=640, num_hidden_layers=2, bos_token_id=7, eos_token_id=7)
SAME_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings layer_norm_eps qk_layernorm resid_pdrop embd_pdrop attention_dropout initializer_range "
    "bos_token_id eos_token_id pad_token_id"
).split()


def assert_same_tensors(ours: Phi2ForCausalLM, theirs: torch.nn.Module) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_config(ours: Phi2Config, theirs) -> None:
    assert {f: getattr(ours, f) for f in SAME_FIELDS} == {f: getattr(theirs, f) for f in SAME_FIELDS}
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.partial_rotary_factor) == (rope["rope_theta"], rope["partial_rotary_factor"])


@pytest.mark.parametrize(
    ("shape", "dtype", "max_shard_size"),
    [
        ("phi-2", torch.float32, "5GB"),
        ("phi-2", torch.float16, "1MB"),
        ("phi-1.5", torch.bfloat16, "1MB"),
        ("qk-layernorm", torch.float32, "5GB"),
        ("grouped", torch.float32, "5GB"),
    ],
)
def test_what_transformers_saves_loads_here(tmp_path, shape, dtype, max_shard_size):
    torch.manual_seed(0)
    theirs = transformers.PhiForCausalLM(transformers.PhiConfig(**SHAPES[shape], **EXTRA)).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "5GB"
    ours = load_model(tmp_path, dtype=dtype)
    assert_same_tensors(ours, theirs)
    assert_same_config(ours.config, theirs.config)


@pytest.fixture(scope="session")
def tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "tokenizer" / "phi-2").with_chatml()


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("shape", "max_shard_size"), [("phi-2", "5GB"), ("phi-1.5", "1MB"), ("qk-layernorm", "1MB"), ("grouped", "5GB")]
)
def test_what_we_save_loads_in_transformers(tmp_path, tokenizer, shape, max_shard_size):
    ours = Phi2ForCausalLM(Phi2Config(**{**EXTRA, **SHAPES[shape], "vocab_size": 512}))
    ours.init_weights(0)
    ours.to(torch.bfloat16)
    save_pretrained(ours, tokenizer, tmp_path / "model", max_shard_size=max_shard_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs) is transformers.PhiForCausalLM and theirs.dtype == torch.bfloat16
    assert_same_tensors(ours, theirs)
    assert_same_config(load_model(tmp_path / "model").config, theirs.config)


@pytest.mark.real_data
def test_transformers_stops_where_the_tokenizer_says(tmp_path, tokenizer):
    ours = Phi2ForCausalLM(Phi2Config(**{**EXTRA, **SHAPES["phi-1.5"]}))
    save_pretrained(ours, tokenizer, tmp_path / "model")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (50295, [50256, 50296], 50296)
