"""Which modules must be called, where others are read: fused blocks, recorded decode steps and heads of losses take the
weights and compute by themselves.

That would pass over whoever watches a module (hooks), and a module that has a forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import ParametrizationList

from phi2.linear import Linear
from phi2.lora import LoraLinear
from phi2.model import MLP, Attention, Block, LayerNorm, Phi2ForCausalLM, Phi2Model
from phi2.quantize import Int4LinearOnCPU, QuantizedLinear

LINEARS = (Linear, LoraLinear, QuantizedLinear, Int4LinearOnCPU)
OURS = (Phi2ForCausalLM, Phi2Model, Block, Attention, MLP, LayerNorm, *LINEARS)
TORCHS = (nn.Module, nn.Embedding, nn.Linear, nn.Dropout, ParametrizationList)  # nn.Module's is that of lists
FORWARDS = {kind.forward for kind in (*OURS, *TORCHS)}


def must_be_called(modules: Iterable[nn.Module]) -> bool:
    """Whether one of some modules, or what LoRA was put on, has hooks or a forward that is not known here."""
    if _has_any_global_hook():
        return True
    for each in _with_bases(modules):
        if each._forward_pre_hooks or each._forward_hooks or each._backward_pre_hooks or each._backward_hooks:
            return True
        if _has_other_forward(each):
            return True
    return False


def other_forward(modules: Iterable[nn.Module]) -> str:
    """The class of the first of them whose forward is not known here, "" for none."""
    return next((type(each).__name__ for each in _with_bases(modules) if _has_other_forward(each)), "")


def _has_other_forward(module: nn.Module) -> bool:
    return type(module).forward not in FORWARDS or "forward" in module.__dict__


def _with_bases(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules, and those that LoRA keeps beside the tree of modules."""
    for each in modules:
        yield each
        if isinstance(each, LoraLinear):
            yield each.base
