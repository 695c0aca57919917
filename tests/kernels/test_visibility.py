"""What is derived from one int per key: runs of queries, ranges of keys that blocks of queries see, and their duals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2_kernels import visibility as file
from phi2_kernels.visibility import WORTHWHILE_GAP, Visibility, calls_of, runs_of


def visibility(T: int, S: int, until: list[int]) -> Visibility:
    """Of one row."""
    return Visibility(T, S, torch.tensor([until], dtype=torch.int32), torch.device("cpu"))


@st.composite
def untils(draw, longest: int = 120) -> list[int]:
    """Rows of documents, groups of answers to one prompt, and pads."""
    until: list[int] = []
    for kind in draw(st.lists(st.sampled_from(["document", "group", "pad"]), min_size=1, max_size=5)):
        start = len(until)
        n = draw(st.integers(1, longest))
        if kind == "pad":
            until += [0] * n
        elif kind == "document":
            until += [start + n] * n
        else:
            answers = draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
            until += [start + n + sum(answers)] * n
            for answer in answers:
                until += [len(until) + answer] * answer
    return until


@pytest.mark.parametrize("column", [13, 41])
def test_the_drawing_shows_who_sees_whom(column):
    _, until, *rows = (
        line[column : column + 9].split() for line in file.__doc__.split("\n    key ")[1].splitlines()[:7]
    )
    mask = visibility(5, 5, [int(end) for end in until]).mask
    assert [[mark == "x" for mark in row] for row in rows] == mask[0, 0].tolist()


def seen_by_blocks(until: list[int], T: int, block: int) -> list[torch.Tensor]:
    """For each block of queries (n, S) which key each of its queries sees."""
    S = len(until)
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    return list(((j <= i) & (i < torch.tensor(until))).split(block))


@given(untils(), st.sampled_from([16, 32, 128]), st.data())
@settings(deadline=None)
def test_key_ranges_cover_exactly_what_a_block_may_see(until, block, data):
    S = len(until)
    T = data.draw(st.integers(1, S))
    ranges = visibility(T, S, until).key_ranges(block)[0]
    for seen, row in zip(seen_by_blocks(until, T, block), ranges.tolist(), strict=True):
        begin1, full1, end1, begin2, full2, end2 = row
        assert 0 <= begin1 <= full1 <= end1 <= begin2 <= full2 <= end2 <= S
        inside = torch.zeros(S, dtype=torch.bool)
        inside[begin1:end1] = inside[begin2:end2] = True
        some = seen.any(dim=0)
        assert not (some & ~inside).any()
        assert seen[:, begin1:full1].all() and seen[:, begin2:full2].all()
        holes = [run for run in "".join("s" if s else "h" for s in some.tolist()).strip("h").split("s") if run]
        widest = max(map(len, holes), default=0)
        skipped = widest if widest >= WORTHWHILE_GAP else 0
        assert inside.sum() == (some.nonzero().max() - some.nonzero().min() + 1 - skipped if some.any() else 0)


@given(untils(), st.sampled_from([16, 32, 128]))
@settings(deadline=None)
def test_query_ends_are_the_bounds_of_a_block_of_keys(until, block):
    ends = visibility(len(until), len(until), until).query_ends(block)[0].tolist()
    assert ends == [
        [min(until[start : start + block]), max(until[start : start + block])] for start in range(0, len(until), block)
    ]


def test_key_ranges_made_block_by_block_are_those_made_at_once(monkeypatch):
    layout = [70] * 20 + [29] * 9 + [60] * 31 + [70] * 10
    at_once = visibility(70, 70, layout).key_ranges(16)
    monkeypatch.setattr("phi2_kernels.visibility.CELLS_AT_ONCE", 1)
    assert torch.equal(visibility(70, 70, layout).key_ranges(16), at_once)


def test_tables_of_no_rows_are_empty():
    nothing = Visibility(70, 70, torch.zeros((0, 70), dtype=torch.int32), torch.device("cpu"))
    assert nothing.key_ranges(32).shape == (0, 3, 6) and nothing.query_ends(32).shape == (0, 3, 2)


def test_there_are_no_more_queries_than_keys():
    with pytest.raises(ValueError, match="queries are the last of the keys: at most 5, got 6"):
        Visibility(6, 5, None, torch.device("cpu"))


def test_skipping_skips_nearly_all_that_a_mask_would_hide():
    M, N = 128, 64
    until = [1500] * 300 + [1100] * 800 + [1500] * 400 + [2048] * 548
    visited = causal = useful = 0
    for block, row in enumerate(visibility(2048, 2048, until).key_ranges(M)[0].tolist()):
        begin1, _, end1, begin2, _, end2 = row
        visited += -(-(end1 - begin1) // N) - (-(end2 - begin2) // N)
        causal += (block + 1) * M // N
        seen = seen_by_blocks(until, 2048, M)[block].any(dim=0)
        useful += sum(bool(tile.any()) for tile in seen.split(N))
    assert useful <= visited <= 1.1 * useful and visited < 0.6 * causal


@given(untils(20))
def test_runs_see_exactly_what_the_rule_says(until):
    T = len(until)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for run in runs_of(until):
        for start, end in run.keys[:-1]:
            seen[run.start : run.end, start:end] = True
        own = run.keys[-1][0]
        seen[run.start : run.end, own : run.end] = torch.ones(T, T).bool().tril()[run.start : run.end, own : run.end]
    i, j = torch.arange(T)[:, None], torch.arange(T)
    assert torch.equal(seen, (j <= i) & (i < torch.tensor(until)))


@given(untils(20))
@settings(deadline=None)
def test_calls_see_exactly_what_the_rule_says(until):
    T = len(until)
    row = visibility(T, T, until)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for call in row.calls[0]:
        key = torch.cat([torch.arange(a, b) for a, b in call.keys])
        mask = row.mask_of(0, call, torch.float32) == 0
        if call.is_causal:
            assert torch.equal(mask, torch.ones_like(mask).tril())
        seen[call.start : call.end, key] = mask
    i, j = torch.arange(T)[:, None], torch.arange(T)
    assert torch.equal(seen, (j <= i) & (i < torch.tensor(until)))


def test_small_leaves_share_a_call_and_long_answers_do_not():
    leaves = [420] * 300 + [end for end in range(315, 421, 15) for _ in range(15)]
    first, others = (0, 315, [(0, 315)], True), (315, 420, [(0, 300), (315, 420)], False)
    assert calls_of(runs_of(leaves)) == [first, others]
    answers = [1200] * 600 + [900] * 300 + [1200] * 300
    assert calls_of(runs_of(answers)) == [(0, 900, [(0, 900)], True), (900, 1200, [(0, 600), (900, 1200)], False)]


def test_a_prompt_is_computed_together_with_its_first_answer():
    prompt, chosen, rejected = 5, 3, 4
    runs = runs_of([12] * prompt + [8] * chosen + [12] * rejected)
    assert runs == [(0, 8, [(0, 8)]), (8, 12, [(0, 5), (8, 12)])]


def test_until_must_speak_of_every_key():
    with pytest.raises(ValueError, match="each of the 5 keys, got 4"):
        Visibility(5, 5, torch.zeros(1, 4).int(), torch.device("cpu"))
