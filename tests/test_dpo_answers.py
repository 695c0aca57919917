"""Preference runs on other rows than pairs: labelled answers, lists with scores, pairs with an answer to imitate."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

import phi2
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.losses.bound import bind_loss
from phi2.training import reference
from phi2.training.config import DPOConfig
from phi2.training.dpo import train
from phi2.training.look import look_at_loss
from phi2.training.scoring import mismatched

KINDS = ("labels", "lists", "gold", "pairs", "pairs and labels", "labelled lists", "good")


def answer(i: int, kind: int = 0) -> str:
    return f" {('the', 'then', 'sea')[kind]} {i}" * (1 + (i + kind) % 3)


def rows_of(kind: str) -> list[dict]:
    """Twelve; lists have two, three or four answers, whose scores are all different."""
    labels = [{"prompt": f"Q{i}", "completion": answer(i), "label": i % 3 > 0} for i in range(12)]
    pairs = [{"prompt": f"Q{i}", "chosen": answer(i), "rejected": answer(i, 1)} for i in range(12)]
    lists = [
        {"prompt": f"Q{i}", "completions": [f" {j}{answer(i)}" for j in range(n)], "scores": [5, 9, 2, 7][:n]}
        for i, n in enumerate([2, 3, 4] * 4)
    ]
    return {
        "labels": labels,
        "good": [{**row, "label": True} for row in labels],
        "pairs": pairs,
        "pairs and labels": pairs[:6] + labels[6:],
        "gold": [{**row, "reference": answer(i, 2)} for i, row in enumerate(pairs)],
        "lists": lists,
        "labelled lists": [{**row, "scores": [1, 0, 0, 1][: len(row["scores"])]} for row in lists],
    }[kind]


@pytest.fixture(scope="module")
def data(write_rows) -> dict[str, str]:
    return {kind: write_rows(rows_of(kind)) for kind in KINDS}


@pytest.fixture
def config(dpo_config, data) -> Callable[..., DPOConfig]:
    """config(loss, kind of rows, **changes): one update of four rows in their order, in several passes."""

    def make(loss: str, kind: str, **changes) -> DPOConfig:
        given = dict(max_steps=1, shuffle=False, max_tokens_per_pass=100, loss=loss, data=data[kind])
        return dpo_config(**{**given, **changes})

    return make


# ---- what is trained on ----

# At the first update policy and reference are one: every l is 0.
FIRST_LOSS = {
    ("kto", "labels"): 1 / 2,
    ("kto", "pairs"): 1 / 2,
    ("kto", "pairs and labels"): 1 / 2,
    ("kto", "labelled lists"): 1 / 2,
    ("bco_unpaired", "labels"): log(2),
    ("sigmoid", "lists"): log(2),
    ("plackett_luce", "lists"): (4 * log(2) + 2 * log(3) + log(4)) / 4,  # of 2, 3, 4 and 2 answers
    ("softmax_dpo", "lists"): (log(2) + log(3) + log(4) + log(2)) / 4,
    ("sigmoid", "gold"): log(2),
    ("sigmoid:0.5,kto:2", "pairs"): log(2) / 2 + 1,
}


@pytest.mark.parametrize(("loss", "kind"), FIRST_LOSS)
def test_the_first_loss_is_the_one_where_policy_and_reference_agree(config, metrics_of, loss, kind):
    line = metrics_of(train(config(loss, kind)))[0]
    assert line["loss"] == pytest.approx(FIRST_LOSS[loss, kind], rel=1e-5)
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-4) and line["grad_norm"] > 1e-3


def test_a_loss_of_ranks_begins_where_rounding_ranks_equal_answers(config, monkeypatch):
    score = reference.score

    def rounded(model, row) -> torch.Tensor:
        exact = score(model, row)
        return exact + 1e-6 * torch.arange(len(exact)).sin()

    monkeypatch.setattr(reference, "score", rounded)
    assert (train(config("lipo", "lists", precompute_ref_log_probs=True, max_steps=1)) / "adapter").exists()


def test_an_answer_to_imitate_is_imitated(config, metrics_of):
    curve = metrics_of(train(config("tpo", "gold", max_steps=6, loss_args={"tpo_alpha": 1.0})))
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5


def test_gold_answers_that_the_loss_does_not_use_are_counted(config, capsys):
    train(config("sigmoid", "gold"))
    assert "loss sigmoid does not use the answers to imitate of 12 rows (column reference)" in capsys.readouterr().out


def test_the_likelihood_beside_a_loss_of_labels_is_that_of_good_answers(config, metrics_of, tmp_path):
    """Per token of the window: among the first four rows the second and third are good."""
    plain = metrics_of(train(config("kto", "labels")))[0]
    beside = metrics_of(train(config("kto", "labels", nll_weight=0.7, output=str(tmp_path / "beside"))))[0]
    per_token = -plain["logps/chosen"] / plain["length/chosen"]
    assert beside["loss"] - plain["loss"] == pytest.approx(0.7 * per_token, rel=1e-5)


def test_the_likelihood_beside_a_loss_of_lists_is_that_of_the_best_answers(config, metrics_of, tmp_path):
    plain = metrics_of(train(config("plackett_luce", "pairs")))[0]
    beside = metrics_of(train(config("plackett_luce", "pairs", nll_weight=0.7, output=str(tmp_path / "beside"))))[0]
    per_token = -plain["logps/chosen"] / plain["length/chosen"]
    assert beside["loss"] - plain["loss"] == pytest.approx(0.7 * per_token, rel=1e-5)


def test_a_precomputed_reference_has_the_answers_behind_other_prompts(config, metrics_of, tmp_path):
    given = dict(max_steps=4, eval_steps=2, test_fraction=0.25, shuffle=True)
    live = metrics_of(train(config("kto", "labels", **given)))
    known = metrics_of(
        train(config("kto", "labels", precompute_ref_log_probs=True, output=str(tmp_path / "known"), **given))
    )
    assert len(live) == len(known) == 6
    for mine, other in zip(live, known, strict=True):
        assert mine.pop("type") == other.pop("type")
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


# ---- what is told ----


def test_a_run_on_labels_tells_of_good_and_of_bad_answers(config, metrics_of):
    line = metrics_of(train(config("kto", "labels")))[0]
    sides, values = ("chosen", "rejected"), ("rewards", "logps", "ref_logps", "length")
    assert {f"{value}/{side}" for value in values for side in sides} <= line.keys() and "rewards/accuracies" not in line
    rejected = [answer(i) for i in (0, 3)]
    assert line["length/rejected"] == np.mean([tokens_of(text) + 1 for text in rejected])  # an end token each


def tokens_of(text: str) -> int:
    """Of the tiny tokenizer, whose one merge is "th"."""
    return len(text) - text.count("th")


def test_labels_of_one_prompt_are_compared(config, metrics_of):
    curve = metrics_of(train(config("kto", "pairs", max_steps=3)))
    same = metrics_of(train(config("sigmoid", "pairs", max_steps=1, output=config("kto", "pairs").output + "2")))
    assert all(0 <= line["rewards/accuracies"] <= 1 and "rewards/margins" in line for line in curve)
    assert curve[0]["rewards/margins"] == pytest.approx(same[0]["rewards/margins"], abs=1e-5)


def test_losses_of_answers_with_a_label_mix(config, metrics_of, tmp_path):
    def first(loss: str) -> dict:
        return metrics_of(train(config(loss, "labels", output=str(tmp_path / loss))))[0]

    line, parts = first("kto:0.5,bco_unpaired:0.5"), [first("kto"), first("bco_unpaired")]
    assert line["loss"] == pytest.approx((parts[0]["loss"] + parts[1]["loss"]) / 2, rel=1e-5)


def test_held_out_answers_may_be_of_one_kind(config, data, metrics_of):
    line = metrics_of(train(config("kto", "labels", eval_data=data["good"], eval_steps=1)))[-1]
    assert line["type"] == "eval" and "eval_rewards/chosen" in line and "eval_rewards/rejected" not in line


# ---- what is refused ----


@pytest.mark.parametrize(
    ("loss", "kind", "changes", "message"),
    [
        ("kto", "good", {}, "loss 'kto' needs good and bad answers, and all of .*rows.jsonl are good"),
        ("kto", "lists", {}, r"loss 'kto' needs pairs, .* the answers of .*rows.jsonl row 1 have scores, 9, 5"),
        ("sigmoid", "labels", {}, r"loss 'sigmoid' compares answers to one prompt, .* rows are for kto, apo_zero_unp"),
        ("nca", "labels", {}, "loss 'nca' compares answers to one prompt, and .*rows.jsonl row 1 has one answer"),
        ("sigmoid", "pairs and labels", {}, "loss 'sigmoid' compares answers to one prompt, and .*jsonl row 7 has one"),
        ("sigmoid:1,kto:1", "labels", {}, "loss 'sigmoid' compares answers to one prompt"),
        ("tpo", "pairs", {}, r"loss 'tpo' needs an answer to imitate, and .*rows.jsonl row 1 has no reference"),
        (
            "kto",
            "labels",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
            "loss 'kto' sets each prompt's answers behind another one: .* must be at least 2, got 1",
        ),
        ("kto", "labels", {"loss_args": {"ld_alpha": 0.5}}, "ld_alpha acts on pairs, and loss 'kto' gives each answer"),
        ("tpo", "gold", {"precompute_ref_log_probs": True}, "loss tpo needs no reference"),
    ],
)
def test_rows_that_a_loss_cannot_be_given_are_one_line(config, monkeypatch, loss, kind, changes, message):
    monkeypatch.setattr("phi2.training.session.Session.load_policy", None)  # before the model is loaded
    with pytest.raises(ValueError, match=message) as caught:
        train(config(loss, kind, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": [" a"], "scores": [1]}, "completions must hold at least two answers to compare, got 1"),
        ({"completions": [" a", " b"], "scores": [1, 1]}, "all 2 answers have the score 1"),
    ],
)
def test_lists_without_a_comparison_are_dropped_and_named(dpo_config, write_rows, row, message):
    with pytest.raises(ValueError, match=message):
        train(dpo_config(data=write_rows([{"prompt": "Q", **row}]), loss="plackett_luce"))


# ---- answers behind other prompts ----


def encoded(prompt: int, *answers: int) -> EncodedPreference:
    """A prompt and answers of so many tokens, which say of which row they are."""
    texts = tuple(np.full(n, prompt, dtype=np.int32) for n in answers)
    tokens, scores = np.full(prompt, 9, dtype=np.int32), PAIR[: len(answers)]
    return EncodedPreference(tokens, texts, scores, Origin("rows", prompt), {})


def test_each_prompt_has_the_answers_of_the_row_before_it():
    found = mismatched([encoded(1, 3), encoded(2, 4, 5), encoded(3, 6)], None)
    assert [len(row.prompt) for row in found] == [1, 2, 3]
    assert [[answer[0] for answer in row.answers] for row in found] == [[3], [1], [2, 2]]
    assert found[2].scores == PAIR


def test_an_answer_behind_a_longer_prompt_is_cut_to_max_length():
    found = mismatched([encoded(1, 7), encoded(6, 2)], 8)
    assert [len(row.answers[0]) for row in found] == [2, 2]


def test_a_window_of_one_row_has_its_own_answers_and_an_empty_one_none():
    (alone,) = mismatched([encoded(2, 3)], None)
    assert alone.answers[0].tolist() == [2, 2, 2] and mismatched([], None) == []


# ---- a knob of another choice, and comparisons ----


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"tpo_l_gamma": 0.3},
            "tpo_l_gamma 0.3 changes nothing .* beside contrast sigmoid, but beside tpo_l",
        ),
        (
            {"contrast": "hinge", "label_smoothing": 0.1},
            "label_smoothing 0.1 changes nothing in loss 'tpo' beside contrast hinge, but beside sigmoid, tpo_l",
        ),
    ],
)
def test_a_knob_that_another_choice_would_read_is_refused(knobs, message):
    row = encoded(3, 4, 5)
    golden = EncodedPreference(row.prompt, (*row.answers, row.answers[0]), (*PAIR, 1.0), row.origin, {}, has_gold=True)
    with pytest.raises(ValueError, match=message):
        look_at_loss(bind_loss("tpo", knobs), [golden], [])
    look_at_loss(bind_loss("tpo", {**knobs, "contrast": "tpo_l"}), [golden], [])


@pytest.fixture
def compared(tiny_phi, data, tmp_path) -> Callable[..., phi2.Comparison]:
    def run(kind: str, losses: str, **changes) -> phi2.Comparison:
        size = dict(max_steps=2, seeds=1, per_device_train_batch_size=4, learning_rate=1e-2, device="cpu")
        where = dict(model=str(tiny_phi), data=data[kind], eval_data=data[kind], output=str(tmp_path / "compared"))
        return phi2.compare(losses=losses, **{**where, **size, **changes})

    return run


def test_a_comparison_has_losses_of_labels_of_lists_and_with_gold_beside_one_of_pairs(compared):
    """Each run asks the reference that was precomputed for all of them, or would fail."""
    losses = ["sigmoid", "kto", "plackett_luce", "tpo"]
    found = compared("gold", ",".join(losses), loss_args={})
    assert [row["variant"] for row in found.rows] == losses
    assert all({"accuracy", "margin", "kl", "loss"} <= row["metrics"].keys() for row in found.rows)
    assert (Path(found.path) / "report.html").is_file()


@pytest.mark.parametrize(
    ("kind", "losses", "message"),
    [
        ("labels", "kto,apo_zero_unpaired", "a comparison ranks answers to one held-out prompt, and .* row 1 has one"),
        ("pairs", "sigmoid,tpo", "loss 'tpo' needs an answer to imitate, and .* row 1 has no reference"),
    ],
)
def test_a_comparison_on_rows_that_a_variant_cannot_be_given_is_refused_before_any_run(
    compared, monkeypatch, kind, losses, message
):
    monkeypatch.setattr("phi2.lab.compare.Bench.run", None)
    with pytest.raises(ValueError, match=message):
        compared(kind, losses)
