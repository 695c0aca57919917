"""The model beside transformers' PhiForCausalLM, where transformers is installed; nothing else here imports it."""

from __future__ import annotations

from importlib.util import find_spec
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
    from transformers import PhiConfig, PhiForCausalLM

    with torch.device("meta"):
        twin = PhiForCausalLM(PhiConfig.from_dict(model.config.to_dict()))
    own = {name: weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    twin.load_state_dict(own, strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config).to(model.device)  # of no checkpoint
    return twin.eval()


@torch.no_grad()
def beside_transformers(subject: Subject) -> Measured:
    """Logits in float32; in half precision the errors of both against float32."""
    if find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    model, twin = subject.model, twin_of(subject.model)
    with disabled(model):
        if model.dtype == torch.float32:
            return Measured(_apart(subject, twin), LOGITS, "of the largest logit")
        exact, ours = (f(model, subject.rows[:ROWS]) for f in (_exact, alone))
    theirs = moved(exact, _logps(subject, twin)).token_mean
    return Measured(moved(exact, ours).token_mean / theirs, TIMES, "times its own error")


def _exact(model: Phi2ForCausalLM, rows: list) -> Logps:
    return in_dtype(model, rows, torch.float32)


def _apart(subject: Subject, twin: Any) -> float:
    apart = []
    for sequence in sequences_of(subject.rows[:ROWS]):
        ids = torch.from_numpy(sequence.ids).long()[None].to(subject.model.device)
        theirs = twin(ids).logits  # (1, T, V)
        apart.append((subject.model(ids) - theirs).abs().max() / theirs.abs().max())
    return largest(apart)


def _logps(subject: Subject, twin: Any) -> Logps:
    found = []
    for sequence in sequences_of(subject.rows[:ROWS]):
        ids, mask = torch.from_numpy(sequence.ids).long(), torch.from_numpy(sequence.mask)
        logps = twin(ids[None].to(subject.model.device)).logits[0].float().log_softmax(dim=-1).cpu()
        found.append(logps[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]])
    return found
