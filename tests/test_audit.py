"""The audit: counts that add up, whichever way the rows were divided."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi2.data.audit import FLAGS, Audit
from phi2.data.columns import COLUMN_STATUSES, KEPT, NOT_READ
from phi2.data.records import Origin, RowError

rules = st.sampled_from(["too-long", "bad-label", "no-prompt"])
kept = st.tuples(st.integers(1, 2000), st.frozensets(st.sampled_from(sorted(FLAGS))))
column_status = st.dictionaries(st.sampled_from(["id", "images"]), st.sampled_from(COLUMN_STATUSES))
events = st.lists(st.one_of(rules, kept))


def audit_of(rows, start: int = 1) -> Audit:
    audit = Audit()
    for number, row in enumerate(rows, start):
        if isinstance(row, str):
            audit.drop(RowError(Origin("a.jsonl", number), row, "it is so"))
        else:
            length, flags = row
            audit.keep(length=length, tokens=length, target_tokens=length // 2, flags=flags)
    return audit


@given(events, events)
def test_merged_audits_are_the_audit_of_all_rows(first, second):
    merged = audit_of(first)
    merged.merge(audit_of(second, start=len(first) + 1))
    assert merged == audit_of([*first, *second])


@given(st.lists(column_status), st.lists(column_status))
def test_merged_counts_of_columns_are_those_of_all_rows(first, second):
    one, other, both = Audit(), Audit(), Audit()
    for audit, rows in ((one, first), (other, second), (both, first + second)):
        for row in rows:
            audit.count_columns(row)
    one.merge(other)
    assert one == both


@given(events)
def test_every_row_is_either_kept_or_dropped(rows):
    audit = audit_of(rows)
    dropped = sum(isinstance(row, str) for row in rows)
    assert (audit.rows, audit.kept) == (len(rows), len(rows) - dropped)


def test_merge_leaves_the_other_audit_as_it_was():
    other, total = audit_of(["too-long"]), Audit()
    total.merge(other)
    total.merge(other)
    assert other == audit_of(["too-long"])


def test_the_first_three_rows_of_a_rule_are_named():
    dropped = audit_of(["too-long"] * 5).dropped["too-long"]
    assert (dropped.rows, dropped.first) == (5, ["a.jsonl row 1", "a.jsonl row 2", "a.jsonl row 3"])
    assert dropped.reason == "a.jsonl row 1: it is so [too-long]"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (range(1, 101), {"min": 1, "median": 50, "p95": 95, "max": 100}),
        ([7], {"min": 7, "median": 7, "p95": 7, "max": 7}),
        ([], {}),
    ],
)
def test_percentiles_are_lengths_that_occur(lengths, expected):
    assert audit_of([(length, ()) for length in lengths]).percentiles() == expected


def test_dict_is_json_and_lists_flags_that_no_row_carries():
    values = json.loads(json.dumps(audit_of([(10, {"truncated"}), "too-long"]).to_dict()))
    assert (values["rows"], values["kept"], values["truncated"], values["eos_lost"]) == (2, 1, 1, 0)
    assert values["dropped"]["too-long"]["rows"] == 1
    assert (values["tokens"], values["target_tokens"]) == (10, 5)


def test_table_is_aligned_and_leaves_out_what_did_not_happen():
    table = audit_of([(1000, {"eos_added"}), (500, ()), "too-long", "too-long"]).table()
    assert table.splitlines() == [
        "rows                  4",
        "kept                  2   50.0%",
        "dropped too-long      2   50.0%  first a.jsonl row 3: it is so [too-long]",
        f"eos_added             1   50.0%  {FLAGS['eos_added']}",
        "tokens            1,500",
        "target_tokens       750   50.0%",
        "length min          500",
        "length median       500",
        "length p95        1,000",
        "length max        1,000",
    ]


def test_columns_are_told_in_a_line_for_each_status():
    audit = audit_of([(10, ())])
    audit.count_columns({"id": NOT_READ, "margin": KEPT, "messages.name": NOT_READ})
    audit.count_columns({"id": NOT_READ})
    assert audit.table().splitlines()[-2:] == [
        "columns not read: id 2, messages.name 1",
        "columns kept for the loss and reports: margin 1",
    ]
    assert json.loads(json.dumps(audit.to_dict()))["columns"] == {
        "not read": {"id": 2, "messages.name": 1},
        "kept for the loss and reports": {"margin": 1},
        "ignored as asked": {},
    }


def test_table_of_no_rows_has_no_shares():
    assert "%" not in Audit().table()
