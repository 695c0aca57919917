"""The recorded decode step: a recording, which knows nothing but addresses, says what pass after pass would say."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import phi2.inference.step
from phi2.cache import KVCache, StepCache
from phi2.config import Phi2Config
from phi2.inference.chat import ChatSession
from phi2.inference.generate import generate, stream
from phi2.inference.step import RecordedStep, block_step, record
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.model import Block, Phi2ForCausalLM
from phi2.quantize import FORMATS, quantize_model
from phi2_kernels import _dispatch
from phi2_kernels.rotary import rotary_angles

SHAPE = dict(vocab_size=300, hidden_size=160, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PROMPTS = ["a", "What is the capital of France?", "def fib(n):", "12345 67890"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch) -> str:
    """Both implementations of the ops; Triton's kernels by the interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take a GPU's tensors")
    monkeypatch.setattr(_dispatch, "default_impl", request.param)
    return request.param


def tiny_model(**changes) -> Phi2ForCausalLM:
    fixed = dict(max_position_embeddings=96, initializer_range=0.3, partial_rotary_factor=0.4)
    model = Phi2ForCausalLM(Phi2Config(**{**SHAPE, **fixed, **changes}))
    model.init_weights(seed=1)
    return model.eval()


@torch.no_grad()
def test_replays_equal_passes_that_the_host_counts(recordings, impl):
    layers = 1 if impl == "triton" else 2  # the interpreter takes its time
    model = tiny_model(vocab_size=32, hidden_size=80, num_attention_heads=1, num_hidden_layers=layers)
    tokens = torch.randint(0, 32, (2, 8))
    pads = torch.tensor([[0], [3]], dtype=torch.int32)
    caches = [KVCache(model.config, 2, 12, torch.float32) for _ in range(2)]
    until = torch.where(torch.arange(12) < pads, 0, 12).int()
    positions = (torch.arange(8) - pads).clamp(min=0)
    for cache in caches:
        model.model(tokens[:, :5], positions=positions[:, :5], visible_until=until[:, :5], cache=cache)
    step = RecordedStep(model, caches[0], pads, until)
    for i in range(5, 8):
        expected = model(
            tokens[:, i : i + 1], positions=positions[:, i : i + 1], visible_until=until[:, : i + 1], cache=caches[1]
        )
        torch.testing.assert_close(step(tokens[:, i : i + 1]), expected[:, 0], atol=2e-5, rtol=2e-5)
    assert len(recordings) == 1 and caches[0].length == 8
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=2e-5, rtol=2e-5)


class Launches(TorchDispatchMode):
    """Names of the ops that were called, but for those that only look at memory another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (3, torch.float16)])
@torch.no_grad()
def test_a_block_is_five_ops_that_say_what_it_says(format, rows, dtype, monkeypatch):
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model().to(device, dtype)
    if format:
        quantize_model(model, format)
    block, x = model.model.layers[1], torch.randn(rows, 1, 160, device=device).to(dtype)
    angles = rotary_angles(torch.full((rows, 1), 5, device=device), 32, 10000.0)
    outputs, caches = [], [KVCache(model.config, rows, 8, dtype, device) for _ in range(2)]
    for cache, run in zip(caches, (block_step, Block.__call__), strict=True):
        cache.keys.copy_(torch.arange(8.0)[:, None] / 8), cache.values.copy_(torch.arange(80.0) / 80)
        cache.advance(5)
        step = StepCache(cache)
        visibility = step.visibility(1, None)
        with Launches() as launches:
            outputs.append(run(block, x, angles, visibility, step))
        if run is block_step:
            ops = ["layer_norm", "gemv_each", "rotary_and_store", "decode_attention", "gemv_sum"]
            assert launches.names == [f"phi2.{op}" for op in ops]
    for ours, plain in (outputs, (caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@torch.no_grad()
def test_a_recording_that_froze_the_count_is_noticed(recordings):
    """Passes with a KVCache, which the host counts, must not survive being recorded: else the test above is blind."""
    model, tokens = tiny_model(), torch.randint(0, 300, (1, 8))
    cache, truth = (KVCache(model.config, 1, 8, torch.float32) for _ in range(2))
    expected = [model(tokens[:, i : i + 1], cache=truth) for i in range(8)]
    ids = tokens[:, :1].clone()
    replay, logits = phi2.inference.step.record(lambda: model(ids, cache=cache))
    for i in range(1, 8):
        ids.copy_(tokens[:, i : i + 1])
        replay()
    assert not torch.allclose(logits, expected[-1], atol=1e-2)


def test_a_batch_says_the_same_recorded_or_not_also_when_rows_leave(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    recorded = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, temperature=1.0, seed=3)
    count = len(recordings)
    monkeypatch.setattr(phi2.inference.generate, "can_record", lambda device: False)
    plain = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, temperature=1.0, seed=3)
    assert [row.token_ids for row in recorded] == [row.token_ids for row in plain]
    assert count >= 1


@pytest.mark.parametrize("change", ["adapter", "qk_layernorm", "grouped", "int8", "int4"])
def test_every_kind_of_model_can_be_recorded(recordings, tiny_tokenizer, monkeypatch, change):
    shape = dict(qk_layernorm=dict(qk_layernorm=True), grouped=dict(num_key_value_heads=1))
    model = tiny_model(**shape.get(change, {}))
    if change == "adapter":
        attach(model, LoraConfig(r=4))
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    if change in FORMATS:
        quantize_model(model, change)
    said = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    monkeypatch.setattr(phi2.inference.generate, "can_record", lambda device: False)
    assert said.token_ids == generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12).token_ids
    assert recordings


def test_a_chat_goes_on_from_what_recorded_steps_stored(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    chat, other = (ChatSession(model, tiny_tokenizer, max_new_tokens=6) for _ in range(2))
    first = [chat.reply("Hi"), chat.reply("Why?")]
    assert recordings
    monkeypatch.setattr(phi2.inference.generate, "can_record", lambda device: False)
    assert first == [other.reply("Hi"), other.reply("Why?")]


def test_a_replay_whose_logits_are_not_finite_names_the_layer(recordings, tiny_tokenizer):
    model = tiny_model()
    chunks = stream(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    for _ in range(5):
        next(chunks)
    torch.nn.init.constant_(model.model.layers[1].mlp.fc2.bias, float("nan"))
    with pytest.raises(ValueError, match="non-finite logits; first in model.layers.1.mlp.fc2"):
        list(chunks)


@torch.no_grad()
def test_a_full_cache_is_left_alone(impl):
    model = tiny_model()
    cache = KVCache(model.config, 1, 4, torch.float32)
    cache.advance(3)
    step = RecordedStep(model, cache, None, None)
    step(torch.ones((1, 1), dtype=torch.int64))
    with pytest.raises(ValueError, match="holds 4 tokens, 5 were asked for"):
        step(torch.ones((1, 1), dtype=torch.int64))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cuda_graph_says_what_its_kernels_say_one_by_one(dtype):
    model, tokens = tiny_model().to("cuda", dtype), torch.randint(0, 300, (2, 12), device="cuda")
    caches = [KVCache(model.config, 2, 20, dtype, "cuda") for _ in range(2)]
    steps = [RecordedStep(model, cache, None, None) for cache in caches]
    for i in range(12):
        recorded = steps[0](tokens[:, i : i + 1]).clone()
        steps[1]._logits = steps[1]._replay = None  # launches kernel by kernel again
        assert torch.equal(recorded, steps[1](tokens[:, i : i + 1]))


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_records_once_for_a_reply(monkeypatch, tiny_tokenizer):
    made = []
    monkeypatch.setattr(phi2.inference.step, "record", lambda *launch: made.append(launch) or record(*launch))
    generate(tiny_model().cuda(), tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    assert len(made) == 1
