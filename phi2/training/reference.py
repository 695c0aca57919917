"""The reference of preference optimisation: whose log-probabilities the policy's are compared with.

Three kinds: the policy with its adapters off, a frozen copy of the policy as it starts, or another checkpoint. Each can
be asked during training, or once before it (`reference_cache.py`). Of the first two, the start may also follow the
policy (`moving_reference.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from phi2.checkpoints.peft_files import restore_adapter
from phi2.checkpoints.weights import load_shape, pick_device
from phi2.config import Phi2Config
from phi2.data.encoded import EncodedPreference
from phi2.hub import resolve
from phi2.lora import computing, disabled, has_adapter
from phi2.losses.bound import BoundLoss
from phi2.losses.knobs import nearest
from phi2.model import Phi2ForCausalLM
from phi2.runs.inputs import Inputs, note_inputs, require_same_inputs
from phi2.tokenizer import Tokenizer
from phi2.training.config import STARTS, DPOConfig
from phi2.training.extras import Asked
from phi2.training.moving_reference import ADAPTER, AdapterCopy, ModelCopy, MovingReference
from phi2.training.packing import TokenRow
from phi2.training.passes import passes_of
from phi2.training.precision import autocast
from phi2.training.reference_cache import Precomputed, Reference, cache_folder, fingerprint, key_of, precomputed
from phi2.training.reference_shards import shard_files
from phi2.training.scoring import row_logps
from phi2.training.session import Session


def make_reference(
    session: Session,
    config: DPOConfig,
    model: Phi2ForCausalLM,
    checkpoint: Path | None,
    pairs: Sequence[EncodedPreference],
) -> Reference:
    """The reference that `config.reference` names.

    Args:
        model: the policy.
        checkpoint: that it comes from, None at the start of a run.
        pairs: all that it will be asked for.
    """
    reference = reference_of(session, config, model, checkpoint, pairs)
    if isinstance(reference, Precomputed):
        require_same_cache(Path(config.output), reference, pairs, resumed=checkpoint is not None)
    return reference


def reference_of(
    session: Session,
    config: DPOConfig,
    model: Phi2ForCausalLM,
    checkpoint: Path | None,
    pairs: Sequence[EncodedPreference],
) -> Reference:
    """`make_reference`, of which no run folder is told."""
    kind = reference_kind(config)
    if config.sync_ref_model:
        return moving(config, model, checkpoint)
    if kind == "adapters_off":
        scorer, live = model, adapters_off(model)
    elif kind == "frozen_copy":
        scorer = start_of_run(session, config, model) if checkpoint else frozen_copy(model)
        live = another_model(scorer)
    else:
        warn_of_another_vocabulary(resolve(kind), session.tokenizer)
        require_fit(f"reference {kind}", load_shape(resolve(kind)), pairs)
        scorer = session.other(resolve(kind), model.dtype)
        live = another_model(scorer)
    if not config.precompute_ref_log_probs:
        return live
    with autocast(config):
        name = fingerprint(scorer, kind != "adapters_off", session.dtype)
        cached = _precomputed(session, config, live, name, pairs, passes_of(config, model, pairs).max_tokens)
    session.others.clear()  # it is asked no more
    return cached


def moving(config: DPOConfig, model: Phi2ForCausalLM, checkpoint: Path | None) -> MovingReference:
    """A copy of the policy that follows it: with LoRA an adapter on the same base, else a second model."""
    if has_adapter(model):
        return MovingReference(config, with_adapter(model, ADAPTER), AdapterCopy(model), checkpoint)
    other = frozen_copy(model)
    return MovingReference(config, another_model(other), ModelCopy(model, other), checkpoint)


def _precomputed(
    session: Session,
    config: DPOConfig,
    live: Reference,
    name: str,
    pairs: Sequence[EncodedPreference],
    max_tokens: int,
) -> Precomputed:
    """From its folder; where there is none, from an earlier fit that scored all of it in the same way."""
    folder = Path(config.reference_cache or Path(config.output) / "reference")
    key = (name, config.max_tokens_per_pass, config.fuse, key_of(pairs))
    is_new = not shard_files(cache_folder(folder, name))
    known = session.reference_logps.get(key) if is_new else None
    about = {"reference": reference_kind(config), "model": config.model, "adapter": config.adapter}
    device = pick_device(config.device)
    cached = precomputed(live, name, pairs, max_tokens, folder, device, session.dtype, about, known)
    if is_new:
        session.reference_logps[key] = cached.shards
    return cached


def start_of_run(session: Session, config: DPOConfig, model: Phi2ForCausalLM) -> Phi2ForCausalLM:
    """The policy as it was before the first update, beside a policy that a checkpoint has brought further."""
    if config.adapter is None:
        return session.load_policy(config).requires_grad_(False).eval()
    start = frozen_copy(model)  # shares the base
    restore_adapter(start, resolve(config.adapter))
    return start


def other_reference(config: DPOConfig, loss: BoundLoss) -> Path | None:
    """Folder of the reference where it is another checkpoint than the policy's."""
    kind = reference_kind(config)
    if loss.reference_free or kind in STARTS:
        return None
    try:
        return resolve(kind)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"reference {error}, nor one of {', '.join(STARTS)}{nearest(kind, STARTS)}") from error


def require_same_cache(run: Path, reference: Precomputed, pairs: Sequence[EncodedPreference], resumed: bool) -> None:
    """Refuses a reference cache that has other numbers than it had; what was scored again is the same reference's."""
    cache: Inputs = {"reference cache": reference.digest(pairs)}
    if resumed and reference.complete:
        require_same_inputs(run, cache, resumed)
    note_inputs(run, cache)


def reference_kind(config: DPOConfig) -> str:
    """A fresh adapter starts as its base: a frozen copy of it is what the adapter, switched off, leaves."""
    fresh = config.lora is not None and config.adapter is None
    if config.reference in ("auto", "frozen_copy"):
        return "adapters_off" if fresh else "frozen_copy"
    return config.reference


def starts_at_reference(config: DPOConfig) -> bool:
    """Whether the policy begins as the reference, without noise on it."""
    return config.disable_dropout and reference_kind(config) in ("adapters_off", "frozen_copy")


def frozen_copy(model: Phi2ForCausalLM) -> Phi2ForCausalLM:
    """The model as it is now, for good; weights that do not train are shared, not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False).eval()


def adapters_off(model: Phi2ForCausalLM) -> LiveReference:
    """The policy's own base."""
    return with_adapter(model, None)


def with_adapter(model: Phi2ForCausalLM, name: str | None) -> LiveReference:
    """The policy with another adapter, or without any."""

    @contextmanager
    def asked() -> Iterator[Phi2ForCausalLM]:
        training = model.training
        if training:  # a walk over a thousand modules
            model.eval()
        try:
            with disabled(model) if name is None else computing(model, name):
                yield model
        finally:
            if training:
                model.train()

    return LiveReference(asked)


def another_model(reference: Phi2ForCausalLM) -> LiveReference:
    """A model that stands beside the policy."""
    return LiveReference(lambda: nullcontext(reference))


class LiveReference:
    """A reference that is asked during training.

    Args:
        asked: within, the model it yields computes as the reference.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __call__(self, rows: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        with self.asked() as model:
            return score(model, row)


@torch.no_grad()
def score(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    return row_logps(model, row)


def require_fit(name: str, config: Phi2Config, pairs: Sequence[EncodedPreference]) -> None:
    """Refuses a model that cannot read the pairs: too few vocabulary rows, or too short a context.

    Args:
        name: of the model, for the error.
        config: of the model.
    Raises:
        ValueError: naming both numbers and a row.
    """
    if not pairs:
        return
    longest, highest = max(pairs, key=lambda pair: pair.length), max(pairs, key=_highest_id)
    if _highest_id(highest) >= config.vocab_size:
        raise ValueError(
            f"{name} has {config.vocab_size} vocabulary rows, but {highest.origin} holds the token id"
            f" {_highest_id(highest)}: it must know the tokens of the rows"
        )
    if longest.length > config.max_position_embeddings:
        raise ValueError(
            f"{name} has a context of {config.max_position_embeddings}, but {longest.origin} has"
            f" {longest.length} tokens: give a max_length of {config.max_position_embeddings} at most"
        )


def _highest_id(row: EncodedPreference) -> int:
    return max(int(part.max(initial=0)) for part in (row.prompt, *row.answers))


def warn_of_another_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Tells of a reference whose own tokenizer would read the rows as other tokens."""
    if not (folder / "tokenizer.json").is_file():
        return
    own, others = tokenizer.backend.get_vocab(), Tokenizer.from_folder(folder).backend.get_vocab()
    if own != others:
        token = min(own.items() ^ others.items(), key=lambda entry: entry[1])[0]
        warnings.warn(
            f"reference {folder}: its tokenizer has another vocabulary than the policy's ({len(others)} tokens and"
            f" {len(own)}; {token!r} is {others.get(token)} and {own.get(token)})",
            stacklevel=2,
        )
