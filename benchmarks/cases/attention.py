"""Attention at Phi-2's shape against torch's fused backends, FlexAttention, and our own kernels padded to 128 dims.

Dims: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import comparison, spec
from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Inputs, Outputs, Work, of_function
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import PHI2, Call, Entry, Shapes
from phi2_kernels.attention import attention, attention_ref
from phi2_kernels.visibility import Visibility

PADDED = 128  # columns, the next power of two after 80
SCORES = 2**28  # that the reference holds at a time


SHAPES = (8, 2048), (32, 512), (2, 8192)  # B and S
TINY = dict(H=2, shapes=((2, 21), (2, 9), (1, 33)))


def compare_shapes(
    device: torch.device, backward: bool, H: int = 32, shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[Comparison]:
    """The first has targets, and FlexAttention as a peer, which takes long to compile."""
    at = partial(compare_attention, device, H=H, D=80, backward=backward)
    first, *others = [at(torch.bfloat16, B=B, S=S) for B, S in shapes]
    others.insert(0, at(torch.float16, B=shapes[0][0], S=shapes[0][1]))
    peers = [{name: peer for name, peer in each.peers.items() if name != "FlexAttention"} for each in others]
    return [first, *(replace(each, targets={}, peers=own) for each, own in zip(others, peers, strict=True))]


gpu_case("attention_forward", 50, "causal attention of 8 x 32 heads of 80 dims over 2048 tokens", tiny=TINY)(
    partial(compare_shapes, backward=False)
)
gpu_case("attention_forward_backward", 50, "the same with its gradients", tiny=TINY)(
    partial(compare_shapes, backward=True)
)


def compare_attention(
    device: torch.device,
    dtype: torch.dtype,
    B: int,
    H: int,
    S: int,
    D: int,
    backward: bool,
    until: Tensor | None = None,
) -> Comparison:
    """q, k, v and, with gradients, that of the output: (B, H, S, D), the heads of a token side by side.

    Args:
        until: see `phi2_kernels.visibility`; the peers take the causal mask alone.
    """

    def draw(normal: Callable[..., Tensor]) -> Inputs:
        q, k, v, grad = (normal(B, S, H, D).transpose(1, 2) for _ in range(4))
        return *(x.requires_grad_(backward) for x in (q, k, v)), *([grad] if backward else [])

    visibility = Visibility(S, S, until, device)
    backends = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "mem-efficient": "EFFICIENT_ATTENTION"}
    peers = {f"SDPA {name}": partial(_sdpa, backend) for name, backend in backends.items()}
    peers["auto"] = lambda: of_function(partial(attention, visibility=visibility), "q k v")  # which may be cuDNN
    peers["FlexAttention"] = partial(flex, S, device)
    peers["ours padded to 128"] = lambda: Implementation(_padded, prepare=_widened)
    return Comparison(
        name=f"{'forward+backward' if backward else 'forward'} {str(dtype)[6:]} B{B} S{S}",
        inputs=comparison.drawn(device, dtype, draw),
        reference=partial(reference, visibility),
        ours=of_function(partial(attention, visibility=visibility, impl="triton"), "q k v"),
        plain=of_function(partial(attention, visibility=visibility, impl="torch"), "q k v"),
        peers=peers,
        work=attention_work(B * H, scores_of(S, until), S, D, backward),
        rounding=ROUNDING[dtype],
        targets=_targets(device),
    )


def scores_of(S: int, until: Tensor | None) -> int:
    """Pairs of query and key that see each other in one head of a row of S tokens."""
    return S * (S + 1) // 2 if until is None else int((until - torch.arange(S, device=until.device)).sum())


def _targets(device: torch.device) -> dict[str, float]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"SDPA cuDNN": 0.85, "SDPA flash": 1.3}
    return {"SDPA *": 1.2}


def attention_work(heads: int, scores: int, S: int, D: int, backward: bool) -> Work:
    """Two matmuls forward, five backward; q, k, v, o forward, those and their four gradients backward.

    Args:
        heads: of all rows.
    """
    matmuls, tensors = (7, 12) if backward else (2, 4)
    return Work(matmuls * 2 * heads * scores * D, tensors * heads * S * D * 2)


def reference(visibility: Visibility, *inputs: Tensor) -> Outputs:
    """By the formula in float32, some heads of one row of tokens at a time."""
    T = inputs[0].shape[2]
    heads = max(1, SCORES // (T * visibility.keys))
    run = of_function(lambda q, k, v: attention_ref(q, k, v, visibility), "q k v").run
    rows = []
    for row in zip(*(x.split(1) for x in inputs), strict=True):
        parts = [run(*comparison.in_float32(*part)) for part in zip(*(x.split(heads, dim=1) for x in row), strict=True)]
        rows.append({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _sdpa(backend: str) -> Implementation:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return of_function(forward, "q k v")


def flex(S: int, device: torch.device, until: Tensor | None = None) -> Implementation:
    """FlexAttention by the rule of `phi2_kernels.attention`, of a row of S tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return i >= j if until is None else (i >= j) & (i < until[0, j])

    mask = create_block_mask(seen, None, None, S, S, device=device)
    attend = comparison.compiled(flex_attention, device)
    return of_function(lambda q, k, v: attend(q, k, v, block_mask=mask), "q k v")


def _wide(x: Tensor) -> Tensor:
    """Memory for x (B, H, S, D) with room for `PADDED` columns a head."""
    B, H, S, D = x.shape
    return torch.empty((B, S, H, PADDED), dtype=x.dtype, device=x.device).transpose(1, 2)


def _widened(*inputs: Tensor) -> Inputs:
    """Copies with zeros in the columns from D on, as views of the first D."""
    return tuple(_wide(x).zero_()[..., : x.shape[3]].copy_(x.detach()) for x in inputs)


def _padded(q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None) -> Outputs:
    """Our kernels with one tile for a whole head, on `_widened` inputs, by launches that fit such tiles."""
    from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

    D = q.shape[3]
    names = ["output"] if do is None else ["output", "grad of q", "grad of k", "grad of v"]
    outputs = {name: _wide(q)[..., :D] for name in names}
    o, *grads = outputs.values()
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with _padded_tiles(), mock.patch.object(attention_tiles_triton, "LAUNCH", _padded_launches()):
        attention_forward_triton.forward(q, k, v, o, lse)
        if do is not None:
            attention_backward_triton.backward(do, q, k, v, o, lse, *grads)
    return outputs


def _padded_tiles():
    """Within, a head is one tile, and not even masked: the least that padding costs."""
    from phi2_kernels import attention_tiles_triton

    return mock.patch.object(attention_tiles_triton, "pieces_of", lambda D: (PADDED,))


def _padded_launches() -> dict:
    """The tiles of a padded head that spill least; the shipped ones would spill kilobytes."""
    from phi2_kernels.attention_tiles_triton import AttentionLaunch

    tiles = {
        80: {"forward": (128, 64, 8, 2), "dkdv": (32, 64, 4, 2), "dq": (128, 32, 8, 2)},
        90: {"forward": (128, 128, 8, 2), "dkdv": (32, 128, 8, 2), "dq": (128, 64, 8, 2)},
    }
    return {arch: {name: AttentionLaunch(*tile) for name, tile in each.items()} for arch, each in tiles.items()}


# ---- the kernels ----


HEADS = "B S H D -> B H S D"  # those of a token side by side
DOCUMENTS = dict(until="B S:int32=S", ranges="B S 6:int32=S")  # what is only compiled needs no right tables
FORWARD = Call(
    "attention_forward_triton.forward",
    dict.fromkeys("qkvo", HEADS) | dict(lse="B H S:float32"),
    also=DOCUMENTS,
)
BACKWARD = Call(  # while one of its kernels has another launch, the others run as shipped
    "attention_backward_triton.backward",
    dict.fromkeys(("do", "q", "k", "v", "o", "dq", "dk", "dv"), HEADS) | dict(lse="B H S:float32"),
    also=DOCUMENTS | dict(ends="B S 2:int32=S"),
)
# Candidates: block_m queries, block_n keys, warps, stages; then tma and maxnreg. With 16 rows a warp, shared memory
# binds; with 32, registers do. No tile has warps that would do the same work twice. Forward and dq are shipped with one
# block_m: they change together. With tma a thread keeps 20 to 60 registers fewer, so that a multiprocessor holds two
# programs of 8 warps forward. Triton 3.6 to 3.9 specialise no warps of these loops: asked to, they do nothing with 8
# warps and fail with 4.
TILES = {
    "forward": {
        80: [(128, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3)],
        90: [
            (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3),
            (128, 128, 8, 2, True), (128, 64, 8, 3, True, 128), (64, 64, 4, 3, True),
        ],
    },
    "dkdv": {
        80: [(32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)],
        90: [
            (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2),
            (64, 128, 8, 2, True), (64, 128, 8, 3, True),
        ],
    },
    "dq": {
        80: [(128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)],
        90: [
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2),
            (128, 64, 8, 2, True), (64, 64, 4, 2, True),
        ],
    },
}  # fmt: skip
CALLS = {"forward": FORWARD, "dkdv": BACKWARD, "dq": BACKWARD}
ENTRIES = {
    f"attention_{key}": Entry("attention_tiles_triton", key, f"attention {key}", TILES[key], (call,))
    for key, call in CALLS.items()
}
spec.ENTRIES |= ENTRIES


def useful(matmuls: int, BLOCK_M: int, BLOCK_N: int, PIECES: tuple[int, ...], q: str, **_) -> int:
    """Of one tile of queries by keys, of heads that are as wide as their pieces together."""
    return 0 if q == "*fp32" else matmuls * BLOCK_M * BLOCK_N * sum(PIECES)


spec.USEFUL |= {f"attention {key}": partial(useful, n) for key, n in (("forward", 2), ("dkdv", 4), ("dq", 3))}


def compile_all(*shapes: Shapes) -> None:
    for entry, each in product(ENTRIES.values(), shapes):
        entry.compile(each)


def padded() -> None:
    with _padded_tiles():
        FORWARD.compile(PHI2)
        BACKWARD.compile(PHI2)


def unaligned() -> None:
    """Forward on rows whose length no power of two divides."""
    shape = dict(q="B S H", k="B S H", v="B S H")
    inputs = FORWARD.inputs(PHI2._replace(H=PHI2.H * PHI2.D + 1), spec.FAKE, 0, **shape)
    heads = {name: inputs[name][..., :-1].unflatten(-1, (PHI2.H, PHI2.D)).transpose(1, 2) for name in shape}
    FORWARD.run(FORWARD.inputs(PHI2, spec.FAKE, 0) | heads)


ALSO = PHI2._replace(D=64), PHI2._replace(half=torch.float32)
OTHERS = [PHI2._replace(D=D, half=dtype) for D in (32, 48) for dtype in (torch.bfloat16, torch.float32)]
spec.FORMS |= {
    spec.ALSO_SHIPPED: partial(compile_all, *ALSO),
    spec.OTHER_WIDTHS: partial(compile_all, *OTHERS),
    spec.PADDED: padded,
    spec.UNALIGNED: unaligned,
}
