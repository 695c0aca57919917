"""A reference that follows the policy: it starts as a copy of it, and moves behind every so many updates.

    mixing (TR-DPO)   ref <- a policy + (1 - a) ref;  with a = 1, its hard update, the reference becomes the policy
    BEMA              avg <- b_t policy + (1 - b_t) avg,  ref <- avg + g_t (policy - start)
                      b_t = (lag + multiplier t)^-ema_power,  g_t = (lag + multiplier t)^-bias_power,  t updates done

These are sums of weights. Of a policy that trains throughout, the reference is a second model. Of one with LoRA it is a
second adapter on the same base, and what is summed is the change of a weight, s B A, not A and B: a sum of A's times a
sum of B's is something else, and would depend on how a change is cut into its factors. A sum of changes is itself a
low-rank change, with the factors of all of them side by side: exact, and as large as their ranks together. Once that
is more than 8 times the policy's rank it is cut to the 4 times that fit it best.

Source: TR-DPO, arXiv:2404.09656; BEMA, arXiv:2508.00180 Algorithm 1, as trl 1.16 moves a reference by it.
Dims: r LoRA rank of the policy, k of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from phi2.data.encoded import EncodedPreference
from phi2.files import one_line
from phi2.lora import AdaptableModel, copy_adapter, lora_modules
from phi2.runs.checkpoint import save_tensors
from phi2.training.config import PreferenceConfig
from phi2.training.extras import AskedReference
from phi2.training.packing import TokenRow

ADAPTER = "reference"  # its name on a policy with LoRA
FILE = "reference.safetensors"  # in a checkpoint
STACKED, KEPT = 8, 4  # most ranks of the policy that a sum has, and those that are kept of a larger one


class Change(NamedTuple):
    """What an adapter adds to a weight, but for its scaling: B A."""

    A: Tensor  # (k, in)
    B: Tensor  # (out, k)


Piece = Tensor | Change  # a weight, or the change of one
Pieces = Mapping[str, Piece]


class Copy(Protocol):
    """A policy and its copy, in pieces of the same names."""

    def policy(self) -> Pieces: ...
    def reference(self) -> Pieces: ...
    def put(self, name: str, piece: Piece) -> None: ...


class ModelCopy:
    """A second model of the same shape; pieces are the weights that train."""

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        self.model, self.copy = model, copy

    def policy(self) -> Pieces:
        return {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}

    def reference(self) -> Pieces:
        weights = dict(self.copy.named_parameters())
        return {name: weights[name].detach() for name in self.policy()}

    def put(self, name: str, piece: Piece) -> None:
        """Makes this a piece of the copy."""
        assert isinstance(piece, Tensor)
        self.copy.get_parameter(name).detach().copy_(piece)


class AdapterCopy:
    """A second adapter on the same base; pieces are the changes of its layers.

    The policy's own change has an adapter of its rank, any other one of the largest rank with zeros where there is
    nothing: kernels are compiled for a rank, and sums of changes are of many.
    """

    def __init__(self, model: AdaptableModel) -> None:
        self.layers = lora_modules(model)
        self.ranks = {name: len(layer.lora_A.weight) for name, layer in self.layers.items()}
        copy_adapter(model, ADAPTER)

    def policy(self) -> Pieces:
        return {name: Change(layer.lora_A.weight, layer.lora_B.weight) for name, layer in self.layers.items()}

    def reference(self) -> Pieces:
        adapters = {name: layer.adapters[ADAPTER] for name, layer in self.layers.items()}
        pairs = {name: (each.lora_A.weight, each.lora_B.weight, self.ranks[name]) for name, each in adapters.items()}
        return {name: Change(A[:k], B[:, :k]) for name, (A, B, k) in pairs.items()}

    def put(self, name: str, piece: Piece, as_sum: bool = False) -> None:
        """As in `ModelCopy`; `as_sum`: into an adapter as large as that of a sum, though it may be none."""
        assert isinstance(piece, Change)
        layer, k = self.layers[name], len(piece.A)
        r, self.ranks[name] = len(layer.lora_A.weight), k
        empty = STACKED * r - k if as_sum or k != r else 0
        layer.put(ADAPTER, F.pad(piece.A, (0, 0, 0, empty)), F.pad(piece.B, (0, empty)))


class MovingReference:
    """Says what its copy of the policy says.

    Args:
        live: asks the copy.
        checkpoint: that the policy comes from, and the copy then too.
    Raises:
        ValueError: naming the file of a checkpoint that cannot be read.
    """

    def __init__(self, config: PreferenceConfig, live: AskedReference, copy: Copy, checkpoint: Path | None) -> None:
        self.config, self.live, self.copy, self.asked = config, live, copy, live.asked
        self.start: dict[str, Piece] = {}
        self.average: dict[str, Piece] = {}
        if config.bema is not None:
            self.start, self.average = ({n: _total([(1.0, p)]) for n, p in copy.policy().items()} for _ in range(2))
        if checkpoint is not None:
            self._restore(checkpoint / FILE)

    def __call__(self, rows: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        return self.live(rows, row)

    @property
    def grows(self) -> bool:
        """Whether it is computed in another form once it has moved: with LoRA, unless it becomes the policy itself."""
        is_sum = self.config.bema is not None or self.config.ref_model_mixup_alpha != 1
        return is_sum and isinstance(self.copy, AdapterCopy)

    @contextmanager
    def grown(self) -> Iterator[None]:
        """Within, one that grows says the same in its later form: for kernels to be compiled."""
        assert isinstance(self.copy, AdapterCopy)
        before = self.copy.reference()
        try:
            for name, piece in before.items():
                self.copy.put(name, piece, as_sum=True)
            yield
        finally:
            for name, piece in before.items():
                self.copy.put(name, piece)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves, where that is due behind update `step`, counted from 1."""
        if step % self.config.ref_model_sync_steps:
            return
        reference = self.copy.reference()
        for name, policy in self.copy.policy().items():
            self.copy.put(name, self._moved(name, policy, reference[name], step))

    def _moved(self, name: str, policy: Piece, reference: Piece, step: int) -> Piece:
        bema, alpha = self.config.bema, self.config.ref_model_mixup_alpha
        if bema is None:
            return _total([(alpha, policy), (1 - alpha, reference)])
        age = bema.lag + bema.multiplier * step
        beta, gain = age**-bema.ema_power, age**-bema.bias_power
        self.average[name] = _total([(beta, policy), (1 - beta, self.average[name])])
        return _total([(1.0, self.average[name]), (gain, policy), (-gain, self.start[name])])

    def save(self, checkpoint: Path) -> None:
        """Writes all that it goes on from into the folder of a checkpoint."""
        groups = {"reference": self.copy.reference(), "start": self.start, "average": self.average}
        tensors = {f"{group}.{name}": piece for group, pieces in groups.items() for name, piece in pieces.items()}
        save_tensors(_flat(tensors), checkpoint / FILE)

    def _restore(self, path: Path) -> None:
        try:
            tensors = safetensors.torch.load_file(path)
            for name, policy in self.copy.policy().items():
                self.copy.put(name, _like(policy, tensors, f"reference.{name}"))
                if self.config.bema is not None:
                    self.start[name] = _like(policy, tensors, f"start.{name}")
                    self.average[name] = _like(policy, tensors, f"average.{name}")
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot resume from this reference ({one_line(error)})") from error


@torch.no_grad()
def _total(parts: Sequence[tuple[float, Piece]]) -> Piece:
    """The weighted sum of weights, or of changes of them, in memory of its own; one part with weight 1 is itself."""
    weights, pieces = zip(*((weight, piece) for weight, piece in parts if weight), strict=True)
    if not isinstance(pieces[0], Change):
        total = pieces[0] * weights[0]
        for weight, piece in zip(weights[1:], pieces[1:], strict=True):
            total.add_(piece, alpha=weight)
        return total
    stacked = Change(
        torch.cat([piece.A for piece in pieces]),
        torch.cat([piece.B * weight for weight, piece in zip(weights, pieces, strict=True)], dim=1),
    )
    rank = min(len(piece.A) for piece in pieces)  # that of the policy, which is one of them
    return stacked if len(stacked.A) <= STACKED * rank else best_of_rank(stacked, KEPT * rank)


def best_of_rank(change: Change, rank: int) -> Change:
    """The change of so low a rank that is nearest to this one, in the sum of squares.

    Source: Eckart and Young 1936; the singular values of B A are those of R_B R_A^T, where B = Q_B R_B, A^T = Q_A R_A.
    """
    Q_B, R_B = torch.linalg.qr(change.B)
    Q_A, R_A = torch.linalg.qr(change.A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    return Change((root[:, None] * (Vh[:rank] @ Q_A.T)).contiguous(), ((Q_B @ U[:, :rank]) * root).contiguous())


def _flat(pieces: Pieces) -> dict[str, Tensor]:
    """As a file takes them."""
    tensors: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        parts = {f"{name}.A": piece.A, f"{name}.B": piece.B} if isinstance(piece, Change) else {name: piece}
        tensors |= {each: tensor.detach().contiguous() for each, tensor in parts.items()}
    return tensors


def _like(policy: Piece, tensors: Mapping[str, Tensor], name: str) -> Piece:
    """What `_flat` made of a piece of this kind, on its device."""
    if isinstance(policy, Change):
        return Change(*(tensors[f"{name}.{part}"].to(policy.A.device) for part in ("A", "B")))
    return tensors[name].to(policy.device)
