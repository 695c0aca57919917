"""The recorded decode step: a recording, which knows nothing but addresses, says what pass after pass would say."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import phi2.inference.engine
import phi2.inference.kept_engine
import phi2.inference.step
from phi2.cache import KVCache, PackedPass, StepPass
from phi2.config import Phi2Config
from phi2.inference.chat import ChatSession
from phi2.inference.config import SamplingParams
from phi2.inference.generate import generate, stream
from phi2.inference.rows import Rows
from phi2.inference.sampling import Stages
from phi2.inference.step import RecordedStep, block_step, record
from phi2.lora import attach, disabled
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.quantize import FORMATS, quantize_model
from phi2_kernels import _dispatch
from phi2_kernels.gemv import MAX_ROWS
from phi2_kernels.rotary import rotary_angles

SHAPE = dict(vocab_size=300, hidden_size=160, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PROMPTS = ["a", "What is the capital of France?", "def fib(n):", "12345 67890", "z y"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch) -> str:
    """Both implementations of the ops; Triton's kernels by the interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take a GPU's tensors")
    monkeypatch.setattr(_dispatch, "default_impl", request.param)
    return request.param


def never_record(monkeypatch) -> None:
    for module in (phi2.inference.engine, phi2.inference.kept_engine):
        monkeypatch.setattr(module, "can_record", lambda device: False)


def tiny_model(**changes) -> Phi2ForCausalLM:
    fixed = dict(max_position_embeddings=96, initializer_range=0.3, partial_rotary_factor=0.4)
    model = Phi2ForCausalLM(Phi2Config(**{**SHAPE, **fixed, **changes}))
    model.init_weights(seed=1)
    return model.eval()


@torch.no_grad()
def test_replays_equal_passes_that_the_host_counts(recordings, impl):
    layers = 1 if impl == "triton" else 2  # the interpreter takes its time
    narrow = dict(vocab_size=16, hidden_size=32, intermediate_size=32, num_attention_heads=1, partial_rotary_factor=0.5)
    model = tiny_model(**narrow, num_hidden_layers=layers)
    tokens, read = torch.randint(0, 16, (3, 8)), {0: 5, 1: 2, 2: 3}
    caches = [KVCache(model.config, 3, 12, torch.float32) for _ in range(2)]
    for cache in caches:
        prompts = torch.cat([tokens[row, :n] for row, n in read.items()])[None]
        model(prompts, cached=PackedPass(cache, read))
    step, rows = greedy_step(model, caches[0], 3)
    for i in range(3):
        active = [0, 1, 2] if i < 2 else [0, 2]  # row 1 has left
        rows.activate({row: read[row] + i for row in active}, {row: tokens[row, read[row] + i] for row in active})
        step(model)
        for row in active:
            ids = tokens[row, read[row] + i]
            expected = model(ids[None, None], cached=PackedPass(caches[1], {row: 1}))
            torch.testing.assert_close(step.logits[row], expected[0, 0], atol=2e-5, rtol=2e-5)
    assert len(recordings) == 1 and caches[1].lengths == [8, 4, 6]
    for row, length in enumerate(caches[1].lengths):
        ours, theirs = (cache.keys[:, row, :, :length] for cache in caches)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def greedy_step(model: Phi2ForCausalLM, cache: KVCache, count: int) -> tuple[RecordedStep, Rows]:
    rows = Rows(count, cache.max_length, model.config.vocab_size, cache.keys.device)
    return RecordedStep(model, cache, rows, count, Stages.of(SamplingParams())), rows


@torch.no_grad()
def test_replays_go_on_by_themselves_to_the_end_of_each_slot(recordings):
    model = tiny_model()
    cache, truth = (KVCache(model.config, 2, 6, torch.float32) for _ in range(2))
    step, rows = greedy_step(model, cache, 2)
    for held in (cache, truth):
        model(torch.tensor([[1, 2, 3, 4, 5]]), cached=PackedPass(held, {0: 2, 1: 3}))
    rows.activate({0: 2, 1: 3}, {0: 8, 1: 9})
    told = [[int(number) for number, _, _ in step(model).wait()] for _ in range(5)]  # each slot is full before
    for row, (token, n) in enumerate(((8, 4), (9, 3))):
        for i in range(n):
            token = model(torch.tensor([[token]]), cached=PackedPass(truth, {row: 1}))[0, 0].argmax().item()
            assert told[i][row] == token
        torch.testing.assert_close(cache.keys[:, row, :, :6], truth.keys[:, row, :, :6], atol=2e-5, rtol=2e-5)
    assert rows.at[0].tolist() == [6, 6] and recordings[0].replays == 4


def test_what_the_device_has_chosen_stays_where_other_rows_become_active():
    rows = Rows(3, 9, 50, torch.device("cpu"))
    rows.activate({0: 4, 2: 7}, {0: 11, 2: 12})
    assert rows.ids.tolist() == [11, 0, 12] and rows.at.tolist() == [[4, 9, 7], [5, 1, 8]]
    rows.advance(2, torch.tensor([21, 22]))
    assert rows.ids.tolist() == [21, 22, 12] and rows.at.tolist() == [[5, 9, 7], [6, 1, 8]]
    rows.activate({0: 5}, None)
    assert rows.ids.tolist() == [21, 22, 12] and rows.at.tolist() == [[5, 9, 9], [6, 1, 1]]


def test_a_row_that_is_not_active_says_nothing_that_counts():
    params = SamplingParams(repetition_penalty=2.0)
    rows, stages, logits = Rows(2, 9, 3, torch.device("cpu")), Stages.of(params), torch.tensor([[1.0, 0.9, 0.8]] * 2)
    for slot in range(2):
        rows.occupy(slot, params, [2])
    assert rows.choose(logits, slice(2), stages, torch.tensor([5, 9 + 1])).tolist() == [0, 0]
    assert rows.choose(logits, slice(2), stages, torch.tensor([6, 6])).tolist() == [1, 0]


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
    fewest, as_written = partial(block_step, block, x, angles), partial(block, x, angles, None)
    for cache, run in zip(caches, (fewest, as_written), strict=True):
        cache.keys.copy_(torch.arange(9.0)[:, None] / 8), cache.values.copy_(torch.arange(80.0) / 80)
        cache.lengths = [5] * rows
        step = StepPass(cache, rows)
        step.start(range(rows))
        with Launches() as launches:
            outputs.append(run(step))
        if run is fewest:
            ops = ["layer_norm", "gemv_each", "rotary_and_store", "decode_attention", "gemv_sum"]
            assert launches.names == [f"phi2.{op}" for op in ops]
    for ours, plain in (outputs, (caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@torch.no_grad()
def test_a_block_of_more_rows_than_its_products_take_runs_as_it_is_written(monkeypatch):
    """Also where Triton is named, which refuses what its kernels cannot take."""
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    block, rows = tiny_model().model.layers[1], MAX_ROWS + 1
    x, angles = torch.randn(rows, 1, 160), rotary_angles(torch.zeros((rows, 1), dtype=torch.long), 32, 10000.0)
    outputs = []
    for run in (partial(block_step, block, x, angles), partial(block, x, angles, None)):
        step = StepPass(KVCache(block.self_attn.config, rows, 8, torch.float32), rows)
        step.start(range(rows))
        outputs.append(run(step))
    assert torch.equal(*outputs)


def hooked(module: torch.nn.Module, calls: list) -> Callable[[], None]:
    return module.register_forward_hook(lambda *given: calls.append(None)).remove


def patched(module: torch.nn.Module, calls: list) -> Callable[[], None]:
    own = module.forward
    module.forward = lambda *given, **named: (calls.append(None), own(*given, **named))[1]
    return partial(delattr, module, "forward")


@torch.no_grad()
@pytest.mark.parametrize("change", [hooked, patched])
@pytest.mark.parametrize("part", ["model", "model.layers.1", "model.layers.1.mlp.fc1", "model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_module_that_must_be_called_is_at_every_token(part, change, lora, tiny_tokenizer, recordings):
    """Also where replies were recorded before, where LoRA has been put on it since, and only as long as it must be."""
    model, calls = tiny_model(), []

    def reply() -> tuple[int, int]:
        calls.clear()
        said = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=8)
        return len(calls), len(said.token_ids)

    reply()
    undo = change(model.get_submodule(part), calls)
    if lora:
        attach(model, LoraConfig(r=2, target_modules=("fc1", "lm_head")))
    made = len(recordings)
    called, tokens = reply()
    assert called == tokens and len(recordings) == made
    undo()
    assert reply()[0] == 0 and len(recordings) >= made


@torch.no_grad()
def test_a_recording_that_froze_the_count_is_noticed(recordings):
    """Packed passes, whose places the host counts, must not survive being recorded: else the test above is blind."""
    model, tokens = tiny_model(), torch.randint(0, 300, (1, 8))
    cache, truth = (KVCache(model.config, 1, 8, torch.float32) for _ in range(2))
    expected = [model(tokens[:, i : i + 1], cached=PackedPass(truth, {0: 1})) for i in range(8)]
    ids = tokens[:, :1].clone()
    replay, logits = phi2.inference.step.record(lambda: model(ids, cached=PackedPass(cache, {0: 1})))
    for i in range(1, 8):
        ids.copy_(tokens[:, i : i + 1])
        replay()
    assert not torch.allclose(logits, expected[-1], atol=1e-2)


def test_recordings_of_two_threads_take_turns(monkeypatch):
    """CUDA forbids what begins one, a wait for the GPU, while another is made."""
    inside, most = [], []

    @contextmanager
    def graph(*_, **__):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        yield
        inside.pop()

    stand_ins = dict(CUDAGraph=lambda: SimpleNamespace(replay=None), device=lambda device: nullcontext(), graph=graph)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(phi2.inference.step, "_recording_stream", lambda device: None)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: record(lambda: None, torch.device("cuda")), range(8)))
    assert most == [1] * 8


def test_a_batch_says_the_same_recorded_or_not_also_when_rows_leave(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    recorded = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, temperature=1.0, seed=3)
    count = len(recordings)
    never_record(monkeypatch)
    plain = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, temperature=1.0, seed=3)
    assert [row.token_ids for row in recorded] == [row.token_ids for row in plain]
    assert count >= 1


@pytest.mark.parametrize("change", ["adapter", "qk_layernorm", "grouped", "int8", "int4"])
def test_every_kind_of_model_can_be_recorded(recordings, tiny_tokenizer, monkeypatch, change):
    shape = dict(qk_layernorm=dict(qk_layernorm=True), grouped=dict(num_key_value_heads=1))
    model = tiny_model(**shape.get(change, {}))
    if change == "adapter":
        put_on_adapter(model)
    if change in FORMATS:
        quantize_model(model, change)
    said = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    never_record(monkeypatch)
    assert said.token_ids == generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12).token_ids
    assert recordings


def test_a_chat_goes_on_from_what_recorded_steps_stored(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    chat, other = (ChatSession(model, tiny_tokenizer, max_new_tokens=6) for _ in range(2))
    first = [chat.reply("Hi"), chat.reply("Why?")]
    assert recordings
    never_record(monkeypatch)
    assert first == [other.reply("Hi"), other.reply("Why?")]


def test_a_replay_whose_logits_are_not_finite_names_the_layer(recordings, tiny_tokenizer):
    model = tiny_model()
    chunks = stream(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    for _ in range(5):
        next(chunks)
    torch.nn.init.constant_(model.model.layers[1].mlp.fc2.bias, float("nan"))
    with pytest.raises(ValueError, match="non-finite logits; first in model.layers.1.mlp.fc2"):
        list(chunks)


def test_recorded_steps_serve_the_replies_that_follow(recordings, tiny_tokenizer):
    model = tiny_model()
    first = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    count = len(recordings)
    again = [generate(model, tiny_tokenizer, prompt, max_new_tokens=12) for prompt in (PROMPTS[2], PROMPTS[1])]
    assert len(recordings) == count == 1
    assert again[1].token_ids == first.token_ids


def test_the_steps_that_were_used_last_are_kept(recordings, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("phi2.inference.engine.MAX_STEPS", 2)
    model, made = tiny_model(), []
    for min_p, top_k in ((0, 2), (0, 8), (0, 2), (0.1, 0), (0, 2), (0, 8)):
        generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=8, temperature=1.0, min_p=min_p, top_k=top_k)
        made.append(len(recordings))
    assert made == [1, 2, 2, 3, 3, 4]


def test_a_stop_string_ends_a_recorded_reply_where_it_ends_any_other(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    stop = str(generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=30))[6:8]
    said = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, stop=stop)
    never_record(monkeypatch)
    plain = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30, stop=stop)
    assert [(row.text, row.token_ids, row.finish_reason) for row in said] == [
        (row.text, row.token_ids, row.finish_reason) for row in plain
    ]
    assert said[1].finish_reason == "stop_string"


def test_a_stream_that_is_closed_leaves_nothing_to_the_next_reply(recordings, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    chunks = stream(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=30)
    for _ in range(4):
        next(chunks)
    chunks.close()
    said = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    never_record(monkeypatch)
    assert said.token_ids == generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12).token_ids
    assert len(recordings) == 1


@pytest.mark.parametrize("change", ["trained", "moved", "adapter", "switched off"])
@torch.no_grad()
def test_recorded_steps_of_other_weights_are_never_replayed(recordings, tiny_tokenizer, monkeypatch, change):
    model = tiny_model()
    if change == "switched off":
        put_on_adapter(model)
    generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    with disabled(model) if change == "switched off" else nullcontext():
        match change:
            case "trained":
                model.model.layers[0].mlp.fc1.weight.mul_(-1)
            case "moved":
                weight = model.model.layers[0].mlp.fc1.weight
                weight.data = -weight.data
            case "adapter":
                put_on_adapter(model)
        recorded = generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
        never_record(monkeypatch)
        assert recorded.token_ids == generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=12).token_ids


def put_on_adapter(model: Phi2ForCausalLM) -> None:
    attach(model, LoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def test_a_kept_engine_goes_with_its_model(recordings, tiny_tokenizer):
    model = tiny_model()
    generate(model, tiny_tokenizer, PROMPTS[1], max_new_tokens=4)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cuda_graph_says_what_its_kernels_say_one_by_one(dtype):
    model, tokens = tiny_model().to("cuda", dtype), torch.randint(0, 300, (2, 12), device="cuda")
    caches = [KVCache(model.config, 2, 20, dtype, "cuda") for _ in range(2)]
    steps = [greedy_step(model, cache, 2) for cache in caches]
    for i in range(12):
        steps[1][0]._launched = False  # launches kernel by kernel again
        for step, rows in steps:
            rows.activate({0: i, 1: i}, {0: tokens[0, i].item(), 1: tokens[1, i].item()})
            step(model)
        assert torch.equal(steps[0][0].logits, steps[1][0].logits)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_records_once_for_a_reply(monkeypatch, tiny_tokenizer):
    made = []
    monkeypatch.setattr(phi2.inference.step, "record", lambda *launch: made.append(launch) or record(*launch))
    generate(tiny_model().cuda(), tiny_tokenizer, PROMPTS[1], max_new_tokens=12)
    assert len(made) == 1
