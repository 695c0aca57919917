"""Log-probabilities of chosen tokens straight from hidden states, without ever holding [N, V] logits.

    logits[n] = W h[n] + b (+ B u[n], a low-rank adapter)         logp[n] = logits[n, target[n]] - logsumexp(logits[n])
    d logp / d logits = onehot(target) - softmax(logits)

Rows are taken a chunk at a time; everything from the logits on is float32. Two backward passes exist. With a frozen
head the gradient is a row-wise multiple of a gradient known in the forward pass, so that one is kept, (N, C), and
nothing is computed twice. With a trainable head, or a trainable adapter on it, each chunk's logits are made again.

Dims: N rows, C hidden, V vocabulary, r adapter rank.
Source: arXiv:2411.09009 (cut cross-entropy) for the idea; chunking by rows as in Liger-Kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    adapter_hidden: Tensor | None = None,
    adapter_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula above on whole logits, in float32. Arguments and results as in `linear_logprob`."""
    logits = hidden.float() @ weight.float().T + bias.float()  # (N, V)
    if adapter_hidden is not None:
        logits = logits + adapter_hidden.float() @ adapter_weight.float().T
    logp = logits.log_softmax(dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    adapter_hidden: Tensor | None = None,
    adapter_weight: Tensor | None = None,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of one target token per row.

    Args:
        hidden: (N, C), any float dtype.
        weight, bias: (V, C) and (V,), the head.
        targets: (N,) token ids in [0, V).
        adapter_hidden, adapter_weight: (N, r) scaled and (V, r), a LoRA adapter on the head; or both None.
        entropy: also return the entropy of each row's distribution. It carries no gradient.
    Returns:
        (N,) float32 log-probabilities in nats, and (N,) float32 entropies in nats or None.
    Raises:
        ValueError: when the rows of hidden and targets differ in number.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, targets has {targets.shape[0]}; they must be equal")
    logp, entropies = _LinearLogProb.apply(hidden, weight, bias, targets, adapter_hidden, adapter_weight, entropy)
    return logp, entropies if entropy else None


class _Head:
    """The head's tensors in the dtype its matmuls take: float32 on a CPU, their own with float32 results on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter_weight: Tensor | None) -> None:
        self.weight = weight if weight.is_cuda else weight.float()
        self.bias, self.adapter_weight = bias.float(), adapter_weight

    def logits(self, hidden: Tensor, adapter_hidden: Tensor | None) -> Tensor:
        """(n, V) float32."""
        logits = _matmul(hidden, self.weight.T, self.bias)
        if adapter_hidden is not None:
            logits.addmm_(adapter_hidden, self.adapter_weight.T)
        return logits

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradient of the hidden states, (n, C) float32, from that of the logits."""
        return _matmul(grad, self.weight)


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b, plus a bias, with float32 accumulation and result; half precision operands stay half on a GPU."""
    if b.is_cuda and b.dtype != torch.float32:
        product = torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    return a.float() @ b if bias is None else torch.addmm(bias, a.float(), b)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows(tensor: Tensor | None, chunk: slice) -> Tensor | None:
    return None if tensor is None else tensor[chunk]


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, adapter_hidden, adapter_weight, entropy):
        head = _Head(weight, bias, adapter_weight)
        N, V = hidden.shape[0], weight.shape[0]
        logp, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
        entropies = torch.empty_like(logp) if entropy else None
        needs = ctx.needs_input_grad
        ctx.head_is_frozen = not (needs[1] or needs[2] or needs[5])
        keep_unit = ctx.head_is_frozen and (needs[0] or needs[4])
        unit = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if keep_unit else None
        unit_adapter = torch.empty_like(adapter_hidden) if keep_unit and adapter_hidden is not None else None
        for chunk in _chunks(N, V):
            logits = head.logits(hidden[chunk], _rows(adapter_hidden, chunk))  # (n, V)
            top = logits.amax(dim=-1, keepdim=True)
            logits -= top
            picked = logits.gather(1, targets[chunk, None])
            mean = (logits.exp() * logits).sum(dim=-1, keepdim=True) if entropy else None
            weights = logits.exp_()  # softmax but for its denominator, written over the logits
            total = weights.sum(dim=-1, keepdim=True)
            logp[chunk] = (picked - total.log()).squeeze(1)
            lse[chunk] = (top + total.log()).squeeze(1)
            if entropy:
                entropies[chunk] = (total.log() - mean / total).squeeze(1)
            if keep_unit:
                grad = _add_onehot_(weights.div_(-total), targets[chunk])
                unit[chunk] = head.pull_back(grad)
                if unit_adapter is not None:
                    unit_adapter[chunk] = grad @ adapter_weight
            logits = weights = grad = None  # all one tensor: it goes before the next one comes
        if ctx.head_is_frozen:
            ctx.save_for_backward(unit, unit_adapter)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, adapter_hidden, adapter_weight, lse)
        if entropy:
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    def backward(ctx, grad_logp, _):
        if ctx.head_is_frozen:
            scaled = (None if u is None else (u * grad_logp[:, None]).to(u.dtype) for u in ctx.saved_tensors)
            grad_hidden, grad_adapter_hidden = scaled
            return grad_hidden, None, None, None, grad_adapter_hidden, None, None
        return _recompute_backward(grad_logp, ctx.needs_input_grad, *ctx.saved_tensors)


def _add_onehot_(grad: Tensor, targets: Tensor) -> Tensor:
    return grad.scatter_add_(1, targets[:, None], torch.ones_like(grad[:, :1]))


def _recompute_backward(grad_logp, needs, hidden, weight, bias, targets, adapter_hidden, adapter_weight, lse):
    head = _Head(weight, bias, adapter_weight)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight, grad_bias, grad_adapter_weight = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if need else None
        for x, need in ((weight, needs[1]), (bias, needs[2]), (adapter_weight, needs[5]))
    )
    grad_adapter_hidden = torch.empty_like(adapter_hidden) if needs[4] else None
    for chunk in _chunks(hidden.shape[0], weight.shape[0]):
        logits = head.logits(hidden[chunk], _rows(adapter_hidden, chunk))
        grad = _add_onehot_(logits.sub_(lse[chunk, None]).exp_().neg_(), targets[chunk])  # onehot - softmax, (n, V)
        grad *= grad_logp[chunk, None]
        if needs[0]:
            grad_hidden[chunk] = head.pull_back(grad)
        if needs[1]:
            grad_weight += _matmul(grad.T, hidden[chunk].to(head.weight.dtype))
        if needs[2]:
            grad_bias += grad.sum(dim=0)
        if needs[4]:
            grad_adapter_hidden[chunk] = grad @ adapter_weight
        if needs[5]:
            grad_adapter_weight.addmm_(grad.T, adapter_hidden[chunk])
        logits = grad = None  # one tensor: it goes before the next one comes
    cast = [None if g is None else g.to(x.dtype) for g, x in ((grad_weight, weight), (grad_bias, bias))]
    return grad_hidden, *cast, None, grad_adapter_hidden, grad_adapter_weight, None
