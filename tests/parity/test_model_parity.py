"""Our logits against transformers' PhiForCausalLM on random twins: same weights, same tokens, equal numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from phi2.cache import KVCache, PackedPass
from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM

SHAPES = {
    "phi-2": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4),  # head dim 80, 32 rotary
    "phi-1.5": dict(hidden_size=256, num_attention_heads=4, partial_rotary_factor=0.5),  # head dim 64, 32 rotary
    "qk-layernorm": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4, qk_layernorm=True),
    "grouped": dict(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.4, num_key_value_heads=2),
}
EXTRA = dict(vocab_size=331, intermediate_size=640, num_hidden_layers=2, max_position_embeddings=256)


def twins(shape: dict, dtype=torch.float32, **more) -> tuple[Phi2ForCausalLM, PhiForCausalLM]:
    torch.manual_seed(0)
    hf = PhiForCausalLM(PhiConfig(**shape, **EXTRA, **more)).eval()
    for (
        name,
        parameter,
    ) in hf.named_parameters():  # biases and norms away from 0 and 1, else half the wiring is untested
        if name.endswith("bias") or "layernorm" in name:
            torch.nn.init.normal_(parameter, mean=0.2, std=0.3)
    ours = Phi2ForCausalLM(Phi2Config.from_dict(hf.config.to_dict())).eval()
    ours.load_state_dict(hf.state_dict(), strict=True)
    return ours.to(dtype), hf.to(dtype)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The numerics contract: 1e-5 of the largest logit."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(EXTRA["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_of_a_batch_equal_transformers(shape):
    ours, hf = twins(SHAPES[shape])
    ids = tokens(3, 37)
    assert_close(ours(ids), hf(ids).logits)


@pytest.mark.parametrize("shape", ["phi-2", "phi-1.5"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_transformers(shape, side):
    ours, hf = twins(SHAPES[shape])
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, pads in enumerate((0, 7, 13)):
        mask[row, slice(0, pads) if side == "left" else slice(20 - pads, 20)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    until = (mask * 20).int()
    real = mask.bool()
    theirs = hf(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(ours(ids, positions=positions, visible_until=until)[real], theirs[real])


@torch.no_grad()
def test_packed_documents_equal_transformers_block_mask():
    ours, hf = twins(SHAPES["phi-2"])
    lengths, ids = [9, 1, 17, 13], tokens(1, 40)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    until = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths))[None].int()
    assert_close(
        ours(ids, positions=positions, visible_until=until), hf(ids, position_ids=positions, use_cache=False).logits
    )


@torch.no_grad()
def test_prefix_shared_pair_equals_two_separate_rows():
    ours, hf = twins(SHAPES["phi-2"])
    P, C, R = 11, 7, 9
    ids = tokens(1, P + C + R)
    until = torch.tensor([[P + C + R] * P + [P + C] * C + [P + C + R] * R]).int()
    positions = torch.cat([torch.arange(P + C), torch.arange(P, P + R)])[None]
    shared = ours(ids, positions=positions, visible_until=until)
    rejected = torch.cat([ids[:, :P], ids[:, P + C :]], dim=1)
    assert_close(shared[:, : P + C], hf(ids[:, : P + C]).logits)
    assert_close(shared[:, P + C :], hf(rejected).logits[:, P:])


@pytest.mark.parametrize("shape", ["phi-2", "grouped"])
@torch.no_grad()
def test_cached_steps_equal_one_pass(shape):
    ours, hf = twins(SHAPES[shape])
    ids = tokens(2, 12)
    cache = KVCache(ours.config, 2, 12, torch.float32)
    pieces = []
    for a, b in ((0, 5), (5, 6), (6, 9), (9, 12)):
        logits = ours(ids[:, a:b].reshape(1, -1), cached=PackedPass(cache, {0: b - a, 1: b - a}))
        pieces.append(logits.view(2, b - a, -1))
    assert_close(torch.cat(pieces, dim=1), hf(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_transformers(checkpointing):
    ours, hf = twins(SHAPES["phi-2"])
    ours.model.activation_checkpointing = checkpointing
    ids = tokens(2, 19)
    ours(ids).float().square().mean().backward()
    hf(ids).logits.square().mean().backward()
    theirs = dict(hf.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_error_is_at_most_twice_transformers(dtype):
    ours, hf = twins(SHAPES["phi-2"])
    ids = tokens(4, 64)
    exact = ours(ids)
    ours, hf = ours.to(dtype), hf.to(dtype)
    own_error = (ours(ids).float() - exact).abs().mean()
    their_error = (hf(ids).logits.float() - exact).abs().mean()
    assert own_error <= 2 * their_error


@torch.no_grad()
def test_float16_with_scores_past_its_range_stays_finite():
    ours, _ = twins(SHAPES["phi-2"])
    for block in ours.model.layers:
        block.self_attn.q_proj.weight.mul_(800)
        block.self_attn.k_proj.weight.mul_(800)
    ids, until = tokens(2, 33), torch.full((2, 33), 33).int()
    until[:, :3] = 0
    ours = ours.half()
    assert ours(ids).isfinite().all()
    assert ours(ids, visible_until=until).isfinite().all()


def test_resid_dropout_is_applied_to_both_branches():
    ours, hf = twins(SHAPES["phi-2"], resid_pdrop=0.5)
    ids = tokens(2, 16)
    ours.train(), hf.train()
    torch.manual_seed(3)
    mine = ours(ids)
    torch.manual_seed(3)
    assert_close(mine, hf(ids).logits)
