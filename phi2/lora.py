"""LoRA: a linear layer keeps its frozen weight and learns a low-rank change beside it.

    y = x W^T + b + s * dropout(x) A^T B^T        A (r, in), B (out, r), s = lora_alpha / r

B starts at zero, so a fresh adapter changes nothing, and switching adapters off gives the base model back bit for bit:
the reference of DPO costs no second model. A and B are float32 also on a half-precision base. A layer keeps its own
parameters under their own names and gains `lora_A.weight` and `lora_B.weight`; `peft_files.py` writes and reads them.

Source: arXiv:2106.09685 Eq. 3; precisions, initialisation and matching of names as in peft 0.21, `tuners/lora`.
Dims: N rows, r LoRA rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from phi2.lora_config import LoraConfig, as_tuple, pattern_matches
from phi2_kernels.gemv import linear

HEAD = "lm_head"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; weight and bias are the parameters of the layer it replaces.

    Attributes:
        lora_A, lora_B: linears without bias, (r, in) and (out, r), float32. Not initialised here.
        scaling: multiplies the change.
        enabled: False computes the base layer alone.
    """

    def __init__(self, base: nn.Linear, r: int, scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)  # not Linear's: that would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        where = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = skip_init(nn.Linear, base.in_features, r, bias=False, **where)
        self.lora_B = skip_init(nn.Linear, r, base.out_features, bias=False, **where)
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling, self.enabled, self._plain = scaling, True, type(base)
        self.train(base.training)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """A as `nn.Linear` starts, drawn on the CPU so that every device starts alike; B zero."""
        start = torch.empty(self.lora_A.weight.shape)
        self.lora_A.weight.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        self.lora_B.weight.zero_()

    def lora_hidden(self, x: Tensor) -> Tensor:
        """dropout(x) A^T, (..., r), in float32 (under autocast in autocast's dtype)."""
        return self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the dtype of the base; base and change are added in float32 and rounded once."""
        out = linear(x, self.weight, self.bias)
        if not self.enabled:
            return out
        return out.add_(self.lora_B(self.lora_hidden(x) * self.scaling))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer that it replaced, whose weight has taken up s * B A: added in float32, rounded once.

        Raises:
            ValueError: when the sum is not finite in the dtype of the weight, which then stays as it was.
        """
        total = (self.lora_B.weight.float() @ self.lora_A.weight.float()).mul_(self.scaling) + self.weight
        total = total.to(self.weight.dtype)
        if not total.isfinite().all():
            raise ValueError(f"weight and adapter add up to numbers that are not finite in {total.dtype}")
        self.weight.copy_(total)
        plain = self._plain(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def attach(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Freezes the model and gives every targeted layer a fresh adapter, the only thing left to train.

    Args:
        model: a `Phi2ForCausalLM` without an adapter.
        config: which layers, and the size of the adapters; kept as `model.lora_config`.
        seed: the same seed gives the same adapter on every device.

    Raises:
        ValueError: when a target or a pattern matches no layer, or the model has an adapter already.
    """
    names = target_names(model, config)
    _refuse_unmatched(model, config, names)
    insert(model, config, names)
    generator = torch.Generator().manual_seed(seed)
    for module in lora_modules(model).values():
        module.init_weights(generator)


def insert(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Freezes the model and puts adapters, of weights yet to be written, on the layers called `names`.

    Raises:
        ValueError: when the model has an adapter already.
    """
    if has_adapter(model):
        raise ValueError("the model has an adapter already: merge it first")
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        model.set_submodule(name, LoraLinear(base, config.rank(name), config.scaling(name), config.lora_dropout))
    model.lora_config, model.brought_by_adapter = config, ()


def target_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that a config chooses, in the model's order.

    Source: peft 0.21, `tuners_utils.check_target_module_exists`.
    """
    excluded = config.exclude_modules or ()
    return [n for n in _targeted(model, config) if not _is_named(n, excluded) and _is_in_chosen_block(n, config)]


def _targeted(model: nn.Module, config: LoraConfig) -> list[str]:
    """What `target_modules` alone chooses."""
    targets, linears = config.target_modules, _linear_names(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return [name for name in linears if name != HEAD]
    return [name for name in linears if _is_named(name, targets)]


def _is_named(name: str, names: tuple[str, ...] | str) -> bool:
    """By one regular expression for the whole name, or by endings of it."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(_ends_with(name, ending) for ending in names)


def _is_in_chosen_block(name: str, config: LoraConfig) -> bool:
    """Whether layers_to_transform lets a layer pass; a layer that is targeted by its whole name always does."""
    chosen, patterns = config.layers_to_transform, config.layers_pattern or r"[^.]*"
    if chosen is None or chosen == () or name in config.target_modules:
        return True
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    found = next(filter(None, (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)), None)
    return found is not None and int(found[1]) in ((chosen,) if isinstance(chosen, int) else chosen)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside it the model is its base. For passes without gradient: recomputed activations would see the adapter again.

    Raises:
        ValueError: when the model has no adapter.
    """
    before = {module: module.enabled for module in _adapted(model).values()}
    try:
        for module in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before.items():
            module.enabled = enabled


def merge(model: nn.Module) -> None:
    """Adds every adapter to its weight, one layer at a time: afterwards the model is plain, and trainable throughout.

    In half precision the merged model is not the adapted one to the last bit, since each weight is rounded.

    Raises:
        ValueError: naming the layer whose sum is not finite, or when there is no adapter.
    """
    for name, module in _adapted(model).items():
        try:
            model.set_submodule(name, module.merged())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    del model.lora_config
    model.requires_grad_(True)


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def has_adapter(model: nn.Module) -> bool:
    return bool(lora_modules(model))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` of every adapter, without gradient."""
    state = {}
    for name, module in lora_modules(model).items():
        state[f"{name}.lora_A.weight"] = module.lora_A.weight.detach()
        state[f"{name}.lora_B.weight"] = module.lora_B.weight.detach()
    return state


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, in the order of `adapter_state`."""
    return [p for module in lora_modules(model).values() for p in (module.lora_A.weight, module.lora_B.weight)]


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    modules = lora_modules(model)
    if not modules:
        raise ValueError("the model has no adapter")
    return modules


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _refuse_unmatched(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Every target and every pattern must choose something: one that does not is a slip of the pen."""
    targeted = _targeted(model, config)
    if isinstance(config.target_modules, str):
        unmatched = [] if targeted else [config.target_modules]
        hint = f" (text is a pattern of a whole name; endings go in a list, [{config.target_modules}])"
    else:
        hint = ""
        unmatched = [t for t in config.target_modules if not any(_ends_with(name, t) for name in targeted)]
    if unmatched:
        endings = dict.fromkeys(name.rpartition(".")[2] for name in _linear_names(model))
        raise ValueError(
            f"target_modules {', '.join(unmatched)} match no linear layer{hint}; layers end in {', '.join(endings)}"
        )
    _refuse_unused_restrictions(model, config)
    if not names:
        raise ValueError(f"exclude_modules and layers_to_transform leave none of the {len(targeted)} targeted layers")
    for field_name in ("rank_pattern", "alpha_pattern"):
        unused = [p for p in getattr(config, field_name) if not any(pattern_matches(p, name) for name in names)]
        if unused:
            raise ValueError(f"{field_name} {', '.join(unused)} match no targeted layer, such as {names[0]}")


def _refuse_unused_restrictions(model: nn.Module, config: LoraConfig) -> None:
    """Likewise every name that is left alone, and every block that is chosen."""
    targeted, excluded = _targeted(model, config), config.exclude_modules or ()
    for pattern in as_tuple(excluded):
        if not any(_is_named(name, pattern if isinstance(excluded, str) else (pattern,)) for name in targeted):
            raise ValueError(f"exclude_modules {pattern} match no targeted layer, such as {targeted[0]}")
    for layer in as_tuple(config.layers_to_transform):
        alone = replace(config, layers_to_transform=layer)
        if not any(
            _is_in_chosen_block(name, alone) for name in targeted if name not in as_tuple(config.target_modules)
        ):
            raise ValueError(f"layers_to_transform {layer} match no targeted layer, such as {targeted[0]}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
