"""Attention's tiles as Hopper's copy engine fetches them: the same numbers, and only of tensors that it can read."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

from .test_attention_triton import LAYOUTS, check, make_qkv, make_visibility


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[], [LAYOUTS["two pairs"], LAYOUTS["left padded"]]], ids=["causal", "pairs"])
def test_tiles_that_the_copy_engine_fetches_are_the_same(rows, dtype, device, poison, monkeypatch):
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("an A100 has no such engine")
    q, k, v = make_qkv(70, B=2, H=4, H_kv=2, dtype=dtype, device=device)
    launches = {key: attention_tiles_triton.launch_of(key, q)._replace(tma=True) for key in ("forward", "dkdv", "dq")}
    assert all(attention_tiles_triton.descriptors_of(x, 32, launches["dq"]) for x in (q, k, v))
    for module in (attention_tiles_triton, attention_forward_triton, attention_backward_triton):
        monkeypatch.setattr(module, "launch_of", lambda key, x: launches[key])
    check(q, k, v, make_visibility(70, 70, *rows, device=device))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(),  # heads apart
        lambda x: x[:, :, 1:],  # of two rows, with a token between that is not ours
        lambda x: make_qkv(8, B=2, H=2, dtype=x.dtype, width=3)[0],  # rows that begin between accesses
    ],
    ids=["heads apart", "a part of each row", "unaligned"],
)
def test_what_the_copy_engine_cannot_read_is_read_by_pointers(change):
    launch = attention_tiles_triton.LAUNCH[90]["dq"]._replace(tma=True)
    q = make_qkv(8, B=2, H=2, dtype=torch.float16)[0]
    assert attention_tiles_triton.descriptors_of(q, 32, launch)
    assert attention_tiles_triton.descriptors_of(change(q), 32, launch) is None
