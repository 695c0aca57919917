"""The order of the data: whole epochs, any window at any time, whatever was asked before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi2.training.window import Windows, windows_of

counts = st.integers(1, 40)
sizes = st.integers(1, 49)


def epoch_of(windows: Windows, epoch: int) -> list[int]:
    first = epoch * windows.per_epoch
    return [sample for step in range(first, first + windows.per_epoch) for sample in windows.at(step)]


@given(counts, sizes, st.integers(0, 5), st.booleans())
def test_every_epoch_sees_every_sample_once(samples, size, epoch, shuffle):
    assert sorted(epoch_of(Windows(samples, size, seed=3, shuffle=shuffle), epoch)) == list(range(samples))


@given(counts, sizes)
def test_only_the_last_window_of_an_epoch_is_short(samples, size):
    windows = Windows(samples, size, seed=0)
    *whole, last = (windows.at(step) for step in range(windows.per_epoch))
    assert all(len(window) == size for window in whole) and 0 < len(last) <= size


def test_a_window_depends_on_seed_and_step_alone_not_on_what_was_asked_before():
    in_order, at_random = (Windows(13, 4, seed=5) for _ in range(2))
    expected = [in_order.at(step) for step in range(12)]
    assert [at_random.at(step) for step in reversed(range(12))] == expected[::-1]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [epoch_of(Windows(20, 4, seed), epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != list(range(20)) for order in orders)


def test_without_shuffling_every_epoch_keeps_the_order_of_the_data():
    windows = Windows(5, 2, seed=5, shuffle=False)
    assert [windows.at(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_samples_of_the_first_steps_are_those_of_their_windows(steps):
    windows = Windows(11, 4, seed=3)
    expected = {index for step in range(steps) for index in windows.at(step)}
    assert windows.until(steps) == sorted(expected) and (len(expected) == 11) == (steps >= 3)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 6), (2, 3), (6, 1)])
def test_batch_size_and_accumulation_say_together_what_an_update_is(sft_config, batch_size, accumulation):
    config = sft_config(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert windows_of(config, 20).size == 6
