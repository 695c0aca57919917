"""What a ledger is asked: by hand on a few pairs, and as a report shows it."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pyarrow
import pytest

from phi2.lab.ledger import (
    contradicted,
    gains,
    groups,
    has_pairs,
    has_reference,
    lead,
    learnt,
    length_bins,
    length_margin,
    lost,
    preference,
    repeated,
    suspects,
    ties,
)
from phi2.lab.ledger_page import group_table, ledger_sections, pairs_to_look_at, shares
from phi2.lab.report import write_report
from phi2.runs.ledger import Evaluation
from phi2.training.dpo import train

EVIL = "<script>alert('x')</script>"


def evaluation(**columns) -> Evaluation:
    """Three pairs. Gains: 1 and -3 nats of 4 and 2 tokens; margin 4."""
    usual = {
        **{"pair": ["a", "b", "c"], "file": ["f"] * 3, "row": [1, 2, 3]},
        **{"s_w": [-4.0] * 3, "r_w": [-5.0] * 3, "s_l": [-8.0] * 3, "r_l": [-5.0] * 3},
        **{"n_w": [4] * 3, "n_l": [2] * 3, "margin": [4.0] * 3, "margin_first": [3.0] * 3, "margin_last": [-1.0] * 3},
        **{"d_w": [-0.1] * 3, "d_l": [0.1] * 3, "correct": [True, True, False], "was_correct": [True, False, True]},
        **{"prompt": ["P"] * 3, "chosen": ["x", "y", "z"], "rejected": ["u", "v", "w"]},
    }
    return Evaluation(path=None, about={"step": 3}, table=pyarrow.table({**usual, **columns}))


def test_gains_and_the_part_of_length_by_hand():
    """Of -2 nats a token has -1/3; two tokens more make -2/3 of the margin."""
    chosen, rejected = gains(evaluation())
    assert chosen.tolist() == [1.0] * 3 and rejected.tolist() == [-3.0] * 3
    np.testing.assert_allclose(length_margin(evaluation()), -2 / 3)


def test_answers_of_the_same_length_have_no_part_of_length():
    assert length_margin(evaluation(n_l=[4] * 3)).tolist() == [0.0] * 3


def test_flips_are_told_from_the_evaluation_before():
    assert learnt(evaluation()).tolist() == [False, True, False]
    assert lost(evaluation()).tolist() == [False, False, True]
    first = evaluation(was_correct=pyarrow.nulls(3, pyarrow.bool_()))
    assert not learnt(first).any() and not lost(first).any()


def test_a_label_is_suspected_where_either_model_clearly_prefers_the_rejected_answer():
    """Nats a token: -1 against -4 is the usual policy, -1.25 against -2.5 the reference."""
    found = evaluation(s_w=[-4.0, -20.0, -4.0], r_w=[-5.0, -5.0, -12.5])
    assert preference(found).tolist() == [3.0, -1.0, 3.0]
    assert preference(found, "reference").tolist() == [1.25, 1.25, -0.625]
    assert suspects(found).tolist() == [False, True, True]


def test_ties_are_pairs_of_which_neither_answer_is_preferred():
    assert ties(evaluation(s_w=[-4.0, -16.0, -16.1])).tolist() == [False, True, False]


def test_pairs_that_stand_there_twice_or_the_other_way_round():
    found = evaluation(chosen=["x", "y", "x"], rejected=["y", "x", "y"])
    assert contradicted(found).tolist() == [True] * 3 and repeated(found).tolist() == [True, False, True]
    other = evaluation(prompt=["P", "Q", "R"], chosen=["x", "y", "x"], rejected=["y", "x", "y"])
    assert not contradicted(other).any() and not repeated(other).any()


def test_groups_are_by_file_by_columns_of_few_texts_and_by_length():
    columns = {"column/source": ["s", "t", "s"], "column/score": [1.0, 2.0, 3.0], "column/all": ["one"] * 3}
    found = groups(evaluation(file=["f", "g", "g"], n_w=[4, 4, 9], **columns))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        **{"file: f": [True, False, False], "file: g": [False, True, True]},
        **{"source: s": [True, False, True], "source: t": [False, True, False]},
        **{"6 tokens": [True, True, False], "7 to 11 tokens": [False, False, True]},
    }


@pytest.mark.parametrize("lengths", [[1, 2, 3], [5, 5, 5], [1, 1, 9]])
def test_bins_of_length_hold_every_pair_once(lengths):
    masks = list(length_bins(evaluation(n_w=lengths)).values())
    assert np.sum(masks, axis=0).tolist() == [1, 1, 1]


def test_shares_of_the_margin_in_words():
    told = "Of the mean margin of 4 nats, 75 % in first 5 tokens, −25 % in last token, −17 % in length."
    assert shares(evaluation()) == told


def test_a_run_without_reference_is_told_by_its_own_log_probs():
    none = pyarrow.nulls(3, pyarrow.float32())
    found = evaluation(r_w=none, r_l=none)
    assert gains(found)[0].tolist() == [-4.0] * 3 and not suspects(found).any()
    assert "<br>reference" not in pairs_to_look_at(found) and "rejected: s;" in group_table(found)


# ---- answers with a label ----


def labelled(**columns) -> Evaluation:
    """A good answer that gained 1 nat, a bad one that lost 2, and a good one that lost 3."""
    usual = {
        **{"s_w": [-4.0, None, -8.0], "r_w": [-5.0, None, -5.0], "n_w": [4, None, 5], "d_w": [-0.1, None, -0.2]},
        **{"s_l": [None, -7.0, None], "r_l": [None, -5.0, None], "n_l": [None, 2, None], "d_l": [None, 0.3, None]},
        **{name: pyarrow.nulls(3, pyarrow.float32()) for name in ("margin", "margin_first", "margin_last")},
        **{"correct": [True, True, False], "was_correct": [False, True, True]},
        **{"chosen": ["x", None, "y"], "rejected": [None, "x", None]},
    }
    return evaluation(**{**usual, **columns})


def test_a_good_answer_is_lost_where_it_no_longer_gains():
    assert learnt(labelled()).tolist() == [True, False, False] and lost(labelled()).tolist() == [False, False, True]
    assert lead(labelled()).tolist() == [1.0, 2.0, -3.0]


def test_what_compares_two_answers_is_not_so_of_one():
    found = labelled()
    assert not has_pairs(found) and has_reference(found)
    assert not suspects(found).any() and not ties(found).any() and np.isnan(length_margin(found)).all()


def test_a_label_is_contradicted_by_the_other_label_of_the_same_answer():
    assert contradicted(labelled()).tolist() == [True, True, False] and not repeated(labelled()).any()
    assert repeated(labelled(chosen=["x", None, "x"])).tolist() == [True, False, True]


def test_labelled_answers_are_grouped_by_their_own_length():
    found = groups(labelled())
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "2 tokens": [False, True, False],
        "3 to 4 tokens": [True, False, False],
        "5 tokens": [False, False, True],
    }


def test_tables_of_labelled_answers_have_dashes_and_no_margins():
    table, looked_at = group_table(labelled()), pairs_to_look_at(labelled())
    assert "good answers" in table and "margin" not in table and "<td>-</td>" in table and "nan" not in table
    assert "near-ties" not in looked_at and "suspected" not in looked_at and "margin" not in looked_at
    assert "<td>-</td>" in looked_at and "gained −3" in looked_at and "nan" not in looked_at
    assert {"good answer", "bad answer", "stands elsewhere with the other label"} <= set(Tags(looked_at).said)


def test_an_answer_without_a_reference_has_gained_nothing_that_could_be_told():
    none = pyarrow.nulls(3, pyarrow.float32())
    looked_at = pairs_to_look_at(labelled(r_w=none, r_l=none))
    assert "log-probability −8" in looked_at and "gained" not in looked_at


def test_pairs_and_labelled_answers_are_told_together():
    """A pair of margin 4 between two answers with a label."""
    pair = {"s_w": [-4.0, -4.0, -8.0], "n_w": [4, 4, 5], "r_w": [-5.0, -5.0, -5.0], "margin": [None, 4.0, None]}
    found = labelled(**pair, margin_first=[None, 3.0, None], margin_last=[None, -1.0, None], chosen=["x", "z", "y"])
    assert "Of the mean margin of 4 nats, 75 % in" in group_table(found) and "nan" not in group_table(found)
    told = set(Tags(pairs_to_look_at(found)).said)
    assert {"near-ties", "chosen", "rejected", "row", "rows"} <= told and "pairs" not in told


def test_the_report_of_a_run_on_labels_draws_what_there_is(dpo_config, write_rows):
    rows = [{"prompt": f"Q{i}", "completion": f" the {i}", "label": i % 2 > 0} for i in range(8)]
    path = write_rows(rows)
    html = write_report(train(dpo_config(data=path, eval_data=path, loss="kto", eval_steps=3))).read_text()
    for told in ("Held-out answers", "Drift from the reference", "bad answers, mean |d_l|", "Answers flipped"):
        assert told in html
    assert "Where the margin sits" not in html and "near-ties" not in html


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.seen, self.said = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)

    def handle_data(self, data):
        self.said.append(data)


def test_pairs_are_shown_with_their_texts_which_stay_text():
    html = Tags(pairs_to_look_at(evaluation(chosen=[EVIL, "y", "z"], s_w=[-20.0, -4.0, -4.0])))
    assert EVIL in html.said and "script" not in html.seen
    assert {"lost", "learnt", "suspected label noise"} <= set(html.said)


def test_the_markers_of_turns_are_not_shown():
    html = pairs_to_look_at(evaluation(prompt=["<|im_start|>user\nQ <b>?<|im_end|>\n"] * 3, s_w=[-20.0] * 3))
    assert "user\nQ &lt;b&gt;?<" in html and "im_" not in html


def test_long_texts_are_cut_at_the_side_that_matters_less():
    html = pairs_to_look_at(evaluation(prompt=["a" * 999 + "?"] * 3, rejected=["b" * 999, "v", "w"], s_w=[-20.0] * 3))
    assert f"... {'a' * 299}?" in html and f"{'b' * 300} ..." in html and "a" * 300 not in html


def test_the_report_of_a_run_shows_its_ledger(dpo_config, pair_data):
    run = train(dpo_config(eval_data=pair_data, eval_steps=2))
    html = write_report(run).read_text()
    for told in ("Drift from the reference", "Where the margin sits", "Pairs flipped", "behind update 6", "near-ties"):
        assert told in html
    (run / "ledger" / "step-4.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"step-4\.parquet: damaged"):
        write_report(run)


def test_a_run_without_ledger_has_no_such_sections(tmp_path):
    assert ledger_sections(tmp_path) == {}
