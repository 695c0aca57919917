"""Which rows a mixture of sources gives, and in what order: those that the `datasets` library would pick."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data.records import Origin
from phi2.data.sources import DataSpec, Subsample, load_records, split_records

TEXTS = ["one", "zwei", "four"]
ROWS = [{"text": text} for text in TEXTS]


def completions(data) -> list[str]:
    return [record.completion for record in load_records(data, "supervised").records]


def numbered(count: int, **columns) -> list[dict]:
    return [{"text": str(i), **{name: of(i) for name, of in columns.items()}} for i in range(count)]


def test_sources_between_commas_come_one_after_the_other(write_rows):
    a, b = (write_rows([{"text": name}]) for name in "ab")
    assert completions(f"{b}, {a}") == ["b", "a"]


def test_a_list_mixes_paths_specs_fields_and_rows(write_rows, tmp_path):
    path = Path(write_rows(numbered(3))).rename(tmp_path / "a,b.jsonl")
    mixture = [path, DataSpec(str(path), rows=1), {"source": str(path), "rows": 2}, [{"text": "own"}]]
    assert completions(mixture) == ["0", "1", "2", "0", "0", "1", "own"]


def test_rows_in_memory_are_named_by_their_number():
    (record,) = load_records([{"text": "a", "source": "a column, not a DataSpec"}], "supervised").records
    assert record.origin == Origin("data", 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one source"),
        ("a.jsonl,,b.jsonl", "no such file|must have a name"),
        (3, "got int"),
        ({"source": "x", "max_token": 4}, "max_token.*fields are source, split, max_tokens"),
        ({"source": "x", "subsample": {"part": 0.5}}, "part"),
        ({"source": "x", "rows": 0}, "rows must be at least 1, got 0"),
        ({"source": "x", "subsample": {"fraction": 67}}, "at most 1, got 67"),
        ({"source": ROWS, "rows": 4}, "rows must be at most 3"),
        ({"source": ROWS, "max_tokens": 4}, r"needs columns of numbers phi_token_count, got \['text'\]"),
        (
            [{"title": "a"}, {"title": "b"}],
            "no usable row among 2: unknown-format 2x, first data row 1: columns 'title'",
        ),
    ],
)
def test_a_wrong_mixture_says_what_is_wrong(data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_records(data, "supervised")
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind must be one of supervised, preference, got 'sft'"):
        load_records(ROWS, "sft")


def test_bad_rows_are_dropped_and_counted_with_the_first_messages():
    loaded = load_records([{"text": "a"}, {"text": ""}, {"text": 3}, {"text": " "}], "supervised")
    assert [record.completion for record in loaded.records] == ["a"]
    assert {rule: some.rows for rule, some in loaded.dropped.dropped.items()} == {"empty-answer": 2, "not-text": 1}
    assert loaded.dropped.dropped["empty-answer"].first == ["data row 2", "data row 4"]


def test_max_tokens_keeps_rows_below_it():
    rows = numbered(6, phi_token_count=lambda i: i)
    assert completions({"source": rows, "max_tokens": 4}) == ["0", "1", "2", "3"]


def test_max_tokens_of_pairs_bounds_prompt_and_either_answer():
    lengths = [(2, 1, 1), (2, 2, 1), (2, 1, 2)]
    rows = [
        {"prompt": "p", "chosen": f"{i}", "rejected": "b", "prompt_length": p, "chosen_length": c, "rejected_length": r}
        for i, (p, c, r) in enumerate(lengths)
    ]
    records = load_records({"source": rows, "max_tokens": 4}, "preference").records
    assert [record.answers[0] for record in records] == ["0"]


def test_without_a_shuffle_reading_stops_at_the_last_row_taken():
    def rows():
        yield from numbered(3)
        raise AssertionError("read past the rows that were asked for")

    assert completions(DataSpec(rows(), rows=3)) == ["0", "1", "2"]


def test_a_bad_row_does_not_change_which_others_a_seed_picks():
    good = numbered(50)
    bad = [{"text": ""} if i == 20 else row for i, row in enumerate(good)]
    picked = [completions({"source": rows, "shuffle_seed": 3, "rows": 40}) for rows in (good, bad)]
    assert [text for text in picked[0] if text != "20"] == picked[1]


def test_subsample_draws_once_for_each_matching_row_in_order():
    rows = numbered(200, source_dataset=lambda i: "ultrafeedback" if i % 3 else "orca")
    draws = random.Random(42)
    expected = [row["text"] for i, row in enumerate(rows) if i % 3 == 0 or draws.random() <= 0.67]
    thinned = DataSpec(rows, subsample=Subsample(0.67, "ultrafeedback"))
    assert completions(thinned) == expected


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.999, -0.1, 1.5])
def test_a_split_that_leaves_a_part_empty_is_an_error(fraction):
    with pytest.raises(ValueError, match=f"test_fraction .* got {fraction}"):
        split_records(["a", "b"], fraction, seed=0)


# --- the same rows as `datasets`


def test_the_supervised_recipe_picks_the_rows_that_datasets_picks():
    datasets = pytest.importorskip("datasets")
    rows = numbered(1000, phi_token_count=lambda i: i * 7 % 900)
    theirs = datasets.Dataset.from_list(rows).filter(lambda row: row["phi_token_count"] < 448)
    theirs = theirs.shuffle(seed=42).select(range(128)).train_test_split(test_size=0.01, seed=42)
    loaded = load_records({"source": rows, "max_tokens": 448, "shuffle_seed": 42, "rows": 128}, "supervised")
    train, test = split_records(loaded.records, 0.01, seed=42)
    assert [r.completion for r in train] == theirs["train"]["text"][:]
    assert [r.completion for r in test] == theirs["test"]["text"][:]


def test_the_preference_recipe_picks_the_rows_that_datasets_picks():
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": "p", "chosen": f"{i}", "rejected": "b"}
        | {"prompt_length": i % 500, "chosen_length": i % 7, "rejected_length": i % 11}
        | {"source_dataset": ("ultrafeedback", "orca", "math")[i % 3]}
        for i in range(700)
    ]
    theirs = datasets.Dataset.from_list(rows).filter(
        lambda r: max(r["prompt_length"] + r["chosen_length"], r["prompt_length"] + r["rejected_length"]) < 448
    )
    random.seed(42)
    theirs = theirs.filter(lambda r: r["source_dataset"] != "ultrafeedback" or random.random() <= 0.67)
    ours = {"source": rows, "max_tokens": 448, "subsample": {"fraction": 0.67, "source_dataset": "ultrafeedback"}}
    assert [record.answers[0] for record in load_records(ours, "preference").records] == theirs["chosen"][:]


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_split_equals_train_test_split(count, fraction, seed):
    datasets = pytest.importorskip("datasets")
    rows = list(range(count))
    if -(-fraction * count // 1) >= count:
        return
    theirs = datasets.Dataset.from_dict({"row": rows}).train_test_split(test_size=fraction, seed=seed)
    assert split_records(rows, fraction, seed) == (theirs["train"]["row"][:], theirs["test"]["row"][:])


def test_a_datasets_dataset_is_rows():
    datasets = pytest.importorskip("datasets")
    assert completions(datasets.Dataset.from_list(ROWS)) == TEXTS
