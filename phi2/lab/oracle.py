"""The model beside transformers' PhiForCausalLM, where transformers is installed; nothing else here imports it."""

from __future__ import annotations

from typing import Any

import torch

from phi2.lab.checks import Measured, Skipped, Subject, largest
from phi2.lab.layouts import Logps, alone, in_dtype, sequences_of
from phi2.lab.noise import moved
from phi2.lora import disabled
from phi2.model import Phi2ForCausalLM

ROWS = 2  # whose logits are compared
LOGITS, TIMES = 1e-5, 2.0  # in float32 of the largest logit; in half precision times transformers' own error


def twin_of(model: Phi2ForCausalLM) -> Any:
    """transformers' model on our weights, which are shared, not copied; without adapter."""
    try:
        from transformers import PhiConfig, PhiForCausalLM
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        raise Skipped(f"transformers {'is not installed' if missing else f'cannot be imported: {error}'}") from error
    with torch.device("meta"):
        twin = PhiForCausalLM(PhiConfig.from_dict(model.config.to_dict()))
    own = {name: weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    twin.load_state_dict(own, strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config).to(model.device)  # of no checkpoint
    return twin.eval()


@torch.no_grad()
def beside_transformers(subject: Subject) -> Measured:
    """Logits in float32; in half precision the errors of both against float32."""
    model, twin = subject.model, twin_of(subject.model)
    rows = subject.rows[:ROWS]
    with disabled(model):
        if model.dtype == torch.float32:
            return Measured(_apart(subject, twin), LOGITS, "of the largest logit")
        exact, ours = in_dtype(model, rows, torch.float32), alone(model, rows)
    own, others = moved(exact, ours).token_mean, moved(exact, _logps(subject, twin)).token_mean
    return Measured(own / others, TIMES, "times its own error")


def _apart(subject: Subject, twin: Any) -> float:
    """By how much of the largest logit the logits of both are apart."""
    apart = []
    for sequence in sequences_of(subject.rows[:ROWS]):
        ids = torch.from_numpy(sequence.ids).long()[None].to(subject.model.device)
        theirs = twin(ids).logits  # (1, T, V)
        apart.append((subject.model(ids) - theirs).abs().max() / theirs.abs().max())
    return largest(apart)


def _logps(subject: Subject, twin: Any) -> Logps:
    """Of the answers of these rows by transformers' model."""
    found, device = [], subject.model.device
    for sequence in sequences_of(subject.rows[:ROWS]):
        ids, mask = torch.from_numpy(sequence.ids).long().to(device), torch.from_numpy(sequence.mask).to(device)
        logps = twin(ids[None]).logits[0, :-1].float().log_softmax(dim=-1)  # (T - 1, V)
        found.append(logps.gather(1, ids[1:, None])[mask[1:], 0])
    return found
