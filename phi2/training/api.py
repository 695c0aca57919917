"""Training from Python: the flags of `phi2 sft` and `phi2 dpo` as keyword arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from phi2.training import dpo as dpo_loop
from phi2.training import sft as sft_loop
from phi2.training.config import DPOConfig, SFTConfig
from phi2.training.session import Session


def sft(session: Session | None = None, **settings: Any) -> Path:
    """Supervised fine-tuning.

    Args:
        session: an open one. Settings that are not given are then those it was started with.
        settings: fields of `SFTConfig`.
    Returns:
        The run folder.
    Raises:
        ValueError: for settings, data or an output folder that cannot be used; for a session of preference rows, or
            one that was started with another model, data or encoding.
    """
    if session is None:
        return sft_loop.train(SFTConfig(**settings))
    session.require_kind(SFTConfig.kind)
    assert isinstance(session.config, SFTConfig)
    return sft_loop.fit(session, replace(session.config, **settings))


def dpo(session: Session | None = None, **settings: Any) -> Path:
    """Preference optimisation; as `sft`, with fields of `DPOConfig`."""
    if session is None:
        return dpo_loop.train(DPOConfig(**settings))
    session.require_kind(DPOConfig.kind)
    assert isinstance(session.config, DPOConfig)
    return dpo_loop.fit(session, replace(session.config, **settings))
