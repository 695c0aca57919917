"""Log-probabilities of chosen tokens straight from hidden states, without ever holding [N, V] logits.

    logits[n] = W h[n] + b (+ B u[n], a low-rank adapter)         logp[n] = logits[n, target[n]] - logsumexp(logits[n])
    d logp / d logits = onehot(target) - softmax(logits)

Rows are taken a chunk at a time; everything from the logits on is float32. Two backward passes exist. With a frozen
head the gradient is a row-wise multiple of a gradient known in the forward pass, so that one is kept, (N, C), and
nothing is computed twice. With a trainable head, or a trainable adapter on it, each chunk's logits are made again.

The matmuls are torch's. What lies between them, in `_Head.stats` and `_Head.gradient`, is torch or Triton.

Dims: N rows, C hidden, V vocabulary, r adapter rank.
Source: arXiv:2411.09009 (cut cross-entropy) for the idea; chunking by rows as in Liger-Kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton
from phi2_kernels.products import matmul

CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk on a CPU
GPU_CHUNK_BYTES = 400 * 2**20  # 2048 rows of 51200: smaller matmuls leave a GPU idle at their ends
FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    if adapter_hidden is not None and adapter_weight is not None:
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of one target token per row.

    Args:
        hidden: (N, C), any float dtype.
        weight, bias: (V, C) and (V,), the head.
        targets: (N,) token ids in [0, V).
        adapter_hidden, adapter_weight: (N, r) scaled and (V, r), a LoRA adapter on the head; or both None.
        entropy: also return the entropy of each row's distribution. It carries no gradient.
        impl: see `use_triton`.
    Returns:
        (N,) float32 log-probabilities in nats, and (N,) float32 entropies in nats or None.
    Raises:
        ValueError: when the rows of hidden and targets differ in number, or when Triton was named and cannot run.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, targets has {targets.shape[0]}; they must be equal")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    triton = use_triton(impl, hidden, lambda: unsupported_layout(hidden, bias=bias, targets=targets[:, None]))
    needs_grad = [x is not None and x.requires_grad for x in (hidden, weight, bias, adapter_hidden, adapter_weight)]
    head_needs_grad = needs_grad[1] or needs_grad[2] or needs_grad[4]
    save_grad = torch.is_grad_enabled() and any(needs_grad) and not head_needs_grad
    inputs = hidden, weight, bias, targets, adapter_hidden, adapter_weight
    logp, _, entropies, _, _ = _linear_logprob(*inputs, entropy, save_grad, triton)
    return logp, entropies if entropy else None


class _Head:
    """The head's tensors in the dtype its matmuls take: float32 on a CPU, their own with float32 results on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter_weight: Tensor | None, triton: bool) -> None:
        self.weight = weight if weight.is_cuda else weight.float()
        self.bias, self.adapter_weight, self.triton = bias, adapter_weight, triton

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients of logits, so that the matmuls behind them run at the speed of the weight's."""
        return self.weight.dtype

    def logits(self, hidden: Tensor, adapter_hidden: Tensor | None) -> Tensor:
        """(n, V) float32. Triton adds the bias itself, in the walk it takes over them anyway."""
        logits = matmul(hidden, self.weight.T, None if self.triton else self.bias.float())
        if adapter_hidden is not None and self.adapter_weight is not None:
            logits.addmm_(adapter_hidden.float(), self.adapter_weight.float().T)
        return logits

    def stats(
        self, logits: Tensor, targets: Tensor, logp: Tensor, lse: Tensor, entropies: Tensor | None, save_grad: bool
    ) -> Tensor | None:
        """Writes (n,) log-probabilities, logsumexps and entropies; returns the gradient of logp if `save_grad` says so.

        The logits are lost.
        """
        if self.triton:
            from phi2_kernels import linear_logprob_triton

            dtype = self.dtype if save_grad else None
            return linear_logprob_triton.stats(logits, self.bias, targets, logp, lse, entropies, dtype)
        return _stats(logits, targets, logp, lse, entropies, self.dtype if save_grad else None)

    def gradient(self, logits: Tensor, targets: Tensor, lse: Tensor, grad_logp: Tensor) -> Tensor:
        """(n, V), grad_logp times the gradient of logp. The logits are lost."""
        if self.triton:
            from phi2_kernels import linear_logprob_triton

            return linear_logprob_triton.gradient(logits, self.bias, targets, lse, grad_logp, self.dtype)
        weights = logits.sub_(lse[:, None]).exp_()
        return _add_onehot_(weights.neg_(), targets).mul_(grad_logp[:, None]).to(self.dtype)

    def hidden_grad(self, grad: Tensor) -> Tensor:
        """Gradient of the hidden states, (n, C) float32, from that of the logits."""
        return matmul(grad, self.weight)

    def adapter_grad(self, grad: Tensor) -> Tensor:
        """Gradient of the adapter's hidden states, (n, r) float32, from that of the logits."""
        assert self.adapter_weight is not None
        return matmul(grad, self.adapter_weight.to(self.dtype))


def _stats(
    logits: Tensor, targets: Tensor, logp: Tensor, lse: Tensor, entropies: Tensor | None, grad_dtype: torch.dtype | None
) -> Tensor | None:
    """`_Head.stats` in torch: one exponential a logit, in place."""
    top = logits.amax(dim=-1, keepdim=True)
    logits -= top
    picked = logits.gather(1, targets[:, None])
    mean = (logits.exp() * logits).sum(dim=-1, keepdim=True) if entropies is not None else None
    weights = logits.exp_()  # softmax but for its denominator, written over the logits
    total = weights.sum(dim=-1, keepdim=True)
    logp.copy_((picked - total.log()).squeeze(1))
    lse.copy_((top + total.log()).squeeze(1))
    if entropies is not None and mean is not None:
        entropies.copy_((total.log() - mean / total).squeeze(1))
    return None if grad_dtype is None else _add_onehot_(weights.div_(-total), targets).to(grad_dtype)


def _add_onehot_(grad: Tensor, targets: Tensor) -> Tensor:
    return grad.scatter_add_(1, targets[:, None], torch.ones_like(grad[:, :1]))


def _chunk_rows(vocabulary: int, on_gpu: bool) -> int:
    return max(1, (GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (4 * vocabulary))


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows(tensor: Tensor | None, chunk: slice) -> Tensor | None:
    return None if tensor is None else tensor[chunk]


@custom_op("phi2::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
    adapter_hidden: Tensor | None, adapter_weight: Tensor | None, entropy: bool, save_grad: bool, triton: bool,
) -> FiveTensors:  # fmt: skip
    """logp, lse and entropies (N,) in float32; with `save_grad` the gradients of logp, (N, C) and (N, r).

    What was not asked for is empty.
    """
    results = _new_results(hidden, adapter_hidden, entropy, save_grad)
    logp, lse, entropies, saved_grad_hidden, saved_grad_adapter = results
    head, targets = _Head(weight, bias, adapter_weight, triton), targets.contiguous()
    for chunk in _chunks(len(hidden), _chunk_rows(len(weight), weight.is_cuda)):
        logits = head.logits(hidden[chunk], _rows(adapter_hidden, chunk))  # (n, V)
        spread = entropies[chunk] if entropy else None
        grad = head.stats(logits, targets[chunk], logp[chunk], lse[chunk], spread, save_grad)
        if grad is not None:
            saved_grad_hidden[chunk] = head.hidden_grad(grad)
        if grad is not None and adapter_hidden is not None:
            saved_grad_adapter[chunk] = head.adapter_grad(grad)
        del logits, grad  # one tensor: it goes before the next one comes
    return results


def _new_results(hidden: Tensor, adapter_hidden: Tensor | None, entropy: bool, save_grad: bool) -> FiveTensors:
    logp, lse = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropies = _room(logp, entropy, hidden)
    return logp, lse, entropies, _room(hidden, save_grad, hidden), _room(adapter_hidden, save_grad, hidden)


def _room(x: Tensor | None, wanted: bool, beside: Tensor) -> Tensor:
    """Memory for what has the shape and dtype of x; empty when x is None or it is not wanted."""
    if x is None or not wanted:
        return torch.empty(0, dtype=torch.float32, device=beside.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_linear_logprob.register_fake
def _(hidden, weight, bias, targets, adapter_hidden, adapter_weight, entropy, save_grad, triton):
    return _new_results(hidden, adapter_hidden, entropy, save_grad)


@custom_op("phi2::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
    adapter_hidden: Tensor | None, adapter_weight: Tensor | None, lse: Tensor, needs: Sequence[bool], triton: bool,
) -> FiveTensors:  # fmt: skip
    """Gradients of hidden, weight, bias, adapter_hidden and adapter_weight; empty where `needs` says not needed."""
    grads = _new_gradients(hidden, weight, bias, adapter_hidden, adapter_weight, needs)
    grad_hidden, grad_weight, grad_bias, grad_adapter_hidden, grad_adapter_weight = grads
    head, targets = _Head(weight, bias, adapter_weight, triton), targets.contiguous()
    for chunk in _chunks(len(hidden), _chunk_rows(len(weight), weight.is_cuda)):
        logits = head.logits(hidden[chunk], _rows(adapter_hidden, chunk))
        grad = head.gradient(logits, targets[chunk], lse[chunk], grad_logp[chunk])  # (n, V)
        if needs[0]:
            grad_hidden[chunk] = head.hidden_grad(grad)
        if needs[1]:
            grad_weight += matmul(grad.T, hidden[chunk].to(head.dtype))
        if needs[2]:
            grad_bias += grad.sum(dim=0, dtype=torch.float32)
        if needs[3]:
            grad_adapter_hidden[chunk] = head.adapter_grad(grad)
        if needs[4] and adapter_hidden is not None:
            grad_adapter_weight += matmul(grad.T, adapter_hidden[chunk].to(head.dtype))
        del logits, grad  # one tensor: it goes before the next one comes
    return grads


@_linear_logprob_backward.register_fake
def _(grad_logp, hidden, weight, bias, targets, adapter_hidden, adapter_weight, lse, needs, triton):
    return _new_gradients(hidden, weight, bias, adapter_hidden, adapter_weight, needs)


def _new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, adapter_hidden: Tensor | None, adapter_weight: Tensor | None,
    needs: Sequence[bool],
) -> FiveTensors:  # fmt: skip
    """Empty where not needed. What is summed over chunks begins at zero, in float32."""
    weights = (
        torch.zeros(x.shape if need and x is not None else 0, dtype=torch.float32, device=hidden.device)
        for x, need in ((weight, needs[1]), (bias, needs[2]), (adapter_weight, needs[4]))
    )
    grad_weight, grad_bias, grad_adapter_weight = weights
    rows = _room(hidden, needs[0], hidden), _room(adapter_hidden, needs[3], hidden)
    return rows[0], grad_weight, grad_bias, rows[1], grad_adapter_weight


@custom_op("phi2::scale_rows", mutates_args=())
def _scale_rows(grad: Tensor, factors: Tensor) -> Tensor:
    """Rows of grad (N, C) times their factors (N,).

    An op without a gradient, so that differentiating twice is refused: grad depends on the hidden states, too.
    """
    return (grad * factors[:, None]).to(grad.dtype)


@_scale_rows.register_fake
def _(grad, factors):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, adapter_hidden, adapter_weight, _, ctx.head_is_frozen, ctx.triton = inputs
    _, lse, entropies, saved_grad_hidden, saved_grad_adapter = output
    ctx.mark_non_differentiable(lse, entropies, saved_grad_hidden, saved_grad_adapter)
    if ctx.head_is_frozen:
        ctx.save_for_backward(saved_grad_hidden, saved_grad_adapter)
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, adapter_hidden, adapter_weight, lse)


def _backward(ctx, grad_logp: Tensor, *_) -> tuple[Tensor | None, ...]:
    if ctx.head_is_frozen:
        saved = zip(ctx.saved_tensors, (0, 4), strict=True)
        hidden, adapter_hidden = (
            _scale_rows(grad, grad_logp) if ctx.needs_input_grad[i] else None for grad, i in saved
        )
        return hidden, None, None, None, adapter_hidden, None, None, None, None
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    *inputs, lse = ctx.saved_tensors
    grads = _linear_logprob_backward(grad_logp, *inputs, lse, needs, ctx.triton)
    leaves = inputs[0], inputs[1], inputs[2], inputs[4], inputs[5]
    cast = [g.to(x.dtype) if need else None for g, x, need in zip(grads, leaves, needs, strict=True)]
    return *cast[:3], None, *cast[3:], None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)
