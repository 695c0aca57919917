"""What is compared: from the texts and mappings that a user writes to the settings of runs, all checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import yaml

from phi2.keywords import checked
from phi2.lab.compare_config import CompareConfig
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.knobs import nearest
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.training.config import DPOConfig, PreferenceConfig
from phi2.training.dpo import with_all_knobs
from phi2.training.session import SHARED

MOST_CELLS = 1000
OF_ALL = {*SHARED, "output", "resume", "seed", "loss_file", "precompute_ref_log_probs", "reference_cache"}
SETTINGS = {field.name for field in fields(DPOConfig)}
WRITTEN = re.compile(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*")  # name, or name(setting=value, ...)
WEIGHED = re.compile(r"[^()]+:\s*[-+.\d][-+.\de]*\s*(\(|$)")  # name:0.8


@dataclass(frozen=True)
class Variant:
    """One of those that are compared.

    Attributes:
        folder: its name as that of a folder.
        own: what it was written with beside its loss.
        config: of a run of it, but for seed and output.
        loss: that the run will bind.
    """

    name: str
    folder: str
    own: dict[str, Any]
    config: DPOConfig
    loss: BoundLoss


def variants_of(config: CompareConfig) -> list[Variant]:
    """The variants of a comparison in their order; nothing is loaded for them but the loss file.

    Raises:
        ValueError: one line, for what no run could be made of, for a variant that is there twice, a grid that is empty,
            and for more runs than 1000.
    """
    written = entries_of(config)
    bound = [_bound(config, own) for own in written]
    free = [loss.reference_free for _, loss in bound]
    if all(free) and config.reference != "auto":
        raise ValueError(
            f"reference {config.reference} needs a loss that has one, got {', '.join(map(name_of, written))}"
        )
    folders = _folders([name_of(own) for own in written])
    variants = [
        Variant(name_of(own), folder, _without_loss(own), _without_reference(run) if loss.reference_free else run, loss)
        for own, folder, (run, loss) in zip(written, folders, bound, strict=True)
    ]
    _require_distinct(variants)
    if config.baseline is not None:
        baseline_of(config, [variant.name for variant in variants])
    return variants


def baseline_of(config: CompareConfig, names: Sequence[str]) -> str:
    """The name of the variant that the others are compared with.

    Raises:
        ValueError: when there is none of that name.
    """
    if config.baseline is None:
        return names[0]
    wanted = name_of(entry_of(config.baseline))
    if wanted not in names:
        raise ValueError(f"baseline must be one of {', '.join(names)}, got {config.baseline!r}{nearest(wanted, names)}")
    return wanted


def entries_of(config: CompareConfig) -> list[dict[str, Any]]:
    """What was written of each variant: its loss, and the settings and knobs that are its own."""
    losses = split_texts(config.losses) if isinstance(config.losses, str) else config.losses or []
    entries = [entry_of(each) for each in (*losses, *(config.variants or ()))] or [{}]
    grid = config.grid or {}
    if config.grid is not None:
        _require_grid(config.grid, entries)
    cells = len(entries) * math.prod(map(len, grid.values())) * config.seeds
    if cells > MOST_CELLS:
        raise ValueError(f"a comparison has {MOST_CELLS} runs at most, got {cells} (variants times grid times seeds)")
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [_with_point(entry, point) for entry in entries for point in points]


def _require_grid(grid: Mapping[str, Sequence[Any]], entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a grid without points, and one that sets what a variant has set."""
    for name, values in {"it": list(grid), **grid}.items():
        if not values:
            raise ValueError(f"grid is empty: {name} has no values")
    for name in grid:
        if twice := [entry for entry in entries if name in entry]:
            raise ValueError(f"grid: {name} is set in the variant {name_of(twice[0])} already")


def _with_point(entry: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    merged = {**entry, **point}
    return entry_of(merged["loss"]) | _without_loss(merged) if isinstance(merged["loss"], str) else merged


def split_texts(text: str) -> list[str]:
    """Cut at the commas that stand in no parentheses.

    Raises:
        ValueError: for a part with a weight, as of a mixture, which would be cut into variants of a loss each.
    """
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]
    for part in parts:
        if WEIGHED.match(part):
            raise ValueError(
                f"losses: {part!r} is a part of a mixture, and a comma parts variants here: give a list,"
                """ '["sigmoid:0.8,sft:0.2", "ipo"]'"""
            )
    return parts


def entry_of(written: str | Mapping[str, Any]) -> dict[str, Any]:
    """A variant as a mapping: `simpo(beta=2.0)` is {"loss": "simpo", "beta": 2.0}."""
    if not isinstance(written, str):
        if "loss" not in written:
            raise ValueError(f"a variant needs its loss, got {dict(written)}")
        return dict(written)
    match = WRITTEN.fullmatch(written)
    if match is None:
        raise ValueError(f"a variant is written name or name(setting=value, ...), got {written!r}")
    own: dict[str, Any] = {"loss": match[1]}
    for part in filter(None, map(str.strip, (match[2] or "").split(","))):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise ValueError(f"a variant is written name or name(setting=value, ...), got {written!r}")
        own[name.strip()] = _value(value.strip())
    return own


def _value(text: str) -> Any:
    """As YAML reads it, and 1e-5 as a number, which YAML reads as text."""
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return yaml.safe_load(text)


def name_of(own: Mapping[str, Any]) -> str:
    """How a variant is called: as it would be written."""
    loss, settings = own["loss"], _without_loss(own)
    if not isinstance(loss, str):
        loss = ",".join(part if isinstance(part, str) else _part(part) for part in loss)
    return f"{loss}({_told(settings)})" if settings else loss


def _part(part: Mapping[str, Any]) -> str:
    args = _told(part.get("args") or {})
    return f"{part.get('loss')}{f'({args})' if args else ''}:{part.get('weight', 1.0):g}"


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _without_loss(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name != "loss"}


def _bound(config: CompareConfig, own: Mapping[str, Any]) -> tuple[DPOConfig, BoundLoss]:
    """The settings of a run, and its loss. What is no setting is a knob."""
    name = name_of(own)
    common = {field.name: getattr(config, field.name) for field in fields(PreferenceConfig)} | {"loss_file": None}
    for setting in own:
        if setting in OF_ALL:
            raise ValueError(f"variant {name}: {setting} is the same in all runs; set it for the whole comparison")
    settings = {setting: value for setting, value in own.items() if setting in SETTINGS}
    knobs = {setting: value for setting, value in own.items() if setting not in SETTINGS}
    try:
        known = checked(DPOConfig, settings)
        if known.get("sync_ref_model"):  # such a reference cannot be asked beforehand
            common |= {"precompute_ref_log_probs": False, "reference_cache": None}
        known["loss_args"] = {**config.loss_args, **known.get("loss_args", {}), **knobs}
        run = DPOConfig(**{**common, **known})
        loss = bind_loss(run.loss, run.knobs, config.loss_file)
        if "kl" in loss.needs:  # nor can one whose whole distributions a loss needs
            run = replace(run, precompute_ref_log_probs=False, reference_cache=None)
    except ValueError as error:
        near = "".join(nearest(knob, sorted(SETTINGS - OF_ALL)) for knob in knobs)
        raise ValueError(f"variant {name}: {error}{near if 'did you mean' not in str(error) else ''}") from error
    from_file = not all(PREFERENCE_LOSSES[part.name].is_own for part in loss.single)
    return replace(run, loss_file=config.loss_file if from_file else None), loss


def _without_reference(config: DPOConfig) -> DPOConfig:
    return replace(config.at_start(), reference="auto", precompute_ref_log_probs=False, reference_cache=None)


def _folders(names: Sequence[str]) -> list[str]:
    """Names of folders, no two alike."""
    folders: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("_.")[:100]
        folders.append(plain if plain not in folders else f"{plain}_{len(folders)}")
    return folders


def _require_distinct(variants: Sequence[Variant]) -> None:
    """Refuses two variants whose runs would be the same, however they are written."""
    resolved = [with_all_knobs(variant.config, variant.loss) for variant in variants]
    for i, config in enumerate(resolved):
        if config in resolved[:i]:
            first, second = variants[resolved.index(config)].name, variants[i].name
            raise ValueError(f"variant {second} is there twice" + (f", also as {first}" if first != second else ""))
