"""`phi2.load_data`: rows and audit as a run has them, for whatever the rows are for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import phi2
from phi2.data.encode import EncodedPreference, EncodedSequence
from phi2.training.session import start


@pytest.fixture(scope="module")
def tokenizer(tiny_phi):
    return phi2.load(tiny_phi, "cpu")[1]


def arrays_of(row) -> list[list[int]]:
    if isinstance(row, EncodedSequence):
        return [row.ids.tolist(), row.mask.tolist()]
    return [part.tolist() for part in (row.prompt, *row.answers)]


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_rows_and_audit_are_those_of_a_run(tokenizer, sft_config, dpo_config, kind):
    config = {"supervised": sft_config, "preference": dpo_config}[kind](max_length=12)
    session = start(config)
    rows, audit = phi2.load_data(tokenizer, config.data, max_length=12)
    assert [arrays_of(row) for row in rows] == [arrays_of(row) for row in session.rows.train]
    assert audit.to_dict() == session.rows.audits["data_audit.json"].to_dict()


def test_a_kind_that_is_named_is_what_the_rows_must_be(tokenizer, sft_data):
    with pytest.raises(ValueError, match="no usable row among 11: unknown-format 11x"):
        phi2.load_data(tokenizer, sft_data, kind="preference")


def test_a_notebook_shows_the_audit(tokenizer, pair_data):
    loaded = phi2.load_data(tokenizer, pair_data)
    assert repr(loaded) == loaded.audit.table()


def test_rows_may_be_a_list_of_dicts(tokenizer):
    rows, audit = phi2.load_data(tokenizer, [{"prompt": "the", "completion": " boat"}], append_eos=False)
    assert tokenizer.decode(rows[0].ids[rows[0].mask]) == " boat"
    assert (audit.kept, audit.flags["eos_missing"]) == (1, 1)


def test_a_number_of_a_row_may_be_that_of_numpy(tokenizer, recwarn):
    pair = {"prompt": "the", "chosen": " boat", "rejected": " sea"}
    numbers = {"score": np.float32(2.5), "count": np.int64(3), "none": np.float32("inf")}
    (row,), _ = phi2.load_data(tokenizer, [pair | numbers])
    assert row.columns == {"score": 2.5, "count": 3.0} and not recwarn


def test_a_part_of_a_mixture_may_be_a_dict(tokenizer):
    rows, _ = phi2.load_data(tokenizer, [{"source": "toy-dpo", "rows": 3}, {"source": "toy-dpo", "rows": 2}])
    assert len(rows) == 5 and isinstance(rows[0], EncodedPreference)
    assert np.array_equal(rows[0].prompt, rows[3].prompt)


@pytest.mark.parametrize(
    "data, settings, told",
    [
        ("toy-dpo", {"max_lenght": 8}, "there is no setting 'max_lenght'; did you mean max_length?"),
        ("toy-dpo", {"kind": "pairs"}, "kind: expected one of"),
        ("toy-dpo", {"chat_template": "chatml"}, "chat_template is for supervised rows"),
        ([{"source": "toy-dpo", "split": "dev"}], {}, "split is 'dev'; allowed: train, test"),
        ([], {}, "data must have at least one source, got none"),
        ("no-such.jsonl", {}, "no-such.jsonl"),
        (SimpleNamespace(iloc=None), {}, "the rows of a table are its to_dict('records')"),
        (3, {}, "data must be a source, a DataSpec or rows, got int"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(tokenizer, data, settings, told):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        phi2.load_data(tokenizer, data, **settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_name_of_a_model_is_no_tokenizer():
    with pytest.raises(ValueError, match="^tokenizer must be one that phi2.load gives, got 'nano'$"):
        phi2.load_data("nano", "toy-dpo")
