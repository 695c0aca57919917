"""From logits to a token: settings that are refused, what can be drawn, and how often."""

from __future__ import annotations

import pytest
import torch

from phi2.inference.config import SamplingParams
from phi2.inference.sampling import Sampler, choose, draw, process_logits

CPU = torch.device("cpu")


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


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
    assert choose(logits, [Sampler(SamplingParams(), [0], 3, CPU)] * 2).tolist() == [1, 0]


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 20_000
    drawn = draw(probs.log().expand(rows, 5), generators(rows))
    frequencies = drawn.bincount(minlength=5) / rows
    assert frequencies[4] == 0
    torch.testing.assert_close(frequencies, probs, rtol=0, atol=4 * (0.25 / rows) ** 0.5)


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, generators(3, seed=7))
    alone = [draw(logits[row : row + 1], generators(1, seed=7 + row)).item() for row in range(3)]
    assert together.tolist() == alone


MIXED = [
    dict(),
    dict(temperature=1.0, seed=3),
    dict(repetition_penalty=2.0),
    dict(temperature=1.0, seed=4, repetition_penalty=2.0),
    dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, seed=5),
]


def test_rows_of_any_settings_choose_together_what_each_chooses_alone():
    logits = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(0))

    def samplers() -> list[Sampler]:
        return [Sampler(SamplingParams(**given), [1], 50, CPU) for given in MIXED]

    rows, alone = samplers(), samplers()
    for _ in range(6):  # what was said before counts too
        expected = [choose(logits[row : row + 1], [alone[row]]).item() for row in range(len(MIXED))]
        assert choose(logits, rows).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_ids_past_the_choices_are_never_taken(temperature):
    logits = torch.zeros(64, 20)
    logits[:, 12:] = 1e4
    rows = [Sampler(SamplingParams(temperature=temperature).of_row(row), [0], 12, CPU) for row in range(64)]
    assert max(choose(logits, rows).max().item() for _ in range(20)) < 12


def test_the_repetition_penalty_counts_prompt_and_reply():
    logits = torch.tensor([[1.0, 1.1, 0.9, 0.8]])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [1], 4, CPU)
    assert [choose(logits, [sampler]).item() for _ in range(3)] == [0, 2, 3]


def test_top_p_keeps_no_more_than_it_needs_to_reach_p():
    kept = process_logits(torch.zeros(1, 4), SamplingParams(temperature=1.0, top_p=0.5)).isfinite()
    assert kept.sum() == 2


def test_the_coldest_temperature_stays_finite():
    scores = process_logits(torch.tensor([[60000.0, -60000.0]]), SamplingParams(temperature=1e-4))
    assert scores.softmax(-1).tolist() == [[1.0, 0.0]]
