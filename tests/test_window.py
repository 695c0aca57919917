"""The order of the data: whole epochs, any window at any time, and the same samples however a window is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi2.training.window import Windows

sizes = st.integers(1, 40)
batches = st.integers(1, 7)


def samples_of(window: list[list[int]]) -> list[int]:
    return [sample for batch in window for sample in batch]


def epoch_of(windows: Windows, epoch: int) -> list[int]:
    first = epoch * windows.per_epoch
    return [sample for step in range(first, first + windows.per_epoch) for sample in samples_of(windows.at(step))]


@given(sizes, batches, batches, st.integers(0, 5), st.booleans())
def test_every_epoch_sees_every_sample_once(samples, batch_size, accumulation, epoch, shuffle):
    windows = Windows(samples, batch_size, accumulation, seed=3, shuffle=shuffle)
    assert sorted(epoch_of(windows, epoch)) == list(range(samples))


@given(sizes, batches, batches)
def test_only_the_last_window_of_an_epoch_is_short_and_in_it_only_the_last_batch(samples, batch_size, accumulation):
    windows = Windows(samples, batch_size, accumulation, seed=0)
    *whole, last = (windows.at(step) for step in range(windows.per_epoch))
    assert all([len(batch) for batch in window] == [batch_size] * accumulation for window in whole)
    assert len(last) <= accumulation and all(len(batch) == batch_size for batch in last[:-1])
    assert 0 < len(last[-1]) <= batch_size


@given(sizes, st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]), st.integers(0, 30))
def test_a_window_holds_the_same_samples_however_it_is_split(samples, split, step):
    assert samples_of(Windows(samples, *split, seed=1).at(step)) == samples_of(Windows(samples, 6, 1, seed=1).at(step))


def test_a_window_depends_on_seed_and_step_alone_not_on_what_was_asked_before():
    in_order, at_random = (Windows(13, 2, 2, seed=5) for _ in range(2))
    expected = [in_order.at(step) for step in range(12)]
    assert [at_random.at(step) for step in reversed(range(12))] == expected[::-1]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [epoch_of(Windows(20, 4, 1, seed), epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != list(range(20)) for order in orders)


def test_without_shuffling_every_epoch_keeps_the_order_of_the_data():
    windows = Windows(5, 2, 1, seed=5, shuffle=False)
    assert [windows.at(step) for step in range(4)] == [[[0, 1]], [[2, 3]], [[4]], [[0, 1]]]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_samples_of_the_first_steps_are_those_of_their_windows(steps):
    windows = Windows(11, batch_size=2, accumulation=2, seed=3)
    expected = {index for step in range(steps) for batch in windows.at(step) for index in batch}
    assert windows.until(steps) == sorted(expected) and (len(expected) == 11) == (steps >= 3)
