"""The same answers read in every layout there is: alone, in a padded batch, packed, with shared prompts, and in another
dtype. What a model says of them must not depend on it beyond rounding.

Each function returns the log-probabilities of 2B answers, chosen and rejected of each of B pairs in turn: a list of
(tokens,) float32 in nats.

Dims: B pairs, T tokens of a row, N targets, C hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encode import EncodedPair, EncodedSequence
from phi2.data.records import Origin
from phi2.lab.verify_config import BATCH
from phi2.linear import PhiLinear
from phi2.lora import LoraLinear
from phi2.losses.head import head_logps, target_logps
from phi2.model import Block, Phi2ForCausalLM
from phi2.training.packing import row_of_pairs, row_of_sequences
from phi2.training.pairs import row_logps
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

Logps = list[Tensor]


def sequences_of(pairs: Sequence[EncodedPair]) -> list[EncodedSequence]:
    """Prompt and answer as one text, for each answer; the answer is what is predicted."""
    return [behind(pair.prompt, answer, pair.origin) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def behind(prompt: np.ndarray, answer: np.ndarray, origin: Origin) -> EncodedSequence:
    """One answer behind its prompt."""
    ids = np.concatenate((prompt, answer))
    return EncodedSequence(ids, np.arange(len(ids)) >= len(prompt), origin)


def batches_of(rows: Sequence, size: int = BATCH) -> Iterator[Sequence]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def alone(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair]) -> Logps:
    """Each answer behind its prompt in a row of its own; with gradient where one is asked for."""
    return [sequence_logps(model, sequence) for sequence in sequences_of(pairs)]


def sequence_logps(model: Phi2ForCausalLM, sequence: EncodedSequence) -> Tensor:
    """(N,) of the targets of a sequence, by a plain causal pass."""
    ids, places, targets = _of_sequence(sequence, model.device)
    return target_logps(model, model.model(ids[None]), places, targets)[0]


def _of_sequence(sequence: EncodedSequence, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) ids, (N,) places whose hidden states predict a target, (N,) targets."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64)).to(device)
    places = torch.from_numpy(np.flatnonzero(sequence.mask[1:])).to(device)
    return ids, places, ids[places + 1]


def padded(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair]) -> Logps:
    """Rows of a batch, filled up at their ends."""
    found = []
    for batch in batches_of(sequences_of(pairs), 2 * BATCH):
        parts = [_of_sequence(sequence, model.device) for sequence in batch]
        hidden = model.model(pad_sequence([ids for ids, _, _ in parts], batch_first=True))  # (2B, T, C)
        found += [
            target_logps(model, hidden[row : row + 1], places, targets)[0]
            for row, (_, places, targets) in enumerate(parts)
        ]
    return found


def packed(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair]) -> Logps:
    """Answers with their prompts one behind the other in a row, as supervised rows are packed."""
    found: Logps = []
    for batch in batches_of(sequences_of(pairs), 2 * BATCH):
        logps = row_logps(model, row_of_sequences(batch).to(model.device))
        found += logps.split([sequence.target_tokens for sequence in batch])
    return found


def shared(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair], size: int = BATCH) -> Logps:
    """Pairs with shared prompts, some in a row, as preference runs read them."""
    found: Logps = []
    for batch in batches_of(pairs, size):
        logps = row_logps(model, row_of_pairs(batch).to(model.device))
        found += logps.split([len(answer) for pair in batch for answer in (pair.chosen, pair.rejected)])
    return found


def reordered(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair]) -> Logps:
    """`shared` with the pairs in another order, and so beside other neighbours; given back in their own."""
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    found = [*batches_of(shared(model, [pairs[i] for i in order]), 2)]
    return [answer for i in range(len(pairs)) for answer in found[order.index(i)]]


@torch.no_grad()
def in_dtype(model: Phi2ForCausalLM, pairs: Sequence[EncodedPair], dtype: torch.dtype) -> Logps:
    """`alone` with weights and activations in another dtype, of which one block at a time is in memory."""
    core, parts = model.model, [_of_sequence(sequence, model.device) for sequence in sequences_of(pairs)]
    streams = [core.embed_tokens(ids[None]).to(dtype) for ids, _, _ in parts]  # (1, T, C) each
    for block in core.blocks:
        streams = list(_through(in_precision(block, dtype), streams, model))
    norm, head = in_precision(core.final_layernorm, dtype), in_precision(model.lm_head, dtype)
    assert isinstance(head, PhiLinear)
    picked = (norm(x[0, places]) for x, (_, places, _) in zip(streams, parts, strict=True))  # (N, C) each
    return [head_logps(head, hidden, targets)[0] for hidden, (_, _, targets) in zip(picked, parts, strict=True)]


def _through(block: Block, streams: Sequence[Tensor], model: Phi2ForCausalLM) -> Iterator[Tensor]:
    for x in streams:
        T, config = x.shape[1], model.config
        angles = rotary_angles(torch.arange(T, device=x.device)[None], config.rotary_dim, config.rope_theta)
        yield block(x, angles, Visibility(T, T, None, x.device), None)


def in_precision(module: nn.Module, dtype: torch.dtype):
    """A copy of a module in another dtype; adapters stay in float32, as they do on any base."""
    copied = copy.deepcopy(module).to(dtype)
    for layer in (layer for layer in copied.modules() if isinstance(layer, LoraLinear)):
        for adapter in layer.adapters.values():
            adapter.lora_A.float(), adapter.lora_B.float()
    return copied
