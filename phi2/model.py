"""Phi-2, whole: token embeddings, parallel attention + MLP blocks, a final LayerNorm and a head with a bias.

A block reads its input through one LayerNorm, gives the result to attention and to the MLP side by side, and adds both
to the residual stream: x + attention(ln(x)) + mlp(ln(x)). Rotary embedding turns the first 32 of the 80 dims of each
head. Every linear has a bias. Parameter names are exactly those of Hugging Face's checkpoints, so that loading is
`load_state_dict(strict=True)`.

Dims: B batch, T tokens of this pass, C hidden (2560), H heads (32), D head dim (80),
R rotary dims (32), F mlp (10240), V vocabulary (51200).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phi2.cache import CachedPass
from phi2.config import Phi2Config
from phi2.linear import Linear, PhiLinear
from phi2.lora import AdaptableModel
from phi2_kernels.attention import attention
from phi2_kernels.gelu import gelu
from phi2_kernels.layer_norm import layer_norm
from phi2_kernels.rotary import rotary, rotary_angles
from phi2_kernels.visibility import Visibility


class LayerNorm(nn.LayerNorm):
    """torch's, by our kernels on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head attention with partial rotary embedding; scores and softmax are float32 in every dtype."""

    def __init__(self, config: Phi2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        C, D = config.hidden_size, config.head_dim
        self.q_proj = Linear(C, config.num_attention_heads * D)
        self.k_proj = Linear(C, config.kv_heads * D)
        self.v_proj = Linear(C, config.kv_heads * D)
        self.dense = Linear(config.num_attention_heads * D, C)
        if config.qk_layernorm:
            self.q_layernorm = LayerNorm(D, eps=config.layer_norm_eps)
            self.k_layernorm = LayerNorm(D, eps=config.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        visibility: Visibility | None,
        cached: CachedPass | None,
    ) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H, D)
        if self.config.qk_layernorm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = rotary(q, *angles), rotary(k, *angles)
        if cached is not None:
            return self.dense(cached.attend(self.layer, q, k, v).flatten(2))  # (B, T, C)
        assert visibility is not None
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, H_kv, T, D) twice
        out = attention(q, k, v, visibility, self.config.attention_dropout if self.training else 0.0)
        return self.dense(out.transpose(1, 2).flatten(2))

    @property
    def drops(self) -> bool:
        """Whether attention weights are dropped."""
        return self.training and self.config.attention_dropout > 0


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), GELU by its tanh approximation."""

    def __init__(self, config: Phi2Config) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """One LayerNorm feeds attention and MLP in parallel; both are added to the residual stream."""

    def __init__(self, config: Phi2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.fused_forward: Callable[..., Tensor] | None = None  # `phi2.fused.fuse` puts the two-matmul form here

    @property
    def inputs(self) -> tuple[PhiLinear, PhiLinear, PhiLinear, PhiLinear]:
        """The linears that read the normed stream: q, k, v, fc1. Fused and decoding form take them from here."""
        return self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj, self.mlp.fc1

    @property
    def outputs(self) -> tuple[PhiLinear, PhiLinear]:
        """The linears that write to the residual stream: dense and fc2."""
        return self.self_attn.dense, self.mlp.fc2

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        visibility: Visibility | None,
        cached: CachedPass | None,
    ) -> Tensor:
        if self.fused_forward is not None and visibility is not None and not self.self_attn.drops:
            return self.fused_forward(self, x, angles, visibility)
        return self.as_written(x, angles, visibility, cached)

    def as_written(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        visibility: Visibility | None,
        cached: CachedPass | None,
    ) -> Tensor:
        """The block, each of its modules called."""
        normed = self.input_layernorm(x)
        attended = self.resid_dropout(self.self_attn(normed, angles, visibility, cached))
        return attended + self.resid_dropout(self.mlp(normed)) + x


class Phi2Model(nn.Module):
    """Everything below the head: token ids or embeddings in, normalised hidden states out."""

    def __init__(self, config: Phi2Config) -> None:
        super().__init__()
        self.config = config
        embeddings = torch.empty(
            config.vocab_size, config.hidden_size
        )  # torch's own random start of it is slow to import
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        visible_until: Tensor | None = None,
        cached: CachedPass | None = None,
    ) -> Tensor:
        """Hidden states of every token.

        Args:
            input_ids: (B, T) token ids; or
            inputs_embeds: (B, T, C) in their place.
            positions: (B, T) whole numbers for rotary embedding; default: counted from 0.
            visible_until: (B, T) int32, for each key the end of the queries that may see it; default: causal
                (`phi2_kernels.visibility` explains the layouts).
            cached: a pass over a key-value cache, which says where the tokens stand and what they see.
        Returns:
            (B, T, C).
        Raises:
            ValueError: unless exactly one of input_ids and inputs_embeds is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        if cached is not None:
            assert positions is None and visible_until is None
            positions = cached.positions
        elif positions is None:
            positions = torch.arange(T, device=x.device)[None]
        angles = rotary_angles(positions, self.config.rotary_dim, self.config.rope_theta)
        visibility = Visibility(T, T, visible_until, x.device) if cached is None else None
        x = self.embed_dropout(x)
        for block in self.blocks:
            x = self._run(block, x, angles, visibility, cached)
        if cached is not None:
            cached.finish()
        return self.final_layernorm(x)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def _run(self, block: Block, *inputs) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Phi2ForCausalLM(AdaptableModel):
    """Phi with its language-model head.

    `model(...)` takes the arguments of `Phi2Model.forward` and returns logits; training calls `model.model(...)` for
    hidden states and applies the head only where there is a label (`phi2.losses.head`).
    """

    def __init__(self, config: Phi2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Phi2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def forward(self, *args, **kwargs) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights."""
        return self.lm_head(self.model(*args, **kwargs))

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Fresh weights as Phi was born with: normal(0, initializer_range), zero biases, LayerNorms at identity."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype
