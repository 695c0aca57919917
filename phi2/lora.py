"""LoRA: a linear layer keeps its frozen weight and learns a low-rank change beside it.

    y = x W^T + b + s * dropout(x) A^T B^T        A (r, in), B (out, r), s = lora_alpha / r

B starts at zero, so a fresh adapter changes nothing, and switching adapters off gives the base model back bit for bit:
the reference of DPO costs no second model. A and B are float32 also on a half-precision or quantised base. A layer
keeps its own parameters under their own names and gains `lora_A.weight` and `lora_B.weight`, those of the adapter that
is active; `peft_files.py` writes and reads them. Adapters have names, and share one base.

Source: arXiv:2106.09685 Eq. 3; precisions, initialisation and matching of names as in peft 0.21, `tuners/lora`.
Dims: N rows, r LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from phi2.linear import PhiLinear
from phi2.lora_config import LoraConfig
from phi2.lora_targets import refuse_unmatched, target_names
from phi2_kernels.weight_forms import Weight

DEFAULT = "default"  # name of an adapter that was given none, as in peft


@dataclass(frozen=True)
class LoraAdapter:
    """A low-rank change of one layer: s * dropout(x) A^T B^T.

    Attributes:
        lora_A, lora_B: linears without bias, (r, in) and (out, r), float32.
        scaling: s.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: nn.Dropout
    scaling: float

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """A as `nn.Linear` starts, drawn on the CPU so that every device starts alike; B zero."""
        start = torch.empty(self.lora_A.weight.shape)
        self.lora_A.weight.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        self.lora_B.weight.zero_()

    def hidden(self, x: Tensor) -> Tensor:
        """s * dropout(x) A^T, (..., r), in float32 (under autocast in autocast's dtype)."""
        A = self.lora_A.weight
        x = x.to(A.dtype)
        hidden = F.linear(self.lora_dropout(x) if self.lora_dropout.training else x, A)
        return hidden if self.scaling == 1 else hidden * self.scaling

    def change(self) -> Tensor:
        """s * B A, (out, in) float32."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()).mul_(self.scaling)


@dataclass
class Computed:
    """Name of the adapter that passes of a model compute; None: its base alone. Changed at one place for all layers."""

    name: str | None = None


class LoraLinear(PhiLinear):
    """A linear layer and its adapters, of which one at most is active in a pass.

    Any linear can be the base: float, int8 or int4. Its parameters and buffers are the layer's own, under the names
    they had, and so are A and B of the active adapter. The other adapters are no part of the model until they are
    active: what trains, saves or counts parameters does not see them.

    Args:
        computed: says which adapter passes compute; all layers of a model share it.

    Attributes:
        base: the layer that this one stands for.
        adapters: by name.
        active: the one that the layer shows.
    """

    base: PhiLinear
    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(self, base: PhiLinear, computed: Computed) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)  # beside the tree of modules, where it would lend its name to its weight
        self._parameters, self._buffers = base._parameters, base._buffers  # the same dicts: nothing can come apart
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapters: dict[str, LoraAdapter] = {}
        self.active: LoraAdapter | None = None
        self._computed = computed
        self.train(base.training)

    @property
    def adapter(self) -> LoraAdapter | None:
        """What is added to the base now; another one than `active`, or none, inside `computing`."""
        return self.adapters.get(self._computed.name or "")

    def add(self, name: str, r: int, scaling: float, dropout: float) -> None:
        """Another adapter, whose weights are yet to be written."""
        where = {"device": self.bias.device, "dtype": torch.float32}
        lora_A = skip_init(nn.Linear, self.in_features, r, bias=False, **where)
        lora_B = skip_init(nn.Linear, r, self.out_features, bias=False, **where)
        self.adapters[name] = LoraAdapter(lora_A, lora_B, nn.Dropout(dropout), scaling)

    @torch.no_grad()
    def put(self, name: str, A: Tensor, B: Tensor) -> None:
        """An adapter with these weights, (k, in) and (out, k), and the active one's scaling, which is not trained."""
        assert self.active is not None
        self.add(name, len(A), self.active.scaling, dropout=0.0)
        for linear, weight in zip((self.adapters[name].lora_A, self.adapters[name].lora_B), (A, B), strict=True):
            linear.requires_grad_(False).weight.copy_(weight)

    def activate(self, name: str) -> None:
        """From now on the layer shows this adapter; none if it has none of that name."""
        self.active = self.adapters.get(name)
        for part in ("lora_A", "lora_B", "lora_dropout"):
            self._modules.pop(part, None)
            if self.active is not None:
                self.add_module(part, getattr(self.active, part).train(self.training))

    def extra_repr(self) -> str:
        base = type(self.base).__name__
        return f"{base}, in_features={self.in_features}, out_features={self.out_features}, adapters={[*self.adapters]}"

    @property
    def form(self) -> Weight | None:
        """The weight alone, where the layer is no more than a product with it."""
        return self.base.form if self.adapter is None else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the dtype of the base; base and change are added in float32 and rounded once."""
        out = self.base(x)
        if self.adapter is None:
            return out
        return out.add_(F.linear(self.adapter.hidden(x), self.adapter.lora_B.weight))

    @torch.no_grad()
    def merged(self) -> PhiLinear:
        """The base, whose weight has taken up the active adapter: added in float32, rounded once.

        Raises:
            ValueError: when the sum is not finite in the dtype of the weight, which then stays as it was.
        """
        assert self.active is not None
        if not self.weight.is_floating_point():
            raise ValueError(f"an adapter can be merged into a float weight only, got {self.weight.dtype}")
        total = (self.active.change() + self.weight).to(self.weight.dtype)
        if not total.isfinite().all():
            raise ValueError(f"weight and adapter add up to numbers that are not finite in {total.dtype}")
        self.weight.copy_(total)
        return self.base.train(self.training)

    def _apply(self, function, recurse: bool = True):
        """`.to(...)` and its like: also on the adapters that are not part of the model now."""
        for adapter in self.adapters.values():
            if adapter is not self.active:
                adapter.lora_A._apply(function)
                adapter.lora_B._apply(function)
        return super()._apply(function, recurse)


class AdaptableModel(nn.Module):
    """A model that adapters can be put on.

    Attributes:
        adapters: their settings by name.
        active_adapter: name of the one that is shown, trained and saved.
        computed: the one that passes compute; another one, or none, inside `computing`.
        brought_by_adapter: parts of the model that an adapter's file replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, LoraConfig] = {}
        self.active_adapter: str | None = None
        self.computed = Computed()
        self.brought_by_adapter: tuple[str, ...] = ()

    @property
    def computed_adapter(self) -> str | None:
        """Name of the adapter that passes compute."""
        return self.computed.name

    @property
    def lora_config(self) -> LoraConfig | None:
        """Of the active adapter."""
        return None if self.active_adapter is None else self.adapters[self.active_adapter]


def attach(model: AdaptableModel, config: LoraConfig, seed: int = 0, name: str = DEFAULT) -> None:
    """Freezes the model and gives every targeted layer a fresh adapter, active from now on and all that is trained.

    Args:
        model: it may have adapters of other names.
        config: which layers, and the size of the adapters; kept in `model.adapters`.
        seed: the same seed gives the same adapter on every device.
        name: of the adapter.

    Raises:
        ValueError: for another config, when a target or a pattern matches no layer, or the model has an adapter of
            that name already.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config must be a LoraConfig, got {type(config).__name__}")
    names = target_names(model, config)
    refuse_unmatched(model, config, names)
    insert(model, config, names, name)
    generator = torch.Generator().manual_seed(seed)
    for module in lora_modules(model).values():
        module.adapters[name].init_weights(generator)


def insert(model: AdaptableModel, config: LoraConfig, layers: list[str], name: str = DEFAULT) -> None:
    """Freezes the model and puts an adapter on these layers, active from now on, whose weights are yet to be written.

    Raises:
        ValueError: when the model has an adapter of that name already.
    """
    if name in model.adapters:
        raise ValueError("the model has an adapter already: merge it first")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".lora_" in parameter_name)
    model.adapters[name] = config  # first, so that `detach` can clear up behind a failure
    for layer in layers:
        linear = model.get_submodule(layer)
        assert isinstance(linear, PhiLinear)
        if not isinstance(linear, LoraLinear):
            linear = LoraLinear(linear, model.computed)
            model.set_submodule(layer, linear)
        linear.add(name, config.rank(layer), config.scaling(layer), config.lora_dropout)
    activate(model, name)


def copy_adapter(model: AdaptableModel, name: str) -> None:
    """Keeps the active adapter, as it is now, under another name too; the copy has no dropout and is not trained.

    Raises:
        ValueError: when there is none, or one of that name already.
    """
    if name in model.adapters:
        raise ValueError(f"the model has an adapter {name!r} already")
    layers, config = _adapted(model), model.lora_config
    assert config is not None
    model.adapters[name] = config
    for module in layers.values():
        module.put(name, module.lora_A.weight, module.lora_B.weight)


def activate(model: AdaptableModel, name: str) -> None:
    """Makes the adapter of this name the one that the model computes, shows, trains and saves.

    Raises:
        ValueError: when there is none.
    """
    _require_adapter(model, name)
    model.active_adapter = model.computed.name = name
    for module in _layers(model).values():
        module.activate(name)


def detach(model: AdaptableModel, name: str = DEFAULT) -> None:
    """Takes the adapter of this name off. The base stays frozen, and is bit for bit what it was.

    Another adapter has to be made active before it is used again.

    Raises:
        ValueError: when there is none.
    """
    activate(model, name)
    for layer, module in _layers(model).items():
        module.adapters.pop(name, None)
        module.activate(name)
        if not module.adapters:
            model.set_submodule(layer, module.base)
    del model.adapters[name]
    model.active_adapter = model.computed.name = None


@contextmanager
def disabled(model: AdaptableModel) -> Iterator[None]:
    """Inside it the model is its base. For passes without gradient: recomputed activations would see the adapter again.

    Raises:
        ValueError: when the model has no adapter.
    """
    if model.active_adapter is None:
        _adapted(model)  # says why not
    with computing(model, None):
        yield


@contextmanager
def computing(model: AdaptableModel, name: str | None) -> Iterator[None]:
    """Inside it passes without gradient compute the adapter of this name, or the base alone; what is shown stays.

    Raises:
        ValueError: when there is no such adapter.
    """
    if name is not None:
        _require_adapter(model, name)
    before, model.computed.name = model.computed.name, name
    try:
        if name not in (None, before):
            _follow_training(model)
        yield
    finally:
        model.computed.name = before


def _follow_training(model: AdaptableModel) -> None:
    """Adapters that are no part of the model are not told when it trains."""
    for module in _layers(model).values():
        if module.adapter is not None:
            module.adapter.lora_dropout.train(module.training)


def _require_adapter(model: AdaptableModel, name: str) -> None:
    if name not in model.adapters:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(model.adapters) or 'none'}")


def merge(model: AdaptableModel) -> None:
    """Adds the active adapter to its weights, one layer at a time: afterwards the model is plain, trainable throughout.

    In half precision the merged model is not the adapted one to the last bit, since each weight is rounded.

    Raises:
        ValueError: naming the layer whose sum is not finite, or when there is no adapter, or more than one.
    """
    layers = _adapted(model)
    if len(model.adapters) > 1:
        raise ValueError(f"the model has the adapters {', '.join(model.adapters)}: detach all but one before merging")
    for name, module in layers.items():
        try:
            model.set_submodule(name, module.merged())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    model.adapters, model.brought_by_adapter = {}, ()
    model.active_adapter = model.computed.name = None
    model.requires_grad_(True)


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that the active adapter is on, by name, in the model's order."""
    return {name: module for name, module in _layers(model).items() if module.active is not None}


def _layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that any adapter is on."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def has_adapter(model: nn.Module) -> bool:
    return bool(lora_modules(model))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` of the active adapter, without gradient."""
    state = {}
    for name, module in lora_modules(model).items():
        state[f"{name}.lora_A.weight"] = module.lora_A.weight.detach()
        state[f"{name}.lora_B.weight"] = module.lora_B.weight.detach()
    return state


def _adapted(model: AdaptableModel) -> dict[str, LoraLinear]:
    modules = lora_modules(model)
    if not modules and model.adapters:
        raise ValueError(f"no adapter is active; the model has {', '.join(model.adapters)}")
    if not modules:
        raise ValueError("the model has no adapter")
    return modules
