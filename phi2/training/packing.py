"""From encoded sequences to the tensors of one forward pass: one long row, no padding.

The sequences of a pass stand one behind the other in a single row. `visible_until` keeps them apart, positions
begin anew in each, and only the hidden states that predict a target are named, by their place in the row. All answers
to a prompt share it: the row holds [prompt | answer | answer ...], the tokens of an answer cannot see another one, and
their positions go on from the prompt, so the result is that of separate rows at the price of one prompt.

Dims: T tokens of the row, N targets.
Source: prefix sharing, arXiv:2410.20305; best-fit packing, arXiv:2404.10830.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from phi2.arriving import without_wait
from phi2.data.encoded import EncodedPreference, EncodedSequence


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one forward pass.

    Attributes:
        input_ids: (1, T) token ids.
        positions: (1, T) place of each token in its own sequence.
        visible_until: (1, T) int32, for each token the end of those that may see it.
        logits_indices: (N,) which token's hidden state predicts each target.
        targets: (N,) token ids to predict.
    """

    input_ids: Tensor
    positions: Tensor
    visible_until: Tensor
    logits_indices: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> TokenRow:
        return TokenRow(*(without_wait(getattr(self, f.name), device) for f in fields(self)))


def row_of_sequences(sequences: Sequence[EncodedSequence]) -> TokenRow:
    """Sequences one behind the other; a masked token is predicted by the token before it in its own sequence."""
    starts = _starts([len(s.ids) for s in sequences])
    return _row(
        ids=[s.ids for s in sequences],
        positions=[np.arange(len(s.ids)) for s in sequences],
        until=[np.full(len(s.ids), start + len(s.ids)) for start, s in zip(starts, sequences, strict=True)],
        indices=[start + np.flatnonzero(s.mask[1:]) for start, s in zip(starts, sequences, strict=True)],
        targets=[s.ids[1:][s.mask[1:]] for s in sequences],
    )


def row_of_answers(rows: Sequence[EncodedPreference]) -> TokenRow:
    """[prompt | answer | answer ...] of every row; targets are the tokens of the answers, in this order."""
    ids, positions, until, indices = [], [], [], []
    for start, row in zip(_starts([row.tokens for row in rows]), rows, strict=True):
        prompt, last = len(row.prompt), start + len(row.prompt) - 1
        ids += [row.prompt, *row.answers]
        positions.append(np.arange(prompt))
        until.append(np.full(prompt, start + row.tokens))
        begin = last + 1
        for answer in row.answers:
            end = begin + len(answer)
            positions.append(np.arange(prompt, prompt + len(answer)))
            until.append(np.full(len(answer), end))
            indices += [[last][: len(answer)], np.arange(begin, end - 1)]  # the prompt predicts the first token
            begin = end
    return _row(ids, positions, until, indices, targets=[answer for row in rows for answer in row.answers])


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths)[:-1].tolist()]


def _row(ids, positions, until, indices, targets) -> TokenRow:
    joined = (np.concatenate(part) for part in (ids, positions, until, indices, targets))
    ids, positions, until, indices, targets = (torch.from_numpy(part.astype(np.int64)) for part in joined)
    return TokenRow(ids[None], positions[None], until[None].int(), indices, targets)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence, longest first, goes into the fullest block that still has room for it.

    Among equally full blocks it is the one that became so first, as in trl.

    Args:
        lengths: tokens of each sequence, none above capacity.
        capacity: tokens of a block.
    Returns:
        For each block, the indices of its sequences; every index stands in exactly one block.
    Raises:
        ValueError: when a sequence is longer than a block.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a block of {capacity}")
    blocks: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (free tokens, turn it came to have them, block), sorted
    for turn, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        place = bisect.bisect_left(room, (lengths[index],))
        if place < len(room):
            free, _, block = room.pop(place)
        else:
            free, block = capacity, len(blocks)
            blocks.append([])
        blocks[block].append(index)
        bisect.insort(room, (free - lengths[index], turn, block))
    return blocks


def wrapped(sequences: Sequence[EncodedSequence], length: int, separator: int) -> list[EncodedSequence]:
    """All sequences joined end to end, each ending in the separator token, cut every `length` tokens.

    The old trl `ConstantLengthDataset` form: a block is one sequence to attention and positions, whatever documents it
    cuts through. The last incomplete block is dropped, and so is a block without a target.

    Args:
        sequences: in the order in which they are joined.
        length: tokens of a block.
        separator: token id put behind every sequence that does not end in it; it is a target.
    Raises:
        ValueError: when all of them together do not fill one block, or no block holds a target.
    """
    ended = [s if s.ids[-1] == separator else _with_end(s, separator) for s in sequences]
    ids, mask = np.concatenate([s.ids for s in ended]), np.concatenate([s.mask for s in ended])
    starts = range(0, len(ids) - length + 1, length)
    blocks = [EncodedSequence(ids[i : i + length], mask[i : i + length], sequences[0].origin) for i in starts]
    blocks = [block for block in blocks if block.target_tokens]
    if not blocks:
        raise ValueError(f"{len(ids)} tokens do not fill one block of {length} with something to learn in it")
    return blocks


def _with_end(sequence: EncodedSequence, token: int) -> EncodedSequence:
    ids = np.append(sequence.ids, token).astype(np.int32)
    return EncodedSequence(ids, np.append(sequence.mask, True), sequence.origin)
