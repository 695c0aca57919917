"""Steps that are launched before the last one is read: what is launched when, what is thrown away, and what stays.

That all say what they would say one by one is tested beside the engine (`test_engine.py`).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import phi2.inference.engine
from phi2.arriving import Arriving
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request, Token
from phi2.inference.rows import Rows
from phi2.inference.step import RecordedStep
from phi2.lora import adapter_state, attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM

from .test_engine import CHOICES, CONTEXT, tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SAMPLED = dict(temperature=0.9, seed=4, top_k=20, top_p=0.95, min_p=0.001, repetition_penalty=1.2)


MODEL = tiny_model()


def request(*ids: int, new: int = 8, stop: set[int] | None = None, **other) -> Request:
    extra = {name: other.pop(name) for name in ("top_logprobs", "adapter") if name in other}
    return Request(list(ids), SamplingParams(max_new_tokens=new, **other), frozenset(stop or ()), **extra)


def finish(engine: Engine, *requests: Request, said: list[Token] | None = None) -> list[list[Token]]:
    """The tokens of each request; those of requests that were there before are added to `said`."""
    said = [] if said is None else said
    for own in requests:
        engine.add(own)
    while not engine.is_idle:
        said += engine.step()
    return [[token for token in said if token.request is own] for own in requests]


def alone(asked: Request, model: Phi2ForCausalLM = MODEL) -> list[int]:
    """The ids of its reply, from an engine that reads each step before the next."""
    again = Request(asked.ids, asked.params, asked.stop_ids, asked.top_logprobs, asked.adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi2.inference.engine, "can_record", lambda device: False)
        return ids_of(finish(Engine(model, CHOICES, slots=1), again)[0])


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What the loop does, as it does it: "launch" a step, "read" its numbers, "write" which rows are active."""
    happened: list[str] = []

    def watch(owner: type, method: str, name: str) -> None:
        own = getattr(owner, method)

        def told(*args):
            happened.append(name)
            return own(*args)

        monkeypatch.setattr(owner, method, told)

    watch(RecordedStep, "__call__", "launch"), watch(Arriving, "wait", "read"), watch(Rows, "activate", "write")
    return happened


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_each_step_starts_before_the_last_one_is_read_and_nothing_is_written_in_between(recordings, order, how):
    finish(Engine(MODEL, CHOICES, slots=2), request(1, 2, new=6, **how), request(3, 4, new=6, **how))
    assert order == ["write", "launch", *["launch", "read"] * 4, "read"]  # the first token is the prompt's
    assert [recording.replays for recording in recordings] == [4]


def test_nothing_is_computed_for_a_reply_whose_last_token_is_on_its_way(recordings, order):
    finish(Engine(MODEL, CHOICES, slots=2), request(1, 2, new=5), request(3, 4, new=3))
    assert order == ["write", *["launch"] * 2, "read", "write", "launch", "read", "launch", "read", "read"]
    order.clear()
    (tokens,) = finish(Engine(MODEL, CHOICES, slots=1), request(*[9] * (CONTEXT - 2), new=9))
    assert tokens[-1].finish_reason == "length" and order == ["write", "launch", "read"]


def test_one_step_is_thrown_away_when_a_stop_ends_all(recordings, order):
    ids = alone(request(1, 2, new=20))
    stop = next(token for token in ids[3:] if ids.index(token) >= 3)
    engine = Engine(MODEL, CHOICES, slots=1)
    (tokens,) = finish(engine, request(1, 2, new=20, stop={stop}))
    assert ids_of(tokens) == ids[: ids.index(stop) + 1] and tokens[-1].finish_reason == "stop"
    assert order.count("launch") == len(tokens) and order.count("read") == len(tokens) - 1
    assert engine.cache.lengths == [2 + len(tokens) - 1]  # what was thrown away is not counted


def test_no_step_runs_ahead_of_a_request_that_could_be_admitted(recordings, order):
    engine = Engine(MODEL, CHOICES, slots=2)
    engine.add(request(1, 2, new=9))
    engine.step(), engine.step()
    assert order == ["write", "launch", "launch", "read"]
    engine.add(request(3, 4, 5, new=9))
    assert [len(engine.step()) for _ in range(3)] == [1, 2, 2]  # the one on its way is read, then the prompt
    assert order[4:] == ["read", "launch", "read", "write", "launch", "launch", "read"]


def test_no_step_runs_ahead_where_the_likeliest_tokens_are_wanted(recordings, order):
    finish(Engine(MODEL, CHOICES, slots=2), request(1, 2, new=4, top_logprobs=2), request(3, 4, new=4))
    assert order == ["write", *["launch", "read"] * 3]


def test_rows_that_stay_are_brought_together_before_the_next_step(recordings, order):
    asked = [request(i, i, new=2 if i < 6 else 12, **(SAMPLED | {"seed": i} if i % 2 else {})) for i in range(8)]
    said = finish(Engine(MODEL, CHOICES, slots=8), *asked)
    assert [ids_of(tokens) for tokens in said] == [alone(own) for own in asked]
    assert order.count("launch") == order.count("read") == 11


# ---- who leaves while a step is on its way ----


def test_a_token_on_its_way_to_a_request_that_was_cancelled_reaches_nobody(recordings):
    engine, gone, stays = Engine(MODEL, CHOICES, slots=2), request(1, 2, new=30), request(3, 4, new=12)
    engine.add(gone), engine.add(stays)
    said = [*engine.step(), *engine.step(), *engine.step()]
    assert engine._flight is not None
    engine.cancel(gone)
    while not engine.is_idle:
        said += engine.step()
    assert [token.request for token in said].count(gone) == 3
    assert ids_of([token for token in said if token.request is stays]) == alone(stays)


def test_nor_to_the_request_that_takes_its_slot(recordings):
    engine, gone = Engine(MODEL, CHOICES, slots=1), request(1, 2, 3, new=30)
    engine.add(gone)
    for _ in range(4):
        engine.step()
    assert engine._flight is not None
    engine.cancel(gone)
    assert engine.is_idle
    after = request(1, 2, 3, 9, 9, 8, 8, new=12)  # goes on from the very place where the other one would have
    assert ids_of(finish(engine, after)[0]) == alone(after)
    assert after.cached_tokens == 3


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_a_kept_beginning_says_what_a_fresh_engine_says(recordings, how):
    engine, first = Engine(MODEL, CHOICES, slots=2), request(5, 6, 7, new=30, **how)
    stop = {alone(first)[9]}
    first = request(5, 6, 7, new=30, stop=stop, **how)
    (tokens,) = finish(engine, first)
    turns = [request(*first.ids, *ids_of(tokens), *more, new=12, **how) for more in ((8,), (9, 9), ())]
    said = finish(engine, *turns)
    assert [own.cached_tokens for own in turns] == [3 + len(tokens) - 1] * 3
    assert [ids_of(tokens) for tokens in said] == [alone(own) for own in turns]


def test_an_adapter_that_comes_in_the_middle_is_answered_beside_the_base(recordings):
    model = tiny_model()
    attach(model, LoraConfig(r=4))
    for parameter in adapter_state(model).values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base, adapted = request(1, 2, new=20, **SAMPLED), request(1, 2, new=9, adapter="default", **SAMPLED)
    engine = Engine(model, CHOICES, slots=3)
    engine.add(base)
    said = [*engine.step(), *engine.step()]
    engine.add(adapted)
    while not engine.is_idle:
        said += engine.step()
    for own in (base, adapted):
        assert ids_of([token for token in said if token.request is own]) == alone(own, model)


# ---- errors ----


@pytest.fixture(params=["one by one", "ahead"])
def way(request) -> None:
    if request.param == "ahead":
        request.getfixturevalue("recordings")


def test_logits_that_were_not_finite_leave_nothing_behind(way):
    model = tiny_model()
    asked = request(1, 2, 3, new=30), request(4, 5, new=30)
    engine, said = Engine(model, CHOICES, slots=3), []
    engine.add(asked[0]), engine.add(asked[1])
    for _ in range(4):
        said += engine.step()
    bias = model.model.layers[0].mlp.fc2.bias
    kept = bias.detach().clone()
    torch.nn.init.constant_(bias, math.nan)
    for _ in range(2):  # what failed is tried again
        with pytest.raises(ValueError, match=r"first in model.layers.0.mlp.fc2 \(torch.float32\)"):
            for _ in range(2):  # a step that was on its way is as it should be
                said += engine.step()
    with torch.no_grad():
        bias.copy_(kept)
    said += engine.step()
    others = [request(9, 8, 7, 6, new=40), request(4, 5, 1, new=20)]
    assert [ids_of(tokens) for tokens in finish(engine, *others, said=said)] == [alone(own) for own in others]
    for own in asked:
        assert ids_of([token for token in said if token.request is own]) == alone(own)


def test_a_step_that_could_not_be_launched_loses_no_token(recordings, monkeypatch):
    engine, asked = Engine(MODEL, CHOICES, slots=1), request(1, 2, new=12, **SAMPLED)
    engine.add(asked)
    said = [*engine.step(), *engine.step(), *engine.step()]

    def fails(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "__call__", fails)
        with pytest.raises(RuntimeError):
            engine.step()
    while not engine.is_idle:
        said += engine.step()
    assert ids_of(said) == alone(asked)


# ---- the host ----


class Traffic(TorchDispatchMode):
    """Every operator that the host calls itself; what a replay does is the device's."""

    def __init__(self, recording) -> None:
        super().__init__()
        self.recording, self.ops = recording, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.recording.is_replaying:
            self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_a_step_costs_the_host_one_copy_and_one_look_at_it(recordings, monkeypatch, how):
    engine = Engine(MODEL, CHOICES, slots=2)
    engine.add(request(1, 2, new=30, **how)), engine.add(request(3, 4, 5, new=30, **how))
    for _ in range(5):
        engine.step()
    (recording,) = recordings
    asked: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__len__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, own=own, name=name: asked.append(name) or own(*args))
    with Traffic(recording) as traffic:
        engine.step()
    assert traffic.ops == ["aten.empty.memory_format", "aten.copy_.default"] and asked == ["tolist"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_a_gpu_is_never_waited_for_but_for_what_a_step_told(how):
    model = tiny_model().cuda()
    engine, asked = Engine(model, CHOICES, slots=2), [request(1, 2, new=30, **how), request(3, 4, 5, new=30, **how)]
    said: dict[Request, list[Token]] = {own: [] for own in asked}
    for own in asked:
        engine.add(own)
    try:
        while not engine.is_idle:
            for token in engine.step():
                said[token.request].append(token)
            torch.cuda.set_sync_debug_mode("error" if len(said[asked[0]]) > 4 else "default")  # recorded by then
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [ids_of(said[own]) for own in asked] == [alone(own, model) for own in asked]
