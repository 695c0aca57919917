"""Training from Python: the flags of `phi2 sft` and `phi2 dpo` as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from phi2.keywords import checked, config_of, explained
from phi2.losses.modifiers import modifier_of
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.runs.run import Run
from phi2.training import dpo as dpo_loop
from phi2.training import sft as sft_loop
from phi2.training.config import DPOConfig, SFTConfig
from phi2.training.session import Session

DATA = ("data", "eval_data")  # checked by who reads them: they may hold a million rows


@explained(SFTConfig)
def sft(session: Session | None = None, **settings: Any) -> Run:
    """Supervised fine-tuning.

    Args:
        session: an open one. Settings that are not given are then those it was started with.
        settings: the flags of `phi2 sft`; groups of them, such as lora, may be dicts, and data may be rows. These are
            encoded by every session anew: to know them again would mean to read all of them.
    Returns:
        What the run left behind: metrics, samples, the model.
    Raises:
        ValueError: for settings, data or an output folder that cannot be used; for a session of preference rows, or
            one that was started with another model, data or encoding.
    """
    if session is None:
        return sft_loop.train(config_of(SFTConfig, settings, DATA))
    _require_session(session)
    session.require_kind(SFTConfig.kind)
    assert isinstance(session.config, SFTConfig)
    return sft_loop.fit(session, replace(session.config, **checked(SFTConfig, settings, DATA)))


@explained(DPOConfig)
def dpo(session: Session | None = None, **settings: Any) -> Run:
    """Preference optimisation: DPO and its family.

    Args:
        session: an open one. Settings that are not given are then those it was started with.
        settings: the flags of `phi2 dpo`; groups of them, such as lora and loss_args, may be dicts, and data may be
            rows. These are encoded by every session anew: to know them again would mean to read all of them.
    Returns:
        What the run left behind: metrics, samples, the model.
    Raises:
        ValueError: for settings, data, a loss or an output folder that cannot be used; for a session of supervised
            rows, or one that was started with another model, data or encoding.
    """
    _require_no_knob(settings)
    if session is None:
        return dpo_loop.train(config_of(DPOConfig, settings, DATA))
    _require_session(session)
    session.require_kind(DPOConfig.kind)
    assert isinstance(session.config, DPOConfig)
    return dpo_loop.fit(session, replace(session.config, **checked(DPOConfig, settings, DATA)))


def _require_session(session: Any) -> None:
    if not isinstance(session, Session):
        raise ValueError(f"what stands before the settings is a session of phi2.start, got {session!r}")


def _require_no_knob(settings: Mapping[str, Any]) -> None:
    """Refuses a knob of a loss where a setting stands, as far as it is none."""
    settings_of = {field.name for field in fields(DPOConfig)}
    knobs = {knob for loss in PREFERENCE_LOSSES.values() for knob in loss.knobs}
    for name in settings:
        if name not in settings_of and (name in knobs or modifier_of(name)):
            raise ValueError(f"there is no setting {name!r}: this knob of a loss goes into loss_args")
