"""The same answers read in every layout there is: alone, in a padded batch, packed, with shared prompts, and in another
dtype. What a model says of them must not depend on it beyond rounding.

Each function returns the log-probabilities of all answers of some preference rows, in their order: a list of (tokens,)
float32 in nats.

Dims: B sequences of a batch, T tokens of a sequence, N targets, C hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encoded import EncodedPreference, EncodedSequence
from phi2.data.records import Origin
from phi2.lab.verify_config import BATCH
from phi2.linear import PhiLinear
from phi2.lora import LoraLinear
from phi2.losses.head import head_logps, target_logps
from phi2.model import Block, Phi2ForCausalLM
from phi2.training.packing import row_of_answers, row_of_sequences
from phi2.training.scoring import row_logps
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

Logps = list[Tensor]


def sequences_of(rows: Sequence[EncodedPreference]) -> list[EncodedSequence]:
    """Prompt and answer as one text, for each answer; the answer is what is predicted."""
    return [behind(row.prompt, answer, row.origin) for row in rows for answer in row.answers]


def behind(prompt: np.ndarray, answer: np.ndarray, origin: Origin) -> EncodedSequence:
    """One answer behind its prompt."""
    ids = np.concatenate((prompt, answer))
    return EncodedSequence(ids, np.arange(len(ids)) >= len(prompt), origin)


def batches_of(rows: Sequence, size: int = BATCH) -> Iterator[Sequence]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def alone(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference]) -> Logps:
    """Each answer behind its prompt in a row of its own; with gradient where one is asked for."""
    return [sequence_logps(model, sequence) for sequence in sequences_of(rows)]


def sequence_logps(model: Phi2ForCausalLM, sequence: EncodedSequence) -> Tensor:
    """(N,) of the targets of a sequence, by a plain causal pass."""
    ids, places, targets = _of_sequence(sequence, model.device)
    return target_logps(model, model.model(ids[None]), places, targets)[0]


def _of_sequence(sequence: EncodedSequence, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) ids, (N,) places whose hidden states predict a target, (N,) targets."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64)).to(device)
    places = torch.from_numpy(np.flatnonzero(sequence.mask[1:])).to(device)
    return ids, places, ids[places + 1]


def padded(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference]) -> Logps:
    """Rows of a batch, filled up at their ends."""
    found = []
    for batch in batches_of(sequences_of(rows), 2 * BATCH):
        parts = [_of_sequence(sequence, model.device) for sequence in batch]
        hidden = model.model(pad_sequence([ids for ids, _, _ in parts], batch_first=True))  # (2B, T, C)
        found += [
            target_logps(model, hidden[row : row + 1], places, targets)[0]
            for row, (_, places, targets) in enumerate(parts)
        ]
    return found


def packed(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference]) -> Logps:
    """Answers with their prompts one behind the other in a row, as supervised rows are packed."""
    found: Logps = []
    for batch in batches_of(sequences_of(rows), 2 * BATCH):
        logps = row_logps(model, row_of_sequences(batch).to(model.device))
        found += logps.split([sequence.target_tokens for sequence in batch])
    return found


def shared(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference], size: int = BATCH) -> Logps:
    """Answers with shared prompts, some rows in one, as preference runs read them."""
    found: Logps = []
    for batch in batches_of(rows, size):
        logps = row_logps(model, row_of_answers(batch).to(model.device))
        found += logps.split([len(answer) for row in batch for answer in row.answers])
    return found


def reordered(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference]) -> Logps:
    """`shared` with the rows in another order, and so beside other neighbours; given back in their own."""
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    found = iter(shared(model, [rows[i] for i in order]))
    of_row = {i: list(islice(found, len(rows[i].answers))) for i in order}
    return [answer for i in range(len(rows)) for answer in of_row[i]]


@torch.no_grad()
def in_dtype(model: Phi2ForCausalLM, rows: Sequence[EncodedPreference], dtype: torch.dtype) -> Logps:
    """`alone` with weights and activations in another dtype, of which one block at a time is in memory."""
    core, parts = model.model, [_of_sequence(sequence, model.device) for sequence in sequences_of(rows)]
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
