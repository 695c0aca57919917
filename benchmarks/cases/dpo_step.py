"""The step of phi-2-instruct's recipe on a GPU: LoRA DPO, reference included, without the optimizer.

Ours packs the pairs into one row in which both answers share a prompt, the library's `score_answers`; the peer pads
twice as many sequences to the longest, as trl does.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Inputs, Outputs, Work
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.models import PHI2, TINY, random_model, twin
from phi2.config import Phi2Config
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.fused import fuse
from phi2.lora import adapter_state, disabled
from phi2.lora_config import LoraConfig
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.model import Phi2ForCausalLM
from phi2.training.passes import Passes
from phi2.training.reference import adapters_off
from phi2.training.scoring import score_answers

LORA = LoraConfig(r=16)


@gpu_case(
    "training_step",
    turns=10,
    summary="LoRA DPO of Phi-2 over 4 and 16 pairs: reference, forward and backward pass",
    tiny=dict(shape=TINY, answer=9),
)
def training_step(device: torch.device, shape: Phi2Config = PHI2, answer: int = 256) -> list[Comparison]:
    """At the recipe's 4 pairs, and at 16: the four micro-batches of its window in one pass."""
    return [compare_dpo_step(device, torch.bfloat16, shape, pairs, answer) for pairs in (4, 16)]


def compare_dpo_step(
    device: torch.device, dtype: torch.dtype, shape: Phi2Config, pairs: int, answer: int
) -> Comparison:
    """Pairs with prompts and answers of up to `answer` tokens -> their losses and the gradient of all adapters."""
    loss = bind_loss("sigmoid")
    policy = partial(_policy, device, shape)

    def inputs(seed: int) -> Inputs:
        return tuple(_pairs(seed, shape.vocab_size, pairs, answer))

    with torch.device("meta"):
        model = Phi2ForCausalLM(shape)
    layers = [*model.model.layers.parameters(), *model.lm_head.parameters()]
    multiplied = sum(parameter.numel() for parameter in layers)
    tokens = sum(len(part) for pair in inputs(0) for part in (pair.prompt, pair.chosen, pair.rejected))
    return Comparison(
        name=f"DPO step, {pairs} pairs",
        inputs=inputs,
        reference=lambda *given: _by_definition(policy(torch.float32), loss, *given),
        ours=Implementation(lambda *given: _ours(policy(dtype, fused=True), loss, *given)),
        plain=Implementation(lambda *given: _by_definition(policy(dtype), loss, *given)),
        peers={
            "ours, not fused": lambda: Implementation(lambda *given: _ours(policy(dtype), loss, *given)),
            "transformers, peft": lambda: Implementation(partial(_theirs, _peft_model(policy(dtype)), loss)),
        },
        work=Work(6 * tokens * multiplied, 0),  # two passes forward, and the gradients of what they multiply
        targets={"transformers, peft": 1.25},
        rounding=5 * ROUNDING[dtype],  # of many layers
    )


@cache  # for all comparisons
def _policy(device: torch.device, shape: Phi2Config, dtype: torch.dtype, fused: bool = False) -> Phi2ForCausalLM:
    model = random_model(shape, device, dtype, LORA.r)
    fuse(model, fused)
    return model


def _pairs(seed: int, vocabulary: int, count: int, longest: int) -> list[EncodedPreference]:
    """Prompts and answers of a quarter to all of the tokens allowed."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, longest // 4), longest + 1, size=(count, 3))
    tokens = [[rng.integers(vocabulary, size=length).astype(np.int32) for length in row] for row in lengths]
    return [
        EncodedPreference(prompt, (chosen, rejected), PAIR, Origin("random", 1), {})
        for prompt, chosen, rejected in tokens
    ]


def _ours(model: Phi2ForCausalLM, loss: BoundLoss, *pairs: EncodedPreference) -> Outputs:
    losses = loss(score_answers(model, pairs, Passes(10**9).cut, adapters_off(model), nullcontext))
    return _with_gradient(model, losses)


def _with_gradient(model: nn.Module, losses: Tensor) -> Outputs:
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(losses.mean(), adapters)
    return {"losses": losses.detach(), "gradient": torch.cat([grad.flatten() for grad in grads])}


def _by_definition(model: Phi2ForCausalLM, loss: BoundLoss, *pairs: EncodedPreference) -> Outputs:
    """Each sequence alone, from whole logits."""

    def margins() -> Tensor:
        scored = [[_logp(model, pair.prompt, part) for part in (pair.chosen, pair.rejected)] for pair in pairs]
        return torch.stack([chosen - rejected for chosen, rejected in scored])

    with disabled(model), torch.no_grad():
        reference = margins()
    return _with_gradient(model, -nn.functional.logsigmoid(loss.reward_scale * (margins() - reference)))


def _logp(model: Phi2ForCausalLM, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64)).to(model.device)
    logps = model(ids[None])[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, ids[len(prompt) :, None]).sum()


@cache
def _peft_model(ours: Phi2ForCausalLM) -> nn.Module:
    """The same weights and adapter in transformers and peft."""
    import peft

    settings = dict(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules=list(LORA.target_modules))
    adapted = peft.get_peft_model(twin(ours), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, tensor in adapter_state(ours).items():
            name = name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
            adapted.get_parameter(f"base_model.model.{name}").data = tensor.clone()
    return adapted


def _theirs(model: nn.Module, loss: BoundLoss, *pairs: EncodedPreference) -> Outputs:
    """As trl: chosen and rejected answers in one padded batch, whole logits."""
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    device = next(model.parameters()).device
    ids = [torch.from_numpy(np.concatenate(each).astype(np.int64)).to(device) for each in answers]
    target = [torch.arange(len(p) + len(a), device=device) >= len(p) for p, a in answers]
    batch, mask = pad_sequence(ids, batch_first=True), pad_sequence(target, batch_first=True)
    seen = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)

    def margins() -> Tensor:
        logps = model(input_ids=batch, attention_mask=seen).logits[:, :-1].float().log_softmax(-1)
        chosen = logps.gather(2, batch[:, 1:, None])[..., 0] * mask[:, 1:]
        sums = chosen.sum(dim=-1)
        return sums[::2] - sums[1::2]

    with model.disable_adapter(), torch.no_grad():
        reference = margins()
    return _with_gradient(model, -nn.functional.logsigmoid(loss.reward_scale * (margins() - reference)))
