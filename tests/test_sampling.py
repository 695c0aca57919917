"""From logits to a token: settings that are refused, what can be drawn, and how often."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import phi2.inference.sampling
from phi2.inference.config import SamplingParams
from phi2.inference.rows import Rows
from phi2.inference.sampling import Settings, Stages, choose, draw, gumbel_noise, pack, process_logits, told

CPU = torch.device("cpu")
EVERY = Stages(draws=True, penalty=True, top_k=64, top_p=True, min_p=True)


def of(*params: SamplingParams) -> tuple[Settings, Stages]:
    return Settings.unpack(torch.stack([pack(p) for p in params])), Stages.of_all(map(Stages.of, params))


def column(*numbers: int) -> Tensor:
    return torch.tensor(numbers)[:, None]


def rows_of(choices: int, *params: SamplingParams, prompt: tuple[int, ...] = (0,)) -> Rows:
    rows = Rows(len(params), 1000, choices, CPU)
    for slot, own in enumerate(params):
        rows.occupy(slot, own, prompt)
    return rows


def assert_as_likely(drawn: Tensor, probs: Tensor) -> None:
    """Pearson's chi-square, five standard deviations wide."""
    expected = probs[probs > 0] * drawn.numel()
    assert expected.min() > 5, "too few draws for the test"
    counts = drawn.flatten().bincount(minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    degrees = len(expected) - 1
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, got 2.5"),
        ({"temperature": -1}, r"temperature must be 0 \(greedy\) or at least 0.0001, got -1"),
        ({"temperature": 1e-9}, r"temperature must be 0 \(greedy\) or at least 0.0001, got 1e-09"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": True}, "temperature .* got True"),
        ({"top_k": -5}, r"top_k must be 0 \(off\) or a positive whole number, got -5"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"min_p": "0.1"}, r"min_p must be in \[0, 1\], got '0.1'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number, got 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty .* got inf"),
        ({"seed": -1}, "seed .* got -1"),
        ({"stop": ["a", ""]}, "stop must be strings of at least one character, got ''"),
        ({"stop": [3]}, "stop .* got 3"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_one_stop_string_is_not_taken_for_its_characters():
    assert SamplingParams(stop="END").stop == ("END",)


def test_temperature_0_takes_the_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.9]])
    assert choose(logits, *of(*[SamplingParams()] * 2), places=torch.tensor([1, 1])).tolist() == [1, 0]


def test_temperature_0_takes_the_largest_logit_beside_a_row_that_draws():
    logits = torch.tensor([[0.0, 1e-7, -1e-7]]).expand(50, 3)  # closer than float32 probabilities can tell
    settings, stages = of(*[SamplingParams()] * 49, SamplingParams(temperature=1.0))
    assert set(choose(logits, settings, stages, torch.arange(50))[:49].tolist()) == {1}


# ---- draws ----


def split_mix(state: int) -> int:
    """In whole numbers without end, as the paper has it."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_hash_is_split_mix_64():
    golden = 0x9E3779B97F4A7C15
    assert split_mix(golden) == 0xE220A8397B1DCDAF  # what every implementation says first, seeded with 0
    seed, place = 2**63 - 1, 2047
    noise = gumbel_noise(column(seed), column(place), 40)[0]
    state = split_mix(split_mix(seed + golden) + place * golden)
    for token, value in enumerate(noise.tolist()):
        u = ((split_mix(state + (token + 1) * golden) >> 8) + 0.5) / 2**56
        assert value == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-5)


@pytest.mark.parametrize("bits", [0, -1, -(2**63), 2**63 - 1])
def test_no_hash_makes_noise_that_is_not_finite(bits, monkeypatch):
    monkeypatch.setattr(phi2.inference.sampling, "_mix_", lambda z: torch.full_like(z, bits))
    assert gumbel_noise(column(0), column(0), 3).isfinite().all()


def test_noise_is_even_over_seeds_places_and_ids():
    for noise in (
        gumbel_noise(torch.arange(64)[:, None], column(5), 1000),
        gumbel_noise(column(5), torch.arange(64)[:, None], 1000),
    ):
        u = (-(-noise.double()).exp()).exp()
        assert_as_likely((u * 128).long(), torch.full((128,), 1 / 128))


def test_neighbouring_seeds_places_and_ids_have_nothing_to_do_with_each_other():
    seeds, places = torch.arange(80).repeat_interleave(80)[:, None], torch.arange(80).repeat(80)[:, None]
    u = (-(-gumbel_noise(seeds, places, 80).double()).exp()).exp().view(80, 80, 80) - 0.5
    pairs = {
        "seeds": (u[1:], u[:-1]), "places": (u[:, 1:], u[:, :-1]), "ids": (u[..., 1:], u[..., :-1]),
        "a seed and a place": (u[1:, :-1], u[:-1, 1:]), "a place and an id": (u[:, 1:, :-1], u[:, :-1, 1:]),
    }  # fmt: skip
    for name, (one, other) in pairs.items():
        correlation = (one * other).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(one.numel()), name


PROBS = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.1])


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (dict(), [0, 1, 2, 4]),
        (dict(top_k=2), [0, 1]),
        (dict(top_p=0.8), [0, 1, 2]),
        (dict(min_p=0.25), [0, 1, 2]),
        (dict(top_k=4, top_p=0.95, min_p=0.3), [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("over", ["seeds", "places"])
def test_draws_follow_the_probabilities_of_what_is_kept(truncation, kept, over):
    N = 20_000
    rows = torch.stack([pack(SamplingParams(temperature=1.0, seed=7, **truncation))]).repeat(N, 1)
    if over == "seeds":
        rows[:, 0] = torch.arange(N)
    places = torch.arange(N) if over == "places" else torch.full((N,), 3)
    drawn = choose(PROBS.log().expand(N, 5), Settings.unpack(rows), of(SamplingParams(1, 1.0, **truncation))[1], places)
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    assert_as_likely(drawn, expected)


def test_two_rows_of_neighbouring_seeds_draw_independently():
    settings, _ = of(*(SamplingParams(temperature=1.0, seed=seed) for seed in range(20_000)))
    drawn = draw(PROBS.log().expand(20_000, 5), settings, torch.zeros(20_000)).view(-1, 2)
    assert_as_likely(drawn[:, 0] * 5 + drawn[:, 1], torch.outer(PROBS, PROBS).flatten())


def test_equals_are_drawn_alike_at_the_coldest_temperature():
    settings, stages = of(*(SamplingParams(temperature=1e-4, seed=seed) for seed in range(1000)))
    drawn = choose(torch.tensor([[60000.0, 0.0, 60000.0]]).expand(1000, 3), settings, stages, torch.zeros(1000))
    assert_as_likely(drawn, torch.tensor([0.5, 0.0, 0.5]))


# ---- rows side by side ----

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(repetition_penalty=2.0),
    SamplingParams(temperature=1.0, seed=4, repetition_penalty=2.0),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, seed=5),
    SamplingParams(temperature=1.3, top_k=10**30, seed=2**63 - 1),
    SamplingParams(temperature=0.9, top_p=0.0, seed=6),
]


HOW = {
    "all stages for all": lambda rows, logits, every, places: rows.choose(logits, every, rows.stages(every), places),
    "apart": lambda rows, logits, every, places: rows.choose_apart(logits, every, places),
}


@pytest.mark.parametrize("choose_mixed", HOW.values(), ids=HOW)
def test_rows_of_any_settings_choose_together_what_each_chooses_alone(choose_mixed):
    rows, every = rows_of(50, *MIXED, prompt=(1,)), list(range(len(MIXED)))
    alone = [rows_of(50, params, prompt=(1,)) for params in MIXED]
    for place in range(1, 7):  # what was said before counts too
        logits = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(place))
        places = torch.full((len(MIXED),), place)
        expected = [
            own.choose(logits[slot : slot + 1], [0], own.stages([0]), places[:1]).item()
            for slot, own in enumerate(alone)
        ]
        assert choose_mixed(rows, logits, every, places).tolist() == expected


@pytest.mark.parametrize("params", MIXED)
def test_the_stages_of_others_change_no_bit_of_a_row(params):
    logits = 40 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))  # most probabilities round to zero
    seen = logits > 10
    settings, own = of(*[params] * 3)
    together = process_logits(logits, settings, EVERY, seen)
    assert torch.equal(together, process_logits(logits, settings, own, seen))


def test_few_values_of_the_largest_top_k_are_told_apart():
    ks = {of(SamplingParams(temperature=1.0, top_k=k), MIXED[1])[1].top_k for k in range(33, 65)}
    assert ks == {64}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_ids_past_the_choices_are_never_taken(temperature):
    logits = torch.zeros(64, 20)
    logits[:, 12:] = 1e4
    params = [SamplingParams(temperature=temperature).of_row(row) for row in range(64)]
    rows = rows_of(12, *params)
    stages = rows.stages(range(64))
    assert max(rows.choose(logits, slice(64), stages, torch.full((64,), i)).max().item() for i in range(20)) < 12


def test_the_repetition_penalty_counts_prompt_and_reply():
    params = SamplingParams(repetition_penalty=2.0)
    rows, logits = rows_of(4, params, prompt=(1, 7)), torch.tensor([[1.0, 1.1, 0.9, 0.8]])  # 7 is no choice
    said = [rows.choose(logits, [0], Stages.of(params), torch.tensor([place])).item() for place in range(3)]
    assert said == [0, 2, 3]


def test_top_p_keeps_no_more_than_it_needs_to_reach_p():
    kept = process_logits(torch.zeros(1, 4), *of(SamplingParams(temperature=1.0, top_p=0.5))).isfinite()
    assert kept.sum() == 2


def test_the_coldest_temperature_stays_finite():
    scores = process_logits(torch.tensor([[60000.0, -60000.0]]), *of(SamplingParams(temperature=1e-4)))
    assert scores.softmax(-1).tolist() == [[1.0, 0.0]]


def test_what_is_told_is_the_models_own_log_probability():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)[[0, 1, 2], [4, 0, 49]]
    numbers = told(logits, torch.tensor([4, 0, 49]))
    assert numbers[:, 0].tolist() == [4, 0, 49] and numbers[:, 2].tolist() == [1, 1, 1]
    torch.testing.assert_close(numbers[:, 1].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_told(value):
    logits = torch.zeros(2, 50)
    logits[1, 33] = value
    assert told(logits, torch.tensor([0, 0]))[:, 2].tolist() == [1, 0]
