"""Fused blocks compute what plain ones do: outputs, every gradient, with the same parameters under the same names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from phi2.checkpoints.weights import load, load_model, save_pretrained
from phi2.config import Phi2Config
from phi2.fused import fuse
from phi2.inference.generate import generate
from phi2.linear import Linear
from phi2.lora import attach, disabled, lora_modules, merge
from phi2.lora_config import LoraConfig
from phi2.model import Block, Phi2ForCausalLM
from phi2.training import dpo, sft
from phi2.training.reference import frozen_copy
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

SHAPE = dict(vocab_size=64, hidden_size=160, intermediate_size=96, num_hidden_layers=2, initializer_range=0.1)
HEADS = {"heads 80": dict(num_attention_heads=2), "grouped": dict(num_attention_heads=10, num_key_value_heads=2)}
EVERY = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")
PACKED = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9], [0, 9, 9, 5, 5, 9, 9, 9, 9]], dtype=torch.int32)


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make(dtype: torch.dtype = torch.float32, **changes) -> Phi2ForCausalLM:
    """A random Phi, biases and LayerNorms included, without dropout."""
    plain = dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, num_attention_heads=2)
    model = Phi2ForCausalLM(Phi2Config(**{**SHAPE, **plain, **changes}))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 1):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


def adapted(model: Phi2ForCausalLM, targets: tuple[str, ...] = EVERY, **changes) -> Phi2ForCausalLM:
    """With adapters that have learned something."""
    attach(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, **changes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.weight.normal_(0, 0.1, generator=generator)
    return model


def twins(model: Phi2ForCausalLM) -> tuple[Phi2ForCausalLM, Phi2ForCausalLM]:
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused


IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3))


def outcome(model: Phi2ForCausalLM, until: Tensor | None) -> dict[str, Tensor]:
    """Logits, and the gradient of everything that trains and of the input."""
    embeds = model.model.embed_tokens(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, visible_until=until)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    (logits * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "embed" not in name}
    return {"logits": logits.detach(), "input": embeds.grad, **grads}


def assert_equal(model: Phi2ForCausalLM, until: Tensor | None = None, tolerance: float = 1e-5) -> None:
    plain, fused = (outcome(m, until) for m in twins(model))
    assert plain.keys() == fused.keys()
    for name, expected in plain.items():
        error = (fused[name] - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("until", [None, PACKED], ids=["causal", "packed"])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_every_gradient_of_a_full_model_is_that_of_plain_blocks(shape, until):
    assert_equal(make(**shape), until)


@pytest.mark.parametrize("targets", [EVERY, ("q_proj", "fc2"), ("dense",), ("fc1", "v_proj")], ids="+".join)
def test_every_gradient_of_adapters_is_that_of_plain_blocks(targets):
    assert_equal(adapted(make(), targets, rank_pattern={targets[0]: 5}), PACKED)


@pytest.mark.parametrize("name", ["self_attn.k_proj.bias", "mlp.fc2.weight", "input_layernorm.weight"])
def test_a_single_parameter_can_train_alone(name):
    model = make().requires_grad_(False)
    model.get_parameter(f"model.layers.0.{name}").requires_grad_(True)
    assert_equal(model)


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.fc2", "input_layernorm"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_may_be_computed_from_another(name, part):
    model = make()
    register_parametrization(model.get_submodule(f"model.layers.0.{name}"), part, Doubled())
    assert_equal(model, PACKED)


class Noisy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def noisy(linear: Linear) -> None:
    linear.__class__ = Noisy


def patched(linear: Linear) -> None:
    linear.forward = lambda x: 2 * x


@pytest.mark.parametrize("change, kind", [(noisy, "Noisy"), (patched, "Linear")])
@pytest.mark.parametrize("lora", [False, True])
def test_a_module_with_a_forward_of_its_own_is_not_passed_over(change, kind, lora):
    model = make()
    change(model.get_submodule("model.layers.1.mlp.fc2"))
    model = adapted(model) if lora else model
    with pytest.raises(ValueError, match=f"^fused blocks do without the forward of {kind}, which is none of phi2's$"):
        fuse(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # old, and in many a model
@pytest.mark.parametrize("change", [partial(prune.l1_unstructured, amount=0.3), weight_norm], ids=["prune", "norm"])
def test_a_weight_that_a_hook_renews_is_renewed(change):
    model = make()
    change(model.get_submodule("model.layers.0.self_attn.k_proj"), "weight")
    fuse(model)
    before = model(IDS).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight_orig", "weight_g")):
                parameter.mul_(3)
    after = model(IDS)
    fuse(model, False)
    torch.testing.assert_close(after, model(IDS))
    assert not torch.allclose(before, after)


def test_a_hook_on_what_lora_was_put_on_is_called():
    model, calls = make(), []
    model.get_submodule("model.layers.1.mlp.fc2").register_forward_hook(lambda *given: calls.append(None))
    fuse(model := adapted(model))
    model(IDS)
    assert len(calls) == 1


def test_a_forward_that_is_replaced_in_a_fused_model_is_called():
    model, calls = make(), []
    fuse(model)
    linear = model.get_submodule("model.layers.1.mlp.fc2")
    linear.forward = lambda x: (calls.append(None), Linear.forward(linear, x))[1]
    model(IDS)
    assert len(calls) == 1


def test_a_module_that_a_block_does_not_call_is_no_obstacle():
    model = make()
    model.model.blocks[0].probe = torch.nn.Softmax(dim=-1)
    model.model.blocks[0].register_module("nothing", None)
    fuse(model)
    assert model.model.blocks[0].fused_forward is not None


@pytest.mark.parametrize("name", ["", ".input_layernorm", ".mlp", ".self_attn.q_proj", ".mlp.fc2"])
def test_a_hook_inside_a_block_is_called(name, monkeypatch):
    model, calls = make(), []
    fuse(model)
    module = model.get_submodule(f"model.layers.1{name}")
    handles = [
        module.register_forward_hook(lambda module, given, returned: calls.append("forward")),
        module.register_full_backward_hook(lambda module, given, returned: calls.append("backward")),
    ]
    model(IDS).sum().backward()
    assert calls == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    monkeypatch.setattr(Block, "as_written", lambda *arguments: pytest.fail("the block is not fused again"))
    model(IDS)


def test_half_precision_rounds_no_worse_than_plain_blocks():
    exact, names = outcome(make(), PACKED), ("logits", "input", "model.layers.0.mlp.fc1.weight")
    plain, fused = (outcome(m, PACKED) for m in twins(make(torch.bfloat16)))
    for name in names:
        errors = [(result[name].float() - exact[name]).norm() for result in (plain, fused)]
        assert errors[1] <= 1.5 * errors[0], name


def test_autocast_computes_in_its_dtype_and_leaves_the_stream_alone():
    exact = outcome(make(), None)
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused = (outcome(m, None) for m in twins(make()))
    for name, expected in exact.items():
        if name.endswith("k_proj.bias"):  # softmax cancels it: its gradient is all rounding
            continue
        assert fused[name].dtype == plain[name].dtype
        errors = [(result[name].float() - expected).norm() for result in (plain, fused)]
        assert 0 < errors[1] <= 1.5 * errors[0], name


def test_activation_checkpointing_changes_nothing():
    _, fused = twins(adapted(make()))
    kept = outcome(fused, PACKED)
    fused.zero_grad()
    fused.model.activation_checkpointing = True
    again = outcome(fused, PACKED)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_compiling_breaks_no_graph():
    _, fused = twins(adapted(make()))
    expected = outcome(fused, PACKED)
    fused.zero_grad()
    fused.model.forward = torch.compile(fused.model.forward, backend="aot_eager", fullgraph=True)
    compiled = outcome(fused, PACKED)
    assert all(torch.equal(compiled[name], expected[name]) for name in expected)


def test_adapters_can_be_switched_off():
    plain, fused = twins(adapted(make()))
    with torch.no_grad(), disabled(plain), disabled(fused):
        torch.testing.assert_close(fused(IDS), plain(IDS))


def test_names_and_values_of_the_state_stay(tmp_path):
    plain, fused = twins(make())
    before, after = plain.state_dict(), fused.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_fused_model_is_saved_like_a_plain_one(tiny_phi, tmp_path):
    model, tokenizer = load(tiny_phi, device="cpu")
    fuse(model)
    save_pretrained(model, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tiny_phi / "model.safetensors").read_bytes()


def is_fused(model: Phi2ForCausalLM) -> bool:
    layer = model.model.layers[0]
    weights = layer.self_attn.q_proj.weight, layer.mlp.fc1.weight
    return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


MOVES: dict[str, Callable[[Phi2ForCausalLM], Phi2ForCausalLM]] = {
    "deep copy": copy.deepcopy,
    "other dtype": lambda model: model.double().float(),
    "frozen copy": frozen_copy,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_weights_that_were_moved_are_joined_again_at_the_next_pass(move):
    plain, fused = twins(make())
    moved = move(fused)
    with torch.no_grad():
        plain.model.layers[0].mlp.fc1.weight.mul_(2)
        moved.model.layers[0].mlp.fc1.weight.mul_(2)
        torch.testing.assert_close(moved(IDS), plain(IDS))
    assert is_fused(moved)


def test_a_first_pass_without_inference_tensors_leaves_the_model_trainable():
    model = make()
    fuse(model)
    model = model.double().float()
    with torch.inference_mode():
        model(IDS)
    assert is_fused(model) and not any(p.is_inference() for p in model.parameters())
    model(IDS).sum().backward()


def test_a_merged_model_stays_fused_and_right():
    plain, fused = twins(adapted(make(), EVERY[:-1]))
    merge(plain)
    merge(fused)
    torch.testing.assert_close(fused(IDS), plain(IDS))


def test_fusing_can_be_undone():
    plain, fused = twins(make())
    fuse(fused, on=False)
    assert torch.equal(fused(IDS), plain(IDS))


def test_generation_is_that_of_the_plain_model(tiny_phi):
    answers = []
    for on in (False, True):
        model, tokenizer = load(tiny_phi, device="cpu")
        fuse(model, on)
        answers.append(generate(model, tokenizer, "the boat", max_new_tokens=8).text)
    assert answers[0] == answers[1]


DROPOUT = dict(resid_pdrop=0.2)


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_dropout_is_the_same_checkpointed_and_compiled(way):
    _, fused = twins(adapted(make(**DROPOUT), lora_dropout=0.3).train())
    torch.manual_seed(0)
    expected = outcome(fused, PACKED)
    fused.zero_grad()
    if way == "checkpointed":
        fused.model.activation_checkpointing = True
    else:
        fused.model.forward = torch.compile(fused.model.forward, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    again = outcome(fused, PACKED)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3)], ids=["adapters", "residual stream"])
def test_dropout_is_another_one_in_every_pass_and_every_block(rates):
    _, fused = twins(adapted(make(resid_pdrop=rates[1]), lora_dropout=rates[0]).train())
    assert not torch.allclose(fused(IDS), fused(IDS), atol=1e-3)
    fused.model.layers[1].load_state_dict(fused.model.layers[0].state_dict())
    x = fused.model.embed_tokens(IDS)
    angles, visibility = rotary_angles(torch.arange(9)[None], 32, 1e4), Visibility(9, 9, None, x.device)
    assert not torch.allclose(*(layer(x, angles, visibility, None) for layer in fused.model.layers), atol=1e-3)


def test_a_model_that_does_not_train_drops_nothing():
    assert_equal(adapted(make(**DROPOUT), lora_dropout=0.3).eval())


def test_dropout_costs_a_plain_and_a_fused_run_alike(sft_config, metrics_of, make_phi, tmp_path):
    """Other masks, the same distribution: losses are near, and a run repeats itself bit for bit."""
    lora, model = LoraConfig(r=4, target_modules=EVERY, lora_dropout=0.1), str(make_phi(resid_pdrop=0.1))
    plain, fused, again = (
        metrics_of(sft.train(sft_config(model=model, lora=lora, fuse=on, output=str(tmp_path / f"{on}{i}"))))
        for i, on in enumerate((False, True, True))
    )
    losses = [[line["loss"] for line in lines] for lines in (plain, fused, again)]
    assert losses[1] == losses[2] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.1)


def test_dropout_of_attention_weights_runs_unfused(monkeypatch):
    model = make(attention_dropout=0.1)
    fuse(model)
    monkeypatch.setattr(model.model.layers[0], "fused_forward", None)
    monkeypatch.setattr(model.model.layers[1], "fused_forward", lambda *_: pytest.fail("ran fused"))
    model.train()(IDS)
    with pytest.raises(pytest.fail.Exception):
        model.eval()(IDS)


@pytest.mark.parametrize(
    ("device", "changes", "fused"), [("cpu", {}, False), ("cuda", {}, True), ("cuda", {"qk_layernorm": True}, False)]
)
def test_auto_fuses_on_a_gpu_what_can_be(monkeypatch, device, changes, fused):
    model = make(**changes)
    monkeypatch.setattr(Phi2ForCausalLM, "device", torch.device(device))
    fuse(model, "auto")
    assert {layer.fused_forward is not None for layer in model.model.blocks} == {fused}


def test_a_model_with_qk_layernorm_is_refused():
    with pytest.raises(ValueError, match="fused blocks cannot have qk_layernorm"):
        fuse(make(qk_layernorm=True))


@pytest.mark.parametrize("lora", [LoraConfig(r=4, target_modules=EVERY), None], ids=["lora", "full"])
def test_a_fused_sft_run_is_a_plain_one(sft_config, metrics_of, tmp_path, lora):
    plain, fused = (
        metrics_of(sft.train(sft_config(lora=lora, fuse=on, output=str(tmp_path / str(on))))) for on in (False, True)
    )
    assert [line["loss"] for line in fused] == pytest.approx([line["loss"] for line in plain], rel=1e-4)


def test_a_fused_run_of_all_weights_resumes_bit_for_bit(sft_config, metrics_of, train_and_kill, tmp_path):
    """AdamW's moments lie in memory as their transposed weights do, also behind a checkpoint."""
    settings = dict(lora=None, fuse=True, save_steps=2)
    whole = sft.train(sft_config(**settings))
    config = sft_config(**settings, output=str(tmp_path / "killed"))
    train_and_kill(config, step=4)
    assert metrics_of(sft.train(dataclasses.replace(config, resume=True))) == metrics_of(whole)


def test_a_fused_dpo_run_is_a_plain_one(dpo_config, metrics_of, tmp_path):
    plain, fused = (metrics_of(dpo.train(dpo_config(fuse=on, output=str(tmp_path / str(on))))) for on in (False, True))
    assert [line["loss"] for line in fused] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    model = load_model(dpo_config().model)
    assert not is_fused(model)
