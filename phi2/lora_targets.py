"""Which layers a LoRA config chooses, by peft's rules; and that no part of it chooses nothing.

Source: peft 0.21, `tuners_utils`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from phi2.linear import PhiLinear
from phi2.lora_config import LoraConfig, as_tuple, pattern_matches

HEAD = "lm_head"


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


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PhiLinear)]


def refuse_unmatched(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Every target and every pattern must choose something: one that does not is a slip of the pen.

    Raises:
        ValueError: naming the first part that chooses nothing.
    """
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
