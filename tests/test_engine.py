"""The engine: rows that come and go change nothing for the others, and nothing is read twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi2.inference.engine
import phi2.inference.slots
from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request, default_slots
from phi2.lora import adapter_state, attach, computing
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM

CONTEXT, CHOICES = 64, 50
GREEDY = SamplingParams(max_new_tokens=8)


def tiny_model() -> Phi2ForCausalLM:
    shape = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = Phi2ForCausalLM(Phi2Config(**shape, max_position_embeddings=CONTEXT, initializer_range=0.3))
    model.init_weights(seed=1)
    return model.eval()


MODEL = tiny_model()


def finish(engine: Engine, *requests: Request) -> dict[Request, list]:
    """The tokens of every request until the engine is idle."""
    for request in requests:
        engine.add(request)
    said: dict[Request, list] = {}
    while not engine.is_idle:
        for token in engine.step():
            said.setdefault(token.request, []).append(token)
    return said


def alone(request: Request, model: Phi2ForCausalLM = MODEL) -> list:
    """Its tokens from an engine of its own, which never runs ahead."""
    again = Request(request.ids, request.params, request.stop_ids, request.top_logprobs, request.adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi2.inference.engine, "can_record", lambda device: False)
        return finish(Engine(model, CHOICES, slots=1), again)[again]


@pytest.fixture(params=["one by one", "ahead"])
def way(request) -> str:
    """How tokens are decoded: each step after the last one was read, or recorded steps that run ahead."""
    if request.param == "ahead":
        request.getfixturevalue("recordings")
    return request.param


def assert_same_reply(tokens: list, expected: list) -> None:
    assert [t.token_id for t in tokens] == [t.token_id for t in expected]
    assert tokens[-1].finish_reason == expected[-1].finish_reason
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-5)


def tokens_read(monkeypatch) -> list[int]:
    """Fills up with how many prompt tokens each packed pass reads."""
    counts: list[int] = []
    init = phi2.inference.engine.PackedPass.__init__

    def counting(self, cache, of_slots):
        counts.append(sum(of_slots.values()))
        init(self, cache, of_slots)

    monkeypatch.setattr(phi2.inference.engine.PackedPass, "__init__", counting)
    return counts


@st.composite
def arrivals(draw):
    """(step at which it comes, request, step at which it is cancelled or None): many beginnings are shared."""
    beginnings = [draw(st.lists(st.integers(0, 49), min_size=1, max_size=24)) for _ in range(2)]
    events = []
    for _ in range(draw(st.integers(1, 7))):
        rest = draw(st.lists(st.integers(0, 49), min_size=1, max_size=12))
        ids = draw(st.sampled_from([[], *beginnings])) + rest
        temperature = draw(st.sampled_from([0.0, 0.9]))
        shape = draw(st.sampled_from([{}, dict(top_k=7), dict(top_p=0.8, min_p=0.02)])) if temperature else {}
        params = SamplingParams(
            max_new_tokens=draw(st.integers(1, 60)),
            temperature=temperature,
            seed=draw(st.integers(0, 99)) if temperature else 0,
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            **shape,
        )
        stop = frozenset(draw(st.sets(st.integers(0, 49), max_size=4)))
        cancelled = draw(st.one_of(st.none(), st.integers(0, 20)))
        events.append((draw(st.integers(0, 12)), Request(ids, params, stop), cancelled))
    return events


EVENTS = arrivals(), st.integers(1, 4), st.sampled_from([5, 2048])


@settings(max_examples=60, deadline=None)
@given(*EVENTS)
def test_a_reply_does_not_depend_on_who_stands_beside_it(events, slots, pass_tokens):
    assert_all_say_what_each_says_alone(events, slots, pass_tokens)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*EVENTS)
def test_nor_does_a_reply_whose_steps_run_ahead(recordings, events, slots, pass_tokens):
    assert_all_say_what_each_says_alone(events, slots, pass_tokens)


def assert_all_say_what_each_says_alone(events, slots: int, pass_tokens: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi2.inference.engine, "PASS_TOKENS", pass_tokens)
        patch.setattr(phi2.inference.slots, "WORTH_WAITING", 4)
        engine, said, now = Engine(MODEL, CHOICES, slots=slots), {}, 0
        left = list(events)
        while left or not engine.is_idle:
            for event in [event for event in left if event[0] <= now]:
                engine.add(event[1])
                left.remove(event)
            for _, request, cancelled in events:
                if cancelled == now:
                    engine.cancel(request)
            for token in engine.step():
                said.setdefault(token.request, []).append(token)
            now += 1
            assert now < 1000, "the engine does not come to an end"
    for _, request, cancelled in events:
        if cancelled is None:
            assert_same_reply(said[request], alone(request))


@torch.no_grad()
def test_a_reply_is_the_argmax_of_whole_passes(way):
    request = Request([5, 6, 7], GREEDY)
    ids, reply = [5, 6, 7], finish(Engine(MODEL, CHOICES), request)[request]
    for token in reply:
        logits = MODEL(torch.tensor([ids]))[0, -1]
        assert token.token_id == logits[:CHOICES].argmax()
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.token_id].item(), abs=1e-5)
        ids.append(token.token_id)


def test_prompts_are_read_side_by_side_without_pads(monkeypatch):
    counts = tokens_read(monkeypatch)
    finish(Engine(MODEL, CHOICES, slots=3), *(Request([i] * n, GREEDY) for i, n in ((1, 30), (2, 2), (3, 9))))
    assert counts == [41]


def test_a_long_prompt_is_read_in_parts_while_others_go_on(monkeypatch):
    monkeypatch.setattr(phi2.inference.engine, "PASS_TOKENS", 10)
    counts = tokens_read(monkeypatch)
    engine, short, long = Engine(MODEL, CHOICES, slots=2), Request([1, 2], GREEDY), Request([7] * 25, GREEDY)
    engine.add(short), engine.step(), engine.add(long)
    beside = [[token.request for token in engine.step()] for _ in range(3)]
    assert counts == [2, 10, 10, 5]
    assert beside == [[short], [short], [long, short]]


def test_a_common_beginning_is_read_once_also_by_those_who_come_together(way, monkeypatch):
    counts = tokens_read(monkeypatch)
    shots = list(range(40))
    requests = [Request([*shots, 3, i, i], GREEDY) for i in range(6)]
    said = finish(Engine(MODEL, CHOICES, slots=4), *requests)
    assert sum(counts) == 43 + 5 * 2
    assert [request.cached_tokens for request in requests] == [0] + [41] * 5
    for request in requests:
        assert_same_reply(said[request], alone(request))


def test_what_follows_a_reply_reads_only_what_is_new(way, monkeypatch):
    counts = tokens_read(monkeypatch)
    engine = Engine(MODEL, CHOICES, slots=2)
    first = Request([1, 2, 3, 4, 5], GREEDY)
    (tokens,) = finish(engine, first).values()
    turn = Request([*first.ids, *(t.token_id for t in tokens), 8, 9], GREEDY)
    said = finish(engine, turn)[turn]
    assert turn.cached_tokens == 5 + 7  # the last token was said and never read
    assert counts == [5, 3]
    assert_same_reply(said, alone(turn))


def test_what_was_read_with_other_weights_is_forgotten():
    model = tiny_model()
    engine, ids = Engine(model, CHOICES, slots=2), list(range(20))
    finish(engine, Request(ids, GREEDY))
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight.mul_(-1)
    engine.forget()
    again, fresh = Request(ids, GREEDY), Request(ids, GREEDY)
    assert_same_reply(finish(engine, again)[again], finish(Engine(model, CHOICES), fresh)[fresh])
    assert again.cached_tokens == 0


def test_every_request_is_answered_by_its_own_adapter(way, monkeypatch):
    model = tiny_model()
    for seed, name in enumerate(("one", "two")):
        attach(model, LoraConfig(r=4), seed, name)
        for parameter in adapter_state(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    shown = model.active_adapter
    requests = [Request([1, 2, 3, i], GREEDY, adapter=name) for i in range(2) for name in (None, "one", "two")]
    said = finish(Engine(model, CHOICES, slots=4), *requests)
    assert (model.active_adapter, model.computed_adapter) == (shown, shown) == ("two", "two")
    for request in requests:
        with computing(model, request.adapter), torch.no_grad():
            logits = model(torch.tensor([request.ids]))[0, -1]
        assert said[request][0].logprob == pytest.approx(
            logits.log_softmax(-1)[said[request][0].token_id].item(), abs=1e-5
        )
        assert_same_reply(said[request], alone(request, model))
    assert len({tuple(t.token_id for t in said[request]) for request in requests[:3]}) == 3


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0, seed=3, top_p=0.95, repetition_penalty=1.2)])
def test_a_reply_that_is_taken_up_in_the_middle_goes_on_as_it_did(way, how):
    whole = Request([5, 6, 7], SamplingParams(max_new_tokens=20, **how))
    tokens = [token.token_id for token in finish(Engine(MODEL, CHOICES), whole)[whole]]
    rest = Request([5, 6, 7, *tokens[:8]], SamplingParams(max_new_tokens=12, **how))
    assert [token.token_id for token in finish(Engine(MODEL, CHOICES), rest)[rest]] == tokens[8:]


def test_an_adapter_never_goes_on_from_what_another_has_read():
    model = tiny_model()
    attach(model, LoraConfig(r=4))
    engine, ids = Engine(model, CHOICES, slots=2), list(range(30))
    requests = [Request(ids, GREEDY, adapter=name) for name in ("default", None, None)]
    for request in requests:
        finish(engine, request)
    assert [request.cached_tokens for request in requests] == [0, 0, 29]


def test_few_rows_that_are_left_do_not_pay_for_those_that_have_gone():
    rows: list[int] = []
    hook = MODEL.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        short = [Request([i, i], SamplingParams(max_new_tokens=2)) for i in range(7)]
        finish(Engine(MODEL, CHOICES, slots=8), *short, Request([9, 9], SamplingParams(max_new_tokens=20)))
    finally:
        hook.remove()
    assert rows[1] == 8 and set(rows[2:]) == {1}


def test_the_likeliest_tokens_are_told_where_they_are_wanted(way):
    wanted, other = Request([1, 2, 3], GREEDY, top_logprobs=3), Request([4, 5], GREEDY)
    said = finish(Engine(MODEL, CHOICES, slots=2), wanted, other)
    with torch.no_grad():
        expected = MODEL(torch.tensor([[1, 2, 3]]))[0, -1].log_softmax(-1).topk(3)
    assert [token for token, _ in said[wanted][0].top] == expected.indices.tolist()
    assert [logprob for _, logprob in said[wanted][0].top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert all(token.top == () for token in said[other])


def test_the_context_ends_a_reply(way):
    (tokens,) = finish(Engine(MODEL, CHOICES), Request([1] * 60, SamplingParams(max_new_tokens=99))).values()
    assert (len(tokens), tokens[-1].finish_reason) == (4, "length")


def test_the_cache_stays_within_its_bound():
    config = Phi2Config()
    with torch.device("meta"):
        model = Phi2ForCausalLM(config).to(torch.float16)
    per_token = 320 * 1024  # bytes of Phi-2 in half precision
    for length in (64, 512, 2048):
        assert default_slots(model, length) == min(64, 4 * 2**30 // (per_token * length))


def test_an_engine_that_forgets_says_what_a_new_one_says_to_the_last_bit(way):
    def requests(first: int) -> list[Request]:
        prompts = [[first, 7, *range(1 + n % 5), *range(n % 3)] for n in range(9)]
        return [Request(ids, SamplingParams(max_new_tokens=3 + n % 4)) for n, ids in enumerate(prompts)]

    used, asked, again = Engine(MODEL, CHOICES, slots=4), requests(3), requests(3)
    finish(used, *requests(3), *requests(4)[:2])
    used.forget()
    expected, said = finish(Engine(MODEL, CHOICES, slots=4), *asked), finish(used, *again)
    for request, other in zip(asked, again, strict=True):
        assert [token[1:] for token in said[other]] == [token[1:] for token in expected[request]]


def test_an_engine_made_in_inference_mode_goes_on_outside(way):
    first, second = Request([1, 2, 3], GREEDY), Request([1, 2, 3], GREEDY)
    with torch.inference_mode():
        engine = Engine(MODEL, CHOICES, slots=1)
        finish(engine, first)
    assert_same_reply(finish(engine, second)[second], alone(second))
