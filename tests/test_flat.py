"""Rows in flat arrays are the rows that were put in, and what is read off the arrays is what the rows say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data import store
from phi2.data.audit import FLAGS, Audit
from phi2.data.encoded import EncodedPreference, EncodedSequence
from phi2.data.flat import Joined, digests, flat_rows, largest, lengths, of_each_layout
from phi2.data.records import Origin, RowError
from phi2.training.scoring import column_gaps

ORIGINS = st.builds(Origin, st.sampled_from(["a.jsonl", "b.jsonl"]), st.integers(1, 10**12))
FLAG_SETS = st.frozensets(st.sampled_from([*FLAGS]), max_size=2)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COLUMNS = st.dictionaries(st.sampled_from("wxyz"), NUMBERS | st.text(max_size=3), max_size=3)


def ids(least: int = 0) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(0, 2**17), min_size=least, max_size=9).map(lambda each: np.array(each, dtype=np.int32))


@st.composite
def sequences(draw) -> EncodedSequence:
    tokens = draw(ids(1))
    mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return EncodedSequence(tokens, np.array(mask, dtype=bool), draw(ORIGINS), draw(FLAG_SETS))


@st.composite
def preferences(draw) -> EncodedPreference:
    answers = draw(st.lists(ids(), min_size=1, max_size=4))
    scores = tuple(draw(NUMBERS) for _ in answers)
    gold = len(answers) > 2 and draw(st.booleans())
    return EncodedPreference(draw(ids(1)), tuple(answers), scores, draw(ORIGINS), draw(COLUMNS), draw(FLAG_SETS), gold)


ROWS = {"supervised": st.lists(sequences(), max_size=6), "preference": st.lists(preferences(), max_size=6)}
ANY_ROWS = st.sampled_from([*ROWS]).flatmap(lambda kind: st.tuples(st.just(kind), ROWS[kind]))


@settings(deadline=None)
@given(ANY_ROWS)
def test_rows_come_out_as_they_were_put_in(plain, given_rows):
    kind, rows = given_rows
    flat = flat_rows(rows, kind)
    assert [plain(row) for row in flat] == [plain(row) for row in rows] and len(flat) == len(rows)
    assert [plain(row) for row in flat[1:4:2]] == [plain(row) for row in rows[1:4:2]]
    if rows:
        assert plain(flat[-1]) == plain(rows[-1])


@settings(deadline=None)
@given(ANY_ROWS)
def test_what_all_rows_say_together_is_read_off_the_arrays(plain, given_rows):
    kind, rows = given_rows
    flat = flat_rows(rows, kind)
    assert lengths(flat) == lengths(rows) == [row.length for row in rows]
    assert digests(flat) == digests(rows)
    if rows:
        for by in ("length", "tokens"):
            assert plain(largest(flat, by)) == plain(largest(rows, by)) == plain(largest(Joined([], flat, rows), by))


@settings(deadline=None)
@given(ROWS["preference"])
def test_what_is_not_a_number_in_every_row_is_told_of_the_first_row_that_says_so(rows):
    assert column_gaps(of_each_layout(flat_rows(rows, "preference"))) == column_gaps(rows)


@settings(deadline=None)
@given(ROWS["preference"].filter(bool), st.data())
def test_some_rows_in_another_order(plain, rows, data):
    places = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    taken = flat_rows(rows, "preference").take(places)
    assert [plain(row) for row in taken] == [plain(rows[i]) for i in places]
    assert lengths(taken) == [rows[i].length for i in places]
    assert digests(taken) == digests([rows[i] for i in places])


@settings(deadline=None, max_examples=50)
@given(ANY_ROWS)
def test_an_entry_holds_the_rows_that_were_kept(plain, tmp_path_factory, given_rows):
    kind, rows = given_rows
    path = tmp_path_factory.getbasetemp() / "entry.arrow"
    audit = Audit(kept=len(rows), tokens=3)
    audit.drop(RowError(Origin("f", 1), "rule", "why"))
    for row in rows:
        audit.keep(row.length, row.tokens, row.target_tokens, row.flags)
    kept = store.Kept(flat_rows(rows, kind), audit)
    store._write(path, kept)
    found = store._read(path)
    assert [plain(row) for row in found.rows] == [plain(row) for row in rows]
    assert found.audit == audit and digests(found.rows) == digests(rows)


def test_rows_joined_are_one_sequence():
    rows = [EncodedSequence(np.arange(n, dtype=np.int32), np.ones(n, dtype=bool), Origin("f", n)) for n in range(1, 6)]
    joined = Joined(flat_rows(rows[:2], "supervised"), [], rows[2:])
    assert [row.length for row in joined] == [joined[i].length for i in range(5)] == [1, 2, 3, 4, 5]
    assert [row.length for row in joined[-2:]] == [4, 5] and joined[-1].length == 5
    with pytest.raises(IndexError):
        joined[5]


def test_digests_tell_answers_and_scores_apart():
    def row(*answers: int, scores=(1.0, 0.0)) -> EncodedPreference:
        parts = tuple(np.array([answer], dtype=np.int32) for answer in answers)
        return EncodedPreference(np.zeros(1, dtype=np.int32), parts, scores, Origin("f", 1), {})

    told = {digests([each]) for each in (row(1, 2), row(1, 3), row(2, 1), row(1, 2, scores=(2.0, 0.0)))}
    assert len(told) == 4
