"""The ledger of a run: what its rows say, that it changes nothing, survives kills, and gives weights."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import phi2
from phi2.losses.batch import AnswerBatch, Columns, comparisons
from phi2.losses.bound import bind_loss
from phi2.losses.properties import made_up_answers
from phi2.losses.slopes import Slopes, slopes_of
from phi2.runs.ledger import FIRST_TOKENS, LOGPS, Ledger, write_evaluation
from phi2.training.dpo import train
from phi2.training.ledger import numbers_of


def test_a_run_with_a_ledger_is_bit_for_bit_one_without(
    dpo_config, pair_data, metrics_of, tmp_path, assert_same_weights
):
    often = dict(eval_data=pair_data, eval_steps=1, max_steps=4)
    ours, plain = train(dpo_config(**often)), train(dpo_config(**often, ledger=False, output=str(tmp_path / "plain")))
    assert (ours / "ledger").is_dir() and not (plain / "ledger").exists()
    assert metrics_of(ours) == metrics_of(plain)
    assert_same_weights(ours, plain)


def test_every_evaluation_has_a_row_for_each_pair(dpo_config, pair_data):
    run = train(dpo_config(eval_data=pair_data, eval_steps=2))
    ledger = phi2.Ledger(run)
    assert ledger.steps == [2, 4, 6]
    found, rows = ledger.at(4), [json.loads(line) for line in open(pair_data)]
    assert found["step"].tolist() == [4] * 11 and found["row"].tolist() == list(range(1, 12))
    assert set(found["file"]) == {pair_data} and len(set(found["pair"])) == 11
    assert found["column/weight"].tolist() == [row["weight"] for row in rows]
    assert found["prompt"].tolist() == [row["prompt"] for row in rows]
    assert found["rejected"].tolist() == [f"{row['rejected']}<|im_end|>" for row in rows]
    assert found["loss"].mean(dtype=np.float64) == pytest.approx(run.evaluations["eval_loss"][1], rel=1e-6)
    assert found["correct"].mean() == pytest.approx(run.evaluations["eval_rewards/accuracies"][1])


def test_sums_and_margin_are_those_of_the_tokens(dpo_config, pair_data):
    found = Ledger(train(dpo_config(eval_data=pair_data, max_steps=1))).at()
    sums = {}
    for model, side in (("policy", "chosen"), ("policy", "rejected"), ("ref", "chosen"), ("ref", "rejected")):
        values, lengths = found.tokens(f"{model}_{side}_logps")
        sums[model, side] = [part.sum() for part in np.split(values, np.cumsum(lengths)[:-1])]
        assert lengths.tolist() == found["n_w" if side == "chosen" else "n_l"].tolist()
    names = {"s_w": ("policy", "chosen"), "s_l": ("policy", "rejected")}
    names |= {"r_w": ("ref", "chosen"), "r_l": ("ref", "rejected")}
    for name, of in names.items():
        np.testing.assert_allclose(found[name], sums[of], rtol=1e-5)
    np.testing.assert_allclose(
        found["margin"], found["s_w"] - found["r_w"] - found["s_l"] + found["r_l"], rtol=1e-4, atol=1e-4
    )


def test_margins_of_first_and_last_tokens_by_hand():
    """Chosen gains 1, 2, ..., 7 a token, the rejected one 10 in its only token, which is both first and last."""
    assert FIRST_TOKENS == 5
    logps = torch.zeros(2, 7)
    logps[0], logps[1, 0] = torch.arange(1.0, 8.0), 10
    answers = AnswerBatch(logps, (7, 1), (0, 0), (1.0, 0.0), ref_logps=torch.zeros(2, 7))
    slopes = Slopes(torch.tensor([0.5]), torch.tensor([-0.25, 0.75]))
    found = {name: values.to_pylist()[0] for name, values in numbers_of(answers, slopes, reward_scale=0.1).items()}
    assert (found["margin"], found["margin_first"], found["margin_last"]) == (28 - 10, 15 - 10, 7 - 10)
    assert (found["n_w"], found["n_l"], found["d_w"], found["d_l"], found["weight"]) == (7, 1, -0.25, 0.75, 1.0)


def test_slopes_leave_padding_out():
    """A loss of sums has its gradient at padding too; the derivative is the mean over the tokens of an answer."""
    answers = made_up_answers([(2, 5)], [(1.0, 0.0)], Columns(), reference_free=False)
    level = dataclasses.replace(answers, ref_logps=answers.policy_logps)
    slopes = slopes_of(bind_loss("sigmoid", {"beta": 1.0}), level)
    assert slopes.of_answers.tolist() == [-0.5, 0.5]


def test_a_row_knows_whether_its_pair_was_right_before(dpo_config, pair_data):
    ledger = Ledger(train(dpo_config(eval_data=pair_data, eval_steps=2)))
    first, second, third = (ledger.at(step) for step in ledger.steps)
    assert "was_correct" not in first and set(first["was_correct"]) == {None}
    assert second["was_correct"].tolist() == first["correct"].tolist()
    assert third["was_correct"].tolist() == second["correct"].tolist()


def test_a_run_without_reference_has_nulls_in_its_place(dpo_config, pair_data):
    found = Ledger(train(dpo_config(loss="simpo", eval_data=pair_data, max_steps=1))).at()
    assert not any(name in found for name in ("r_w", "r_l", "ref_chosen_logps", "ref_rejected_logps"))
    np.testing.assert_allclose(found["margin"], found["s_w"] - found["s_l"], rtol=1e-6)


def test_a_run_without_held_out_pairs_has_no_ledger(dpo_config):
    run = train(dpo_config(max_steps=1))
    with pytest.raises(ValueError, match="holds no ledger: a preference run writes one at its evaluations of pairs"):
        Ledger(run)


# ---- rows that are no pairs ----

LABELS = [{"prompt": f"Q{i % 5}", "completion": f" the {i}" * (1 + i % 3), "label": i % 3 > 0} for i in range(8)]
LISTS = [
    {"prompt": f"Q{i}", "completions": [f" {j} the" * (1 + j) for j in range(n)], "scores": [5, 9, 2, 5][:n], "side": i}
    for i, n in enumerate((2, 3, 4))
]


def test_comparisons_by_hand():
    """A pair, a good and a bad answer, and a list of which two answers are as good."""
    lists = [(1.0, 0.0), (1.0,), (0.0,), (9.0, 5.0, 5.0)]
    assert comparisons(lists) == [(0, 1), (2, None), (None, 3), (4, 5), (4, 6)]


def test_a_list_has_a_row_for_every_two_answers_of_which_one_is_better(dpo_config, write_rows):
    path = write_rows(LISTS)
    found = Ledger(train(dpo_config(data=path, eval_data=path, loss="plackett_luce", max_steps=2))).at()
    assert found["row"].tolist() == [1] + 3 * [2] + 5 * [3] and len(set(found["pair"])) == 9
    assert [text[:2] for text in found["chosen"]] == [" 1", " 1", " 1", " 0", " 1", " 1", " 1", " 0", " 3"]
    assert [text[:2] for text in found["rejected"]] == [" 0", " 0", " 2", " 2", " 0", " 3", " 2", " 2", " 2"]
    assert found["column/side"].tolist() == [0.0] + 3 * [1.0] + 5 * [2.0]
    assert len(set(found["loss"])) == 3 and len(set(found["d_w"][4:7])) == 1 and len(set(found["d_l"][4:7])) == 3
    assert (found["correct"] == (found["margin"] > 0)).all()


def test_a_pair_has_the_same_name_in_a_list_and_alone(dpo_config, write_rows, tmp_path):
    answers = [" the first", " then", " that"]
    rows = [{"prompt": "Q", "completions": answers, "scores": [3, 2, 1]}]
    pairs = [{"prompt": "Q", "chosen": answers[i], "rejected": answers[j]} for i, j in ((0, 1), (0, 2), (1, 2))]
    still = dict(max_steps=1, learning_rate=0.0)
    listed, alone = (
        Ledger(train(dpo_config(data=path, eval_data=path, output=str(tmp_path / name), **still))).at()
        for name, path in (("listed", write_rows(rows)), ("alone", write_rows(pairs)))
    )
    assert listed["pair"].tolist() == alone["pair"].tolist()
    np.testing.assert_allclose(listed["s_l"], alone["s_l"], rtol=1e-5)


def test_a_labelled_answer_stands_on_one_side_of_its_row(dpo_config, write_rows):
    path, good = write_rows(LABELS), np.array([row["label"] for row in LABELS])
    run = train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=4))
    found = Ledger(run).at()
    assert found["row"].tolist() == list(range(1, 9))
    for name in ("s", "r", "n", "d"):
        assert np.isnan(found[f"{name}_l"]).tolist() == good.tolist() == (~np.isnan(found[f"{name}_w"])).tolist()
    for chosen, rejected in (("chosen", "rejected"), ("policy_chosen_logps", "policy_rejected_logps")):
        assert (
            [each is not None for each in found[chosen]] == [each is None for each in found[rejected]] == good.tolist()
        )
    assert not any(name in found for name in ("margin", "margin_first", "margin_last"))
    assert (found["d_w"][good] < 0).all() and (found["d_l"][~good] > 0).all()
    gained = np.where(good, found["s_w"] - found["r_w"], found["r_l"] - found["s_l"])
    assert found["correct"].tolist() == (gained > 0).tolist() and 0 < found["correct"].sum()
    assert found["loss"].mean(dtype=np.float64) == pytest.approx(run.evaluations["eval_loss"][-1], rel=1e-6)
    assert found["weight"].mean() == pytest.approx(1)


def test_a_labelled_answer_is_neither_right_nor_wrong_without_a_reference(dpo_config, write_rows, registry):
    @phi2.preference_loss("labels", unit="answer", reference_free=True)
    def labels(answers) -> torch.Tensor:
        return torch.where(answers.is_good, -1.0, 1.0) * answers.policy

    path = write_rows(LABELS)
    found = Ledger(train(dpo_config(data=path, eval_data=path, loss="labels", max_steps=1))).at()
    assert set(found["correct"]) == {None} and "r_w" not in found and "r_l" not in found


def test_pairs_and_labelled_answers_stand_in_one_ledger(dpo_config, write_rows):
    path = write_rows([*LABELS[:2], {"prompt": "P", "chosen": " a", "rejected": " the b"}])
    found = Ledger(train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=1))).at()
    assert np.isnan(found["margin"]).tolist() == [True, True, False]
    assert found["correct"].dtype == bool and found["n_l"].tolist()[0::2] == [6, 6]


def test_an_answer_to_imitate_is_no_part_of_its_row(dpo_config, write_rows, tmp_path):
    pairs = [{"prompt": f"Q{i}", "chosen": " the", "rejected": f" {i}"} for i in range(3)]
    golden = write_rows([{**row, "reference": " that"} for row in pairs])
    names = [
        Ledger(train(dpo_config(data=path, eval_data=path, loss=loss, max_steps=1, output=str(tmp_path / loss)))).at()
        for loss, path in (("sigmoid", write_rows(pairs)), ("tpo", golden))
    ]
    assert names[0]["pair"].tolist() == names[1]["pair"].tolist()
    assert names[0]["rejected"].tolist() == names[1]["rejected"].tolist() and "scores" not in names[1].about


def test_the_same_answer_has_another_name_under_the_other_label(dpo_config, write_rows):
    path = write_rows([{**LABELS[0], "label": label} for label in (True, False, True)])
    first, other, again = Ledger(train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=1))).at()["pair"]
    assert first == again != other


def test_the_ledger_of_a_killed_run_is_that_of_a_whole_one(dpo_config, pair_data, train_and_kill, tmp_path):
    """Killed behind update 5: the checkpoint is that of update 3, and the evaluation of update 4 is made again."""
    often = dict(eval_data=pair_data, eval_steps=2, save_steps=3)
    whole = Ledger(train(dpo_config(**often)))
    config = dpo_config(**often, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    assert Ledger(config.output).steps == [2, 4]
    resumed = Ledger(train(dataclasses.replace(config, resume=True)))
    assert resumed.steps == whole.steps
    for step in whole.steps:
        assert resumed.at(step).table.equals(whole.at(step).table) and resumed.at(step).about == whole.at(step).about


def test_evaluations_that_are_not_made_again_are_dropped(dpo_config, pair_data, train_and_kill, tmp_path):
    config = dpo_config(eval_data=pair_data, eval_steps=2, save_steps=3, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    run = train(dataclasses.replace(config, resume=True, eval_steps=5))
    assert Ledger(run).steps == [2, 5, 6]
    assert Ledger(run).at(5)["was_correct"].tolist() == Ledger(run).at(2)["correct"].tolist()


def test_a_run_that_goes_on_without_ledger_leaves_no_row_of_what_it_makes_again(
    dpo_config, pair_data, train_and_kill, tmp_path
):
    config = dpo_config(eval_data=pair_data, eval_steps=2, save_steps=3, output=str(tmp_path / "killed"))
    train_and_kill(config, step=5)
    assert Ledger(train(dataclasses.replace(config, resume=True, ledger=False))).steps == [2]


@pytest.mark.parametrize("name", ["run", "ledger"])
def test_a_ledger_is_found_by_its_run_its_folder_and_its_file(dpo_config, pair_data, tmp_path, name):
    run = train(dpo_config(eval_data=pair_data, max_steps=1, output=str(tmp_path / name)))
    for path in (run, run / "ledger", run / "ledger" / "step-1.parquet"):
        assert Ledger(path).at("last").step == 1


def test_a_ledger_is_one_table_for_other_readers(dpo_config, pair_data):
    run = train(dpo_config(eval_data=pair_data, eval_steps=3))
    table = pyarrow.parquet.read_table(run / "ledger")
    assert table.num_rows == 22 and set(table["step"].to_pylist()) == {3, 6}


@pytest.mark.parametrize("size", [0, 9, 2000])
def test_a_damaged_file_is_named(dpo_config, pair_data, size):
    run = train(dpo_config(eval_data=pair_data, max_steps=1))
    path = run / "ledger" / "step-1.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"step-1\.parquet: damaged, or not Parquet") as error:
        phi2.replay(run)
    assert "\n" not in str(error.value)


def test_a_byte_that_changed_on_the_disk_is_never_a_number_of_the_ledger(tmp_path):
    table = {name: [0.0] for name in ("s_w", "s_l")} | {"pair": ["a"], "file": ["f"], "row": [1]}
    sound = np.linspace(-3, 0, 400, dtype=np.float32)
    write_evaluation(tmp_path / "step-1.parquet", {"step": 1}, {**table, **{name: [sound] for name in LOGPS}})
    path = tmp_path / "step-1.parquet"
    bytes_of = path.read_bytes()
    for place in range(4, len(bytes_of) // 2, 101):
        path.write_bytes(bytes_of[:place] + bytes([bytes_of[place] ^ 85]) + bytes_of[place + 1 :])
        try:
            read = Ledger(path).at().tokens("policy_chosen_logps")[0]
        except ValueError as error:
            assert "damaged" in str(error)
        else:
            assert np.array_equal(read, sound)


def test_an_evaluation_shows_what_it_is_and_not_all_it_holds(judged):
    assert repr(judged.at()).endswith("step-2.parquet', 11 rows behind update 2)")


def test_a_file_of_something_else_is_no_ledger(tmp_path):
    path = tmp_path / "step-1.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"pair": ["a"]}), path)
    with pytest.raises(ValueError, match="no file of a ledger, it has no file, row, s_w"):
        Ledger(path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        Ledger(tmp_path / "nowhere")


def test_a_ledger_without_held_out_pairs_is_refused(dpo_config):
    with pytest.raises(ValueError, match="ledger False needs eval_data or test_fraction, got neither"):
        dpo_config(ledger=False)


# ---- weights ----


@pytest.fixture(scope="module")
def judged(tiny_phi, pair_data, tmp_path_factory):
    """The ledger of a run that evaluated its training pairs."""
    from phi2.lora_config import LoraConfig

    lora = LoraConfig(r=4, target_modules=("q_proj", "fc1"))
    output = tmp_path_factory.mktemp("judged") / "run"
    where = dict(model=str(tiny_phi), data=pair_data, eval_data=pair_data, output=output, device="cpu", lora=lora)
    return Ledger(phi2.dpo(**where, max_steps=2, learning_rate=1e-2))


def test_weights_of_a_ledger_are_those_of_a_column(
    dpo_config, pair_data, judged, metrics_of, tmp_path, assert_same_weights
):
    """The column `weight` of the data, once read by the loss, once written to a file by the names of pairs."""
    path = tmp_path / "weights.parquet"
    judged.at().write_weights(path, judged.at()["column/weight"])
    ours = train(dpo_config(weights_from=str(path), max_steps=3))
    column = train(dpo_config(loss_args={"weight_column": "weight"}, max_steps=3, output=str(tmp_path / "column")))
    assert metrics_of(ours) == metrics_of(column)
    assert_same_weights(ours, column)


def test_a_run_gives_its_own_weights(dpo_config, judged, metrics_of):
    run = train(dpo_config(weights_from=str(judged.path), max_steps=1, shuffle=False))
    weight = judged.at()["weight"][:4]
    assert weight.mean() != 1
    assert metrics_of(run)[0]["loss"] == pytest.approx(np.log(2) * weight.mean(), rel=1e-5)


def test_held_out_pairs_weigh_one(dpo_config, pair_data, judged, tmp_path):
    path = tmp_path / "weights.parquet"
    judged.at().write_weights(path, np.zeros(11))
    run = train(dpo_config(weights_from=str(path), eval_data=pair_data, max_steps=1))
    assert run.evaluations["eval_loss"][0] == pytest.approx(np.log(2))


def test_the_settings_of_a_weighted_run_make_it_again(dpo_config, judged, tmp_path, metrics_of):
    run = train(dpo_config(weights_from=str(judged.path), max_steps=2, loss="sigmoid:0.5,sft:0.5"))
    assert run.config["weights_from"] == str(judged.path)
    settings = {**run.config, "output": str(tmp_path / "again")}
    assert metrics_of(phi2.dpo(**settings)) == metrics_of(run)


def test_a_comparison_weighs_its_pairs_too(dpo_config, pair_data, judged, tmp_path):
    settings = {**vars(dpo_config(eval_data=pair_data, max_steps=1)), "output": str(tmp_path / "out")}
    del settings["loss"]
    variants = ["sigmoid", {"loss": "sigmoid", "weights_from": str(judged.path)}]
    comparison = phi2.compare(**settings, variants=variants, seeds=1)
    plain, weighted = (run.metrics["loss"][0] for v in comparison.variants for run in comparison.runs(v))
    assert plain == pytest.approx(np.log(2)) and weighted != pytest.approx(np.log(2), rel=1e-3)


def test_weights_that_changed_are_named_when_a_run_goes_on(dpo_config, judged, tmp_path):
    path = tmp_path / "weights.parquet"
    judged.at().write_weights(path, np.ones(11))
    config = dpo_config(weights_from=str(path), max_steps=1, save_steps=1)
    train(config)
    judged.at().write_weights(path, np.full(11, 2.0))
    with pytest.raises(ValueError, match="the columns of the data changed since this run began"):
        train(dataclasses.replace(config, resume=True))


def test_a_ledger_of_other_data_is_told_in_one_line(dpo_config, judged, write_rows):
    rows = [{"prompt": "P", "chosen": " the other", "rejected": f" {i}"} for i in range(3)]
    path = write_rows(rows)
    with pytest.raises(ValueError, match="knows 0 of the 3 training rows, and not .* row 1: is it of other data") as e:
        train(dpo_config(weights_from=str(judged.path), data=path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"pair": ["a"]}, "has no column 'weight'; there are pair"),
        ({"pair": ["a", "b"], "weight": [1.0, None]}, "row 2: a weight is a number from 0 on, got nan"),
        ({"pair": ["a"], "weight": [-1.0]}, "row 1: a weight is a number from 0 on, got -1.0"),
        ({"pair": ["a"], "weight": ["much"]}, "row 1: a weight is a number from 0 on, got much"),
        ({"pair": ["a", "b", "a"], "weight": [1.0, 2.0, 3.0]}, "row 3: pair a weighs 3 there and 1 above it"),
    ],
)
def test_a_file_without_weights_is_told_in_one_line(dpo_config, tmp_path, columns, told):
    path = tmp_path / "weights.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=told):
        train(dpo_config(weights_from=str(path)))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_what_is_no_weight_is_not_written(judged, tmp_path, weight):
    path = tmp_path / "weights.parquet"
    with pytest.raises(ValueError, match="weights row 1: a weight is a number from 0 on, got"):
        judged.at().write_weights(path, np.full(11, weight))
    assert not path.exists()


def test_weights_have_one_source(dpo_config, judged):
    with pytest.raises(ValueError, match="give weights_from or weight_column weight, not both"):
        dpo_config(weights_from=str(judged.path), loss_args={"weight_column": "weight"})
    with pytest.raises(FileNotFoundError, match="weights_from nowhere: no such file or folder"):
        train(dpo_config(weights_from="nowhere"))
    with pytest.raises(ValueError, match=r"weights must have shape \(11,\), one for each pair, got \(3,\)"):
        judged.at().write_weights("never", np.ones(3))


def test_labelled_answers_have_weights_too(dpo_config, write_rows, metrics_of, tmp_path):
    """Where the policy is the reference, KTO is 1/2 of every answer."""
    path, weights = write_rows(LABELS), tmp_path / "weights.parquet"
    judge = Ledger(train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=1)))
    judge.at().write_weights(weights, np.arange(8.0))
    again = dict(data=path, loss="kto", max_steps=1, shuffle=False, output=str(tmp_path / "weighted"))
    assert metrics_of(train(dpo_config(weights_from=str(weights), **again)))[0]["loss"] == pytest.approx(6 / 4 / 2)


def test_a_list_takes_no_weight_which_is_told_in_one_line(dpo_config, judged, write_rows):
    told = r"weighs pairs and answers with a label, and .*rows\.jsonl row 2 has 3 answers"
    with pytest.raises(ValueError, match=told) as error:
        train(dpo_config(weights_from=str(judged.path), data=write_rows(LISTS)))
    assert "\n" not in str(error.value)
