"""Random models of ours, on disk with a real tokenizer, and the same models in transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from phi2.checkpoints.weights import save_pretrained
from phi2.config import Phi2Config
from phi2.lora import adapter_state, attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

MEDIUM = Phi2Config(  # 105 M parameters, Phi-2's head dim and vocabulary
    hidden_size=640, intermediate_size=2560, num_hidden_layers=8, num_attention_heads=8, resid_pdrop=0.0
)

PHI2 = Phi2Config()  # 2.78 billion
TINY = Phi2Config(  # Phi-2's head dim, and sizes that an interpreter is quick with
    vocab_size=120, hidden_size=160, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
)  # fmt: skip

TINY_WITH_TEXT = replace(  # that goes with nano's tokenizer, and has no dropout
    TINY, vocab_size=512, max_position_embeddings=512, bos_token_id=509, eos_token_id=509, resid_pdrop=0.0
)


def shared_folder() -> Path:
    """The folder of real tokenizers and data.

    Raises:
        FileNotFoundError: when it is not there.
    """
    folder = Path(os.environ.get("PHI2_SHARED", "PHI2_SHARED is not set"))
    if not (folder / "tokenizer" / "phi-2-instruct").is_dir():
        raise FileNotFoundError(
            f"{folder}: set PHI2_SHARED to a folder that holds tokenizer/phi-2-instruct,"
            " data/preference/dpo_en_200.jsonl and data/sft/alpaca_600.jsonl"
        )
    return folder


def initialized(config: Phi2Config) -> Phi2ForCausalLM:
    """A model as training from nothing starts it, float32 on the CPU."""
    model = Phi2ForCausalLM(config)
    model.init_weights(seed=0)
    return model


def save(model: Phi2ForCausalLM, folder: Path, endless: bool = False) -> Tokenizer:
    """Writes a model with the tokenizer of phi-2-instruct; it says no id that has no token.

    Args:
        endless: it never ends a reply either.
    """
    tokenizer = instruct_tokenizer()
    silence(model, range(len(tokenizer), model.config.vocab_size))
    if endless:
        silence(model, tokenizer.stop_ids)
    save_pretrained(model, tokenizer, folder)
    return tokenizer


def instruct_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(shared_folder() / "tokenizer" / "phi-2-instruct")


@torch.no_grad()
def silence(model: Phi2ForCausalLM, ids: Iterable[int]) -> None:
    """No reply has these ids any more."""
    model.lm_head.bias[list(ids)] = -1e4


@torch.no_grad()
def random_model(config: Phi2Config, device: torch.device, dtype: torch.dtype, rank: int = 0) -> Phi2ForCausalLM:
    """A model in eval mode whose biases and norms matter too; the same weights in every dtype, those of bfloat16.

    Args:
        rank: of an adapter on six linears, in float32 and as random; 0 for none.
    """
    with torch.device("meta"):
        model = Phi2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "layernorm.weight" in name else 0.0
        parameter.normal_(mean, 0.1 if parameter.ndim == 1 else config.initializer_range, generator=generator)
    model.to(dtype)
    if rank:
        attach(model, LoraConfig(r=rank))
        for tensor in adapter_state(model).values():
            tensor.normal_(0, config.initializer_range, generator=generator)
    return model


def twin(model: Phi2ForCausalLM) -> nn.Module:
    """The model of transformers on the weights of ours, without adapters."""
    import transformers

    config = transformers.PhiConfig(**model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.PhiForCausalLM(config).to(model.dtype).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    theirs.load_state_dict(weights, assign=True)
    with model.device:
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its buffer is not in a state dict
    return theirs
