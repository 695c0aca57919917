"""Log-probabilities of chosen tokens straight from hidden states, without float32 logits of more than a chunk of rows.

    logits[n] = W h[n] + b (+ B u[n], a low-rank adapter)         logp[n] = logits[n, target[n]] - logsumexp(logits[n])
    d logp / d logits = D = onehot(target) - softmax(logits)

Rows are taken a chunk at a time; everything from the logits on is float32. D comes with the log-probabilities, in the
dtype of the weight, and is all that a backward pass needs of the logits. With g the gradient of logp:

    frozen head        dh = g (D W)                                      D W is kept, (N, C)
    trainable head     dh = g (D W)  dW = D^T (g h)  dB = D^T (g u)      D is kept, (N, V), of the rows that a budget
                                                                         holds; the others make their logits again

So nothing walks over (N, V) in the backward pass. In place of D the logits could be kept, and would not do: between 16
and 32 a bfloat16 is off by up to 1/16 and a probability made of it by 6 %. D lies in [-1, 1].

The matmuls are torch's. What lies between them, `_Head.stats`, is torch or Triton.

Dims: N rows, C hidden, V vocabulary, r adapter rank.
Source: arXiv:2411.09009 (cut cross-entropy) for the idea; chunking by rows as in Liger-Kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton
from phi2_kernels.products import matmul, product, weighted_matmul

CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk on a CPU
GPU_CHUNK_BYTES = 400 * 2**20  # 2048 rows of 51200: smaller matmuls leave a GPU idle at their ends
KEPT_BYTES = 512 * 2**20  # of D on a CPU, in float32: a pass of 2048 rows of 51200
GPU_KEPT_BYTES = 2 * 2**30  # 20000 rows of 51200 in half precision, as many as a pass of an 80 GB card predicts
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
    trains_head = torch.is_grad_enabled() and (needs_grad[1] or needs_grad[2] or needs_grad[4])
    trains_below = torch.is_grad_enabled() and any(needs_grad) and not trains_head
    inputs = hidden, weight, bias, targets, adapter_hidden, adapter_weight
    logp, entropies, *_ = _linear_logprob(*inputs, entropy, trains_below, trains_head, triton)
    return logp, entropies if entropy else None


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Of what the head's matmuls take, D among it: float32 on a CPU, the weight's own on a GPU."""
    return weight.dtype if weight.is_cuda else torch.float32


class _Head:
    """The head's tensors in the dtype that its matmuls take; their results are float32."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter_weight: Tensor | None, triton: bool) -> None:
        self.dtype = operand_dtype(weight)
        self.weight, self.bias, self.triton = weight.to(self.dtype), bias, triton
        self.adapter_weight = None if adapter_weight is None else adapter_weight.float()

    def logits(self, hidden: Tensor, adapter_hidden: Tensor | None) -> Tensor:
        """(n, V) float32. Triton adds the bias itself, in the walk it takes over them anyway."""
        logits = matmul(hidden, self.weight.T, None if self.triton else self.bias.float())
        if adapter_hidden is not None and self.adapter_weight is not None:
            logits.addmm_(adapter_hidden.float(), self.adapter_weight.T)
        return logits

    def room_over(self, logits: Tensor) -> Tensor:
        """Where D of a chunk may go that is used at once: over the logits, unless torch would have to narrow them."""
        if self.triton:
            from phi2_kernels import linear_logprob_triton

            return linear_logprob_triton.room_over(logits, self.dtype)
        return logits if self.dtype == torch.float32 else torch.empty_like(logits, dtype=self.dtype)

    def stats(
        self, logits: Tensor, targets: Tensor, logp: Tensor, entropies: Tensor | None, grad: Tensor | None
    ) -> None:
        """Writes (n,) log-probabilities and entropies, and D (n, V). The logits are lost."""
        if self.triton:
            from phi2_kernels import linear_logprob_triton

            linear_logprob_triton.stats(logits, self.bias, targets, logp, entropies, grad)
        else:
            _stats(logits, targets, logp, entropies, grad)

    def gradient(self, hidden: Tensor, adapter_hidden: Tensor | None, targets: Tensor) -> Tensor:
        """D of a chunk, made again."""
        logits = self.logits(hidden, adapter_hidden)
        grad = self.room_over(logits)
        self.stats(logits, targets, torch.empty_like(targets, dtype=torch.float32), None, grad)
        return grad

    def hidden_grad(self, grad: Tensor) -> Tensor:
        """D W, (n, C) float32."""
        return matmul(grad, self.weight)

    def adapter_grad(self, grad: Tensor) -> Tensor:
        """D B, (n, r) float32."""
        assert self.adapter_weight is not None
        return product(grad, self.adapter_weight)


def _stats(logits: Tensor, targets: Tensor, logp: Tensor, entropies: Tensor | None, grad: Tensor | None) -> None:
    """`_Head.stats` in torch: one exponential a logit, in place."""
    logits -= logits.amax(dim=-1, keepdim=True)
    picked = logits.gather(1, targets[:, None])
    mean = (logits.exp() * logits).sum(dim=-1, keepdim=True) if entropies is not None else None
    weights = logits.exp_()  # softmax but for its denominator, written over the logits
    total = weights.sum(dim=-1, keepdim=True)
    logp.copy_((picked - total.log()).squeeze(1))
    if entropies is not None and mean is not None:
        entropies.copy_((total.log() - mean / total).squeeze(1))
    if grad is not None:
        grad.copy_(_add_onehot_(weights.div_(-total), targets))


def _add_onehot_(grad: Tensor, targets: Tensor) -> Tensor:
    return grad.scatter_add_(1, targets[:, None], torch.ones_like(grad[:, :1]))


def _chunk_rows(vocabulary: int, on_gpu: bool) -> int:
    return max(1, (GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (4 * vocabulary))


def _chunks(first: int, rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(first, rows, size)]


def kept_rows(rows: int, weight: Tensor) -> int:
    """Of how many rows D is kept for a trainable head: all, or the first whole chunks that the budget holds."""
    budget = GPU_KEPT_BYTES if weight.is_cuda else KEPT_BYTES
    most, size = budget // (len(weight) * operand_dtype(weight).itemsize), _chunk_rows(len(weight), weight.is_cuda)
    return rows if rows <= most else most // size * size


def _rows(tensor: Tensor | None, chunk: slice) -> Tensor | None:
    return None if tensor is None else tensor[chunk]


@custom_op("phi2::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None, entropy: bool, trains_below: bool, trains_head: bool, triton: bool,
) -> FiveTensors:  # fmt: skip
    """logp and entropies (N,) in float32; what is kept of a frozen head, D W (N, C) and D B (N, r), or D.

    What was not asked for is empty.
    """
    results = _new_results(hidden, weight, adapter_hidden, entropy, trains_below, trains_head)
    logp, entropies, grad_hidden, grad_adapter_hidden, kept = results
    head, targets = _Head(weight, bias, adapter_weight, triton), targets.contiguous()
    for chunk in _chunks(0, len(hidden), _chunk_rows(len(weight), weight.is_cuda)):
        logits = head.logits(hidden[chunk], _rows(adapter_hidden, chunk))  # (n, V)
        grad = kept[chunk] if chunk.stop <= len(kept) else head.room_over(logits) if trains_below else None
        head.stats(logits, targets[chunk], logp[chunk], entropies[chunk] if entropy else None, grad)
        if grad is not None and trains_below:
            grad_hidden[chunk] = head.hidden_grad(grad)
        if grad is not None and trains_below and adapter_hidden is not None:
            grad_adapter_hidden[chunk] = head.adapter_grad(grad)
        del logits, grad  # they go before the next ones come
    return results


def _new_results(
    hidden: Tensor, weight: Tensor, adapter_hidden: Tensor | None, entropy: bool, trains_below: bool, trains_head: bool
) -> FiveTensors:
    rows = hidden.shape[0]  # len() would be a constant to torch.compile
    logp = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    kept = kept_rows(rows, weight) if trains_head else 0
    return (
        logp,
        _room(logp, entropy, hidden),
        _room(hidden, trains_below, hidden),
        _room(adapter_hidden, trains_below, hidden),
        torch.empty((kept, len(weight)), dtype=operand_dtype(weight), device=hidden.device),
    )


def _room(x: Tensor | None, wanted: bool, beside: Tensor) -> Tensor:
    """Memory for what has the shape and dtype of x; empty when x is None or it is not wanted."""
    if x is None or not wanted:
        return torch.empty(0, dtype=torch.float32, device=beside.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_linear_logprob.register_fake
def _(hidden, weight, bias, targets, adapter_hidden, adapter_weight, entropy, trains_below, trains_head, triton):
    return _new_results(hidden, weight, adapter_hidden, entropy, trains_below, trains_head)


@custom_op("phi2::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
    adapter_hidden: Tensor | None, adapter_weight: Tensor | None, kept: Tensor, needs: Sequence[bool], triton: bool,
) -> FiveTensors:  # fmt: skip
    """Gradients of hidden, weight, bias, adapter_hidden and adapter_weight; empty where `needs` says not needed."""
    if not len(hidden):
        return _new_gradients(hidden, weight, bias, adapter_hidden, adapter_weight, needs)
    grad_hidden, grad_adapter_hidden = _room(hidden, needs[0], hidden), _room(adapter_hidden, needs[3], hidden)
    grad_weight, grad_bias, grad_adapter_weight = (_room(None, False, hidden) for _ in range(3))
    head, targets = _Head(weight, bias, adapter_weight, triton), targets.contiguous()
    for chunk in _chunks_behind(len(kept), len(hidden), _chunk_rows(len(weight), weight.is_cuda)):
        is_kept, factors = chunk.stop <= len(kept), grad_logp[chunk, None]
        grad = kept if is_kept else head.gradient(hidden[chunk], _rows(adapter_hidden, chunk), targets[chunk])  # (n, V)
        if needs[0]:
            torch.mul(head.hidden_grad(grad), factors, out=grad_hidden[chunk])
        if needs[1]:
            grad_weight = _plus(grad_weight, weighted_matmul(grad.T, factors, hidden[chunk]))
        if needs[2]:
            grad_bias = _plus(grad_bias, product(grad.T, factors).squeeze(1))
        if needs[3]:
            torch.mul(head.adapter_grad(grad), factors, out=grad_adapter_hidden[chunk])
        if needs[4] and adapter_hidden is not None:
            grad_adapter_weight = _plus(grad_adapter_weight, product(grad.T, adapter_hidden[chunk] * factors))
        del grad  # it goes before the next one comes
    return grad_hidden, grad_weight, grad_bias, grad_adapter_hidden, grad_adapter_weight


def _chunks_behind(kept: int, rows: int, size: int) -> list[slice]:
    """The kept rows as one chunk, if there are any, and the others in chunks of a size."""
    return _chunks(0, kept, kept or 1) + _chunks(kept, rows, size)


def _plus(total: Tensor, part: Tensor) -> Tensor:
    """Their sum; the first total is empty, and a large part is not added to as many zeros."""
    return total.add_(part) if total.numel() else part


@_linear_logprob_backward.register_fake
def _(grad_logp, hidden, weight, bias, targets, adapter_hidden, adapter_weight, kept, needs, triton):
    return _new_gradients(hidden, weight, bias, adapter_hidden, adapter_weight, needs)


def _new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, adapter_hidden: Tensor | None, adapter_weight: Tensor | None,
    needs: Sequence[bool],
) -> FiveTensors:  # fmt: skip
    """Those of no rows: of zeros where they are sums over rows, in float32. Empty where not needed."""
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
    return torch.mul(grad, factors[:, None], out=torch.empty_like(grad))


@_scale_rows.register_fake
def _(grad, factors):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, adapter_hidden, adapter_weight, _, _, ctx.trains_head, ctx.triton = inputs
    _, entropies, grad_hidden, grad_adapter_hidden, kept = output
    ctx.mark_non_differentiable(entropies, grad_hidden, grad_adapter_hidden, kept)
    if ctx.trains_head:
        ctx.save_for_backward(hidden, weight, bias, targets, adapter_hidden, adapter_weight, kept)
    else:
        ctx.save_for_backward(grad_hidden, grad_adapter_hidden)


def _backward(ctx, grad_logp: Tensor, *_) -> tuple[Tensor | None, ...]:
    if not ctx.trains_head:
        saved = zip(ctx.saved_tensors, (0, 4), strict=True)
        hidden, adapter_hidden = (
            _scale_rows(grad, grad_logp) if ctx.needs_input_grad[i] else None for grad, i in saved
        )
        return hidden, None, None, None, adapter_hidden, *[None] * 5
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    *inputs, kept = ctx.saved_tensors
    grads = _linear_logprob_backward(grad_logp, *inputs, kept, needs, ctx.triton)
    leaves = inputs[0], inputs[1], inputs[2], inputs[4], inputs[5]
    cast = [g.to(x.dtype) if need else None for g, x, need in zip(grads, leaves, needs, strict=True)]
    return *cast[:3], None, *cast[3:], *[None] * 4


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)
