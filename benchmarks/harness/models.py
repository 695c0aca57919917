"""Random models of ours, and the same models in transformers."""

from __future__ import annotations

import torch
from torch import nn

from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM


@torch.no_grad()
def randomise(module: nn.Module, scale: float) -> nn.Module:
    """Draws every parameter, biases and norms too, so that each of them matters; the same numbers for the same module.

    Args:
        scale: of matrices; vectors get 0.1.
    """
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "layernorm.weight" in name else 0.0
        parameter.normal_(mean, 0.1 if parameter.ndim == 1 else scale, generator=generator)
    return module


def random_model(config: Phi2Config, device: torch.device, dtype: torch.dtype) -> Phi2ForCausalLM:
    """The same weights in every dtype: those of bfloat16."""
    with torch.device("meta"):
        model = Phi2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    return randomise(model, config.initializer_range).to(dtype)


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
