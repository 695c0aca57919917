"""config.json in both spellings; every setting we would compute wrongly is refused by name."""

from __future__ import annotations

import json

import pytest

from phi2.config import Phi2Config

V4 = dict(
    model_type="phi",
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    partial_rotary_factor=0.4,
    rope_theta=10000.0,
    rope_scaling=None,
    torch_dtype="float16",
)


def test_both_spellings_give_the_same_config():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
    dropped = ("partial_rotary_factor", "rope_theta", "rope_scaling", "torch_dtype")
    v5 = {**{k: v for k, v in V4.items() if k not in dropped}, "rope_parameters": rope, "dtype": "float16"}
    assert Phi2Config.from_dict(v5) == Phi2Config.from_dict(V4) == Phi2Config()


def test_what_is_written_reads_back():
    config = Phi2Config(
        hidden_size=320, num_attention_heads=4, num_key_value_heads=2, rope_theta=5e4, qk_layernorm=True
    )
    assert Phi2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_missing_rotary_share_is_transformers_default():
    raw = {k: v for k, v in V4.items() if k != "partial_rotary_factor"}
    assert Phi2Config.from_dict(raw).partial_rotary_factor == 0.5


WRONG = {
    "rope_scaling": ({"type": "dynamic", "factor": 16}, "rope_type must be 'default', got 'dynamic'"),
    "rope_parameters": ({"rope_type": "yarn"}, "rope_type must be 'default', got 'yarn'"),
    "hidden_act": ("silu", "hidden_act must be one of gelu_new"),
    "hidden_size": (2561, "hidden_size 2561 must divide by num_attention_heads 32"),
    "num_hidden_layers": ("32", "num_hidden_layers must be a positive whole number, got '32'"),
    "vocab_size": (True, "vocab_size must be a positive whole number, got True"),
    "num_key_value_heads": (5, "must divide by num_key_value_heads 5"),
    "partial_rotary_factor": (0.4125, "even number of rotary dims, got 33"),
    "resid_pdrop": (1.0, r"resid_pdrop must be a probability in \[0, 1\), got 1.0"),
    "model_type": ("phi-msft", "'phi-msft' is an older layout"),
    "tie_word_embeddings": (True, "tie_word_embeddings must be false"),
    "head_dim": (64, "head_dim must be hidden_size / num_attention_heads, got 64"),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_setting_that_is_not_supported_is_one_line_naming_file_and_field(field, request):
    value, message = WRONG[field]
    with pytest.raises(ValueError, match=f"^here/config.json: .*{message}") as error:
        Phi2Config.from_dict({**V4, field: value}, where="here/config.json")
    assert "\n" not in str(error.value)


def test_missing_fields_are_all_named():
    with pytest.raises(ValueError, match="missing vocab_size, num_hidden_layers"):
        Phi2Config.from_dict({k: v for k, v in V4.items() if k not in ("vocab_size", "num_hidden_layers")})
