"""LoRA's three products, kernels and torch, against float64: any ranks, any columns, and masks that are made again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi2_kernels import block_adapters_triton, block_torch
from phi2_kernels.block_adapters import Adapter, AdapterGroup, Side, group_of
from phi2_kernels.block_triton import Kernels

from .conftest import INTERPRETED

SEED = torch.tensor(11)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPS = pytest.mark.parametrize("ops", [block_torch, Kernels()], ids=["torch", "triton"])
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-11}
LOST = 2**-15  # of a float32 factor as two halves; the interpreter does not round to bfloat16 but cuts
EXACT = 2**-20 if INTERPRETED else 2**-18  # a GPU leaves out the products of what TF32 cannot hold of both factors
N = 37


@pytest.fixture(autouse=True)
def here(device) -> Iterator[None]:
    """All tensors of a test are made on its device."""
    with torch.device(device):
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def adapters_of(widths: list[int], ranks: list[int], C: int, p: float = 0.0) -> tuple[Adapter, ...]:
    """From C columns to columns of a matmul, one behind the other."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return tuple(
        Adapter(end - width, end, draw(rank, C, seed=i), draw(width, rank, seed=i + 50), 0.5 + i, p)
        for i, (width, rank, end) in enumerate(zip(widths, ranks, ends, strict=True))
    )


def group(widths: list[int], ranks: list[int], C: int, p: float = 0.0) -> AdapterGroup:
    each = adapters_of(widths, ranks, C, p)
    return group_of(each, [(0, C)] * len(each), [(a.start, a.end) for a in each], first_mask=2)


def exact_of(group: AdapterGroup, x: Tensor, dy: Tensor) -> dict[str, list[Tensor]]:
    """u, what is added to y and to dx, dA and dB of each adapter without dropout, in float64."""
    x, dy, found = x.double(), dy.double(), {name: [] for name in ("u", "y", "dx", "dA", "dB")}
    sides = zip(group.input.factors, group.output.factors, group.output.spans, group.scales, strict=True)
    for A, B, (start, end), scale in sides:
        A, B, own = A.double(), B.double(), dy[:, start:end]
        u, du = scale * x @ A.T, scale * own @ B
        own = {"u": u, "y": u @ B.T, "dx": du @ A, "dA": du.T @ x, "dB": own.T @ u}
        for name, value in own.items():
            found[name].append(value)
    return found


def backward(
    adapters: AdapterGroup, ops: Any, x: Tensor, u: Tensor, dy: Tensor, dx: Tensor, seed: Tensor | None = None
) -> list[Tensor]:
    """dA and dB of each adapter in turn; what they send to x is added to dx."""
    du = adapters.send(ops, dy, dx, seed)
    return adapters.gradients(ops, x, du, dy, u, seed)


SIZES = {
    "one": ([40], [4], 48),
    "four": ([33, 16, 80, 48], [3, 1, 16, 5], 70),
    "a high rank": ([30, 20], [70, 130], 40),
}


@OPS
@DTYPES
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_all_products_are_as_good_as_float32(size, dtype, ops, poison):
    widths, ranks, C = size
    adapters, x, dy = group(*size), draw(N, C, seed=7).to(dtype), draw(N, sum(widths), seed=8).to(dtype)
    exact, y, dx = exact_of(adapters, x, dy), torch.zeros(N, sum(widths)), torch.zeros(N, C)
    u = torch.empty(N, sum(ranks))
    adapters.add(ops, x, y, u, None)
    gradients = backward(adapters, ops, x, u, dy, dx)
    found = [u, y, dx, *gradients[::2], *gradients[1::2]]
    expected = [torch.cat(exact["u"], 1), torch.cat(exact["y"], 1), sum(exact["dx"]), *exact["dA"], *exact["dB"]]
    for ours, truth in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert (ours - truth).norm() <= (LOST if dtype == torch.bfloat16 else EXACT) * truth.norm()


@OPS
@DTYPES
def test_a_sum_takes_one_rounding(dtype, ops):
    adapters, u = group([64, 32], [4, 16], 48), draw(N, 20, seed=5)
    y = draw(N, 96, seed=3).to(dtype)
    parts = [
        part.double() @ B.double().T for part, B in zip(u.split([4, 16], dim=1), adapters.output.factors, strict=True)
    ]
    exact, terms = y.double() + torch.cat(parts, dim=1), u.abs().max() * 16 * 5
    ops.add(y, u, adapters.output, None)
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2**-22 * terms).all()


@OPS
def test_what_no_adapter_writes_stays(ops):
    side = Side((draw(20, 3), draw(12, 2)), ((5, 25), (30, 42)), True, (3, 2))
    y, u = draw(N, 50), draw(N, 5, seed=1)
    before = y.clone()
    ops.add(y, u, side, None)
    changed = (y != before).any(dim=0)
    assert changed[5:25].all() and changed[30:42].all() and changed.sum() == 32


@OPS
def test_columns_of_wider_buffers_are_read_and_written(ops):
    """As of a block: x, y and u are views with wider rows."""
    adapters, wide = group([24, 40], [3, 5], 32), draw(N, 100)
    x, y, u = wide[:, 8:40].bfloat16(), draw(N, 80).bfloat16(), draw(N, 20)
    plain = adapters, x.clone(), y[:, 7:71].clone(), u[:, 4:12].clone()
    adapters.add(ops, wide.bfloat16()[:, 8:40], y[:, 7:71], u[:, 4:12], None)
    adapters.add(ops, *plain[1:], None)
    assert torch.equal(y[:, 7:71], plain[2]) and torch.equal(u[:, 4:12], plain[3])


@OPS
def test_no_rows_have_no_gradient(ops):
    adapters, x, dy = group([24, 40], [3, 5], 32), torch.zeros(0, 32), torch.zeros(0, 64)
    found = backward(adapters, ops, x, torch.zeros(0, 8), dy, torch.zeros(0, 32))
    assert [not each.any() for each in found] == [True] * 4


# Dropout


def masks_of(ops: Any, adapters: AdapterGroup) -> list[Tensor]:
    """What each adapter keeps of x: what `add` adds where there is nothing, of factors that are one."""
    found, sides = [], zip(adapters.input.spans, adapters.input.rates, adapters.input.masks, strict=True)
    for (start, end), rate, mask in sides:
        side = Side((torch.ones(1, end - start),), ((start, end),), False, (1,), (rate,), (mask,))
        kept = torch.zeros(N, end)
        ops.add(kept, torch.ones(N, 1), side, SEED)
        found.append(kept[:, start:])
    return found


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_pass_keep_the_same(ops, dtype):
    adapters, x, dy = group([33, 48], [3, 70], 72, p=0.3), draw(N, 72, seed=7).to(dtype), draw(N, 81, seed=8).to(dtype)
    masks, u, y, dx = masks_of(ops, adapters), torch.empty(N, 73), torch.zeros(N, 81), torch.zeros(N, 72)
    adapters.add(ops, x, y, u, SEED)
    dA = backward(adapters, ops, x, u, dy, dx, SEED)[::2]
    expected_dx, place = torch.zeros(N, 72), 0
    for i, (A, B, (start, end), scale, kept) in enumerate(
        zip(adapters.input.factors, adapters.output.factors, adapters.output.spans, adapters.scales, masks, strict=True)
    ):
        read, du = x.float() * kept, scale * dy[:, start:end].float() @ B
        torch.testing.assert_close(u[:, place : place + len(A)], scale * read @ A.T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(dA[i], du.T @ read, rtol=1e-4, atol=1e-2)
        expected_dx += kept * (du @ A)
        place += len(A)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-2)


@OPS
def test_masks_have_their_rate_and_no_two_are_alike(ops):
    adapters = group([33, 48, 20], [3, 2, 4], 400, p=0.3)
    masks = masks_of(ops, adapters)
    assert all(abs(mask.mean() - 0.7) < 0.02 for mask in masks)
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    assert all(abs((a * b).mean() - 0.49) < 0.02 for a, b in pairs)


def test_masks_of_kernels_do_not_depend_on_their_tiles(monkeypatch):
    adapters = group([33], [3], 200, p=0.5)
    expected = masks_of(Kernels(), adapters)
    other = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    assert all(other != launches["add dropped"] for launches in block_adapters_triton.LAUNCH.values())
    for launches in block_adapters_triton.LAUNCH.values():
        monkeypatch.setitem(launches, "add dropped", other)
    assert torch.equal(masks_of(Kernels(), adapters)[0], expected[0])


# Any shape, and what is made on the way


SIZE = st.tuples(st.integers(1, 90), st.integers(1, 20))  # columns and rank of an adapter


@settings(
    max_examples=25 if INTERPRETED else 4,  # a GPU's kernels are compiled for each
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_kernels_and_torch_agree_on_any_shape(n, C, adapters):
    widths, ranks = (list(each) for each in zip(*adapters, strict=True))
    both, x, dy = [], draw(n, C, seed=7).bfloat16(), draw(n, sum(widths), seed=8).bfloat16()
    for ops in (block_torch, Kernels()):
        y, dx, u = torch.zeros(n, sum(widths)), torch.zeros(n, C), torch.empty(n, sum(ranks))
        own = group(widths, ranks, C)
        own.add(ops, x, y, u, None)
        both.append([u, y, dx, *backward(own, ops, x, u, dy, dx)])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


class Made(TorchDispatchMode):
    """Collects operators and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.tensors = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators.add(func)
        self.tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


@pytest.mark.skipif(not INTERPRETED, reason="launches are left out of the interpreter alone")
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_kernels_need_no_copy_of_what_they_read_and_ask_no_gpu(rate, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    adapters, x, dy, dx = group([96], [4], 64, rate), *(torch.zeros(40, n).bfloat16() for n in (64, 96, 64))
    with Made() as made:
        adapters.add(Kernels(), x, dy, torch.empty(40, 4), SEED)
        backward(adapters, Kernels(), x, torch.empty(40, 4), dy, dx, SEED)
    assert max(tensor.numel() for tensor in made.tensors) == 4 * 96  # the gradient of B
    assert rate or torch.ops.aten._local_scalar_dense.default not in made.operators  # a seed lies on the CPU
