"""Losses on known log-probs: by hand, as their run logged them, and what log-probs suffice for."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import phi2
from phi2.cli.commands import main
from phi2.lab.replay import disagreement
from phi2.lab.statistics import spearman
from phi2.losses.batch import PairBatch
from phi2.losses.properties import made_up_pairs
from phi2.training.dpo import train

SUMS = {
    "policy_chosen_logps": np.array([-4.0, -9.0, -2.0]),
    "policy_rejected_logps": np.array([-6.0, -5.0, -8.0]),
    "ref_chosen_logps": np.array([-5.0, -8.0, -2.5]),
    "ref_rejected_logps": np.array([-5.0, -6.0, -5.0]),
}  # margins 1 - -1 = 2, -1 - 1 = -2, 0.5 - -3 = 3.5
LENGTHS = {"chosen_length": np.array([2, 3, 1]), "rejected_length": np.array([2, 1, 4])}


def test_sigmoid_by_hand():
    """-log sigma(b m) with b = 0.5: m = 2 gives log(1 + 1/e), and dL/dm = -0.5 sigma(-1) = -0.5 / (1 + e)."""
    replay = phi2.replay(SUMS, "sigmoid", beta=0.5)
    assert replay.margin.tolist() == [2.0, -2.0, 3.5]
    assert replay.values[0] == pytest.approx(math.log1p(1 / math.e))
    assert replay.d_w[0] == pytest.approx(-0.5 / (1 + math.e))
    assert replay.d_l[1] == pytest.approx(0.5 / (1 + 1 / math.e))
    np.testing.assert_allclose(replay.weight, 2 * np.abs(replay.d_w))
    assert replay.heaviest.tolist() == [1, 0, 2]


def test_values_and_slopes_are_those_of_the_formula_differentiated_by_itself():
    s_w, s_l, r_w, r_l = (torch.tensor(SUMS[name], requires_grad=True) for name in SUMS)
    n_w, n_l = (torch.tensor(LENGTHS[name]) for name in LENGTHS)
    formulas = {
        "paper:ipo": ((s_w - r_w - s_l + r_l) - 1 / (2 * 0.3)) ** 2,
        "ipo": ((s_w - r_w) / n_w - (s_l - r_l) / n_l - 1 / (2 * 0.3)) ** 2,
        "simpo": -torch.nn.functional.logsigmoid(0.3 * (s_w / n_w - s_l / n_l) - 0.5),
    }
    for name, expected in formulas.items():
        knobs = {"beta": 0.3} | ({"gamma": 0.5} if name == "simpo" else {})
        replay = phi2.replay({**SUMS, **LENGTHS}, name, **knobs)
        d_w, d_l = torch.autograd.grad(expected.sum(), (s_w, s_l))
        np.testing.assert_allclose(replay.values, expected.detach().numpy(), rtol=1e-5)
        np.testing.assert_allclose(replay.d_w, d_w.numpy(), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(replay.d_l, d_l.numpy(), rtol=1e-5, atol=1e-9)


def test_a_loss_of_tokens_has_the_mean_of_its_slopes():
    """ld_alpha = 0 leaves of the longer answer as many tokens as the shorter has: of 4 tokens with slope g, 2."""
    masks = {"chosen_mask": np.ones((1, 2)), "rejected_mask": np.ones((1, 4))}
    logps = {"policy_chosen_logps": np.full((1, 2), -1.0), "policy_rejected_logps": np.full((1, 4), -1.0)}
    refs = {"ref_chosen_logps": np.full((1, 2), -1.0), "ref_rejected_logps": np.full((1, 4), -1.0)}
    replay = phi2.replay({**logps, **refs, **masks}, "sigmoid", beta=1.0, ld_alpha=0.0)
    assert replay.d_w.tolist() == [-0.5] and replay.d_l.tolist() == [0.25]


def test_numpy_torch_namespace_and_pair_batch_give_the_same():
    pairs = made_up_pairs([3, 1, 2], [2, 2, 4], phi2.losses.batch.Columns(), False)
    arrays = {name: value for name, value in vars(pairs).items() if isinstance(value, torch.Tensor)}
    lengths = {f"{side}_length": arrays[f"{side}_mask"].sum(dim=1) for side in ("chosen", "rejected")}
    by_length = {name: value.numpy() for name, value in {**arrays, **lengths}.items() if "mask" not in name}
    expected = phi2.replay(pairs, "sigmoid", ld_alpha=0.3)
    for given in (arrays, SimpleNamespace(**arrays), by_length):
        replay = phi2.replay(given, "sigmoid", ld_alpha=0.3)
        for name in ("values", "d_w", "d_l", "margin"):
            assert (getattr(replay, name) == getattr(expected, name)).all()


def test_what_stands_behind_the_end_of_an_answer_does_not_count():
    given = {name: np.array([[-1.0, -2.0, math.nan]]) for name in SUMS} | {name: np.array([2]) for name in LENGTHS}
    assert phi2.replay(given, "simpo").margin.tolist() == [0.0]


def test_columns_reach_the_loss():
    weighted = {**SUMS, "columns": {"weight": np.array([1.0, 0.0, 2.0])}}
    plain, replay = phi2.replay(SUMS, "sigmoid"), phi2.replay(weighted, "sigmoid", weight_column="weight")
    np.testing.assert_allclose(replay.d_w, plain.d_w * np.array([1.0, 0.0, 2.0]))


def test_shares_and_the_effective_number_of_pairs_by_hand():
    """Weights 4, 1, 1, ...: a tenth of ten pairs is one, with 4 of 13; 13^2 / (16 + 9) = 6.76 pairs."""
    weights = np.array([1.0] * 9 + [4.0])
    pairs = {name: np.zeros(10) for name in SUMS} | {"columns": {"weight": weights}}
    replay = phi2.replay(pairs, "sigmoid", weight_column="weight")
    assert replay.share(0.1) == replay.share(0.01) == pytest.approx(4 / 13)
    assert replay.effective == pytest.approx(6.76) and replay.heaviest[0] == 9
    assert phi2.replay({name: np.zeros(10) for name in SUMS}, "sigmoid").effective == pytest.approx(10)


def test_pairs_without_any_weight_have_no_share():
    far = {**SUMS, "policy_chosen_logps": np.full(3, 1e3)}
    replay = phi2.replay(far, "hinge")
    assert math.isnan(replay.share(0.5)) and math.isnan(replay.effective) and "-" in str(replay)


def test_losses_disagree_where_their_slopes_have_other_signs(registry):
    @phi2.preference_loss("half_and_half")
    def half_and_half(pairs: PairBatch) -> torch.Tensor:
        return pairs.policy_chosen * torch.where(pairs.margin > 0, 1.0, -2.0)

    found = disagreement(phi2.replay(SUMS, "sigmoid"), phi2.replay(SUMS, "half_and_half"))
    assert found.opposite.tolist() == [True, False, True]
    assert found.ranks == pytest.approx(np.sqrt(3) / 2)  # ranks 1 2 0 and 0.5 2 0.5: 1.5 / sqrt(2 * 1.5)


def test_rank_correlation():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30])) == pytest.approx(0.8)
    assert spearman(np.array([1, 2, 3]), np.array([9, 4, 1])) == -1
    assert math.isnan(spearman(np.array([1, 1, 1]), np.array([1, 2, 3])))


# ---- of a run ----

OWN = [
    {"loss": "sigmoid", "beta": 0.3},
    {"loss": "ipo", "nll_weight": 0.7},
    {"loss": "simpo"},
    {"loss": "sigmoid:0.5,sft:0.5"},
    {"loss": "aot"},
    {"loss": "bco"},
    {"loss": "sigmoid:0.5,bco:0.5"},
    {"loss_args": {"f_divergence_type": "js_divergence", "ld_alpha": 0.4}},
    {"loss_args": {"weight_column": "weight"}},
]


@pytest.mark.parametrize("changes", OWN, ids=str)
def test_the_runs_own_loss_gives_what_the_run_logged(dpo_config, pair_data, changes):
    """To the last bit, at every evaluation."""
    run = train(dpo_config(eval_data=pair_data, eval_steps=2, max_steps=4, **changes))
    for step in (2, 4):
        line = next(line for line in run._lines("eval") if line["step"] == step)
        replay = phi2.replay(run, evaluation=step)
        assert {f"eval_{name}": value for name, value in replay.metrics.items()} == {
            name: value for name, value in line.items() if name.startswith("eval_")
        }
        found = phi2.Ledger(run).at(step)
        for name, values in (("loss", replay.values), ("d_w", replay.d_w), ("d_l", replay.d_l)):
            assert (found[name] == values).all()


LABELS = [{"prompt": f"Q{i % 5}", "completion": f" the {i}" * (1 + i % 3), "label": i % 3 > 0} for i in range(8)]
PAIRS = [{"prompt": f"P{i}", "chosen": f" then {i}" * (1 + i), "rejected": " that"} for i in range(3)]
LISTS = [
    {"prompt": f"Q{i}", "completions": [f" {j} the" * (1 + j) for j in range(n)], "scores": [5, 9, 2, 5][:n]}
    for i, n in enumerate((2, 3, 4, 3))
]
IMITATED = [{**row, "reference": f" those {i}" * (1 + i)} for i, row in enumerate(PAIRS)]
UNPAIRED = [
    (LABELS, {"loss": "apo_zero_unpaired", "nll_weight": 0.7}),
    (LABELS, {"loss": "bco_unpaired"}),
    ([*LABELS[:3], *PAIRS, *LABELS[3:]], {"loss": "apo_zero_unpaired"}),
    (LISTS, {"loss": "sigmoid", "nll_weight": 0.7}),
    (LISTS, {"loss": "lipo", "beta": 0.3}),
    (LISTS, {"loss": "sigmoid:0.5,plackett_luce:0.5"}),
    (LABELS, {"loss": "kto"}),
    (LABELS, {"loss": "kto:0.5,bco_unpaired:0.5"}),
    ([*LABELS[:3], *PAIRS, *LABELS[3:]], {"loss": "kto"}),
    (PAIRS, {"loss": "kto", "nll_weight": 0.7}),
    (PAIRS, {"loss": "tdpo2"}),
    (LISTS, {"loss": "tdpo1"}),
    (PAIRS, {"loss": "sigmoid", "loss_args": {"use_weighting": True}}),
    (IMITATED, {"loss": "tpo"}),
]


@pytest.mark.parametrize(("rows", "changes"), UNPAIRED, ids=lambda each: str(each)[:60])
def test_a_loss_of_other_rows_than_pairs_gives_what_the_run_logged(dpo_config, write_rows, rows, changes):
    """To the last bit."""
    path = write_rows(rows)
    run = train(dpo_config(data=path, eval_data=path, max_steps=3, **changes))
    line = next(iter(run._lines("eval")))
    replay, found = phi2.replay(run), phi2.Ledger(run).at()
    logged = {name: value for name, value in line.items() if name.startswith("eval_")}
    assert {f"eval_{name}": value for name, value in replay.metrics.items()} == logged
    for name, values in (("loss", replay.values), ("d_w", replay.d_w), ("d_l", replay.d_l), ("margin", replay.margin)):
        np.testing.assert_array_equal(found[name], values)


def test_answers_of_one_kind_are_replayed(dpo_config, write_rows):
    data, good = write_rows(LABELS), write_rows([row for row in LABELS if row["label"]])
    run = train(dpo_config(data=data, eval_data=good, loss="kto", max_steps=1, learning_rate=0.0))
    assert phi2.replay(run, "apo_zero_unpaired").metrics["loss"] == pytest.approx(0.5, abs=1e-5)


def test_labelled_answers_are_shown_and_written(dpo_config, write_rows, tmp_path, capsys):
    path, output = write_rows(LABELS), tmp_path / "lines.jsonl"
    run = train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=2))
    losses = "apo_zero_unpaired,bco_unpaired"
    assert main(["replay", str(run), "--losses", losses, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "8 answers behind update 2" in said and "answers pulled the other way" in said and " | -" in said
    assert "the\nnumber of answers that pull" in said and "pairs" not in said and "margin" not in said
    first = json.loads(output.read_text().splitlines()[0])
    assert first["margin"] is None and first["d_w"] is None and first["d_l"] > 0


def test_what_a_table_tells_of_lists_says_so(dpo_config, write_rows, capsys):
    path = write_rows(LISTS)
    run = train(dpo_config(data=path, eval_data=path, loss="lipo", max_steps=1))
    assert main(["replay", str(run)]) == 0
    assert "mean and accuracy are means over the lists." in capsys.readouterr().out


def test_what_labelled_answers_do_not_suffice_for_is_told_in_one_line(dpo_config, write_rows):
    path = write_rows(LABELS)
    run = train(dpo_config(data=path, eval_data=path, loss="bco_unpaired", max_steps=1))
    kept = "loss 'kto' needs answers to other prompts, which a ledger keeps of a run that needs it: not replayed$"
    with pytest.raises(ValueError, match=kept):
        phi2.replay(run, "kto")
    compares = "'sigmoid' compares answers to one prompt, and .* row 1 has one answer with a"
    with pytest.raises(ValueError, match=compares):
        phi2.replay(run, "sigmoid:0.5,apo_zero_unpaired:0.5")


def test_what_a_loss_needed_serves_another_beta_of_it(dpo_config, write_rows):
    """z is that of the run: 1 - sigma(beta (l - z)) of a good answer, 1 - sigma(beta (z - l)) of a bad one."""
    path = write_rows(LABELS)
    run = train(dpo_config(data=path, eval_data=path, loss="kto", max_steps=3, learning_rate=1e-2))
    found, replay = phi2.Ledger(run).at(), phi2.replay(run, "kto", beta=2.0)
    policy, ref = (
        sum(found.tokens(f"mismatched/{model}_{side}_logps")[0].sum() for side in ("chosen", "rejected"))
        for model in ("policy", "ref")
    )
    z = max(0.0, (policy - ref) / len(LABELS))
    good, bad = found["s_w"] - found["r_w"] - z, z - found["s_l"] + found["r_l"]
    expected = 1 - 1 / (1 + np.exp(-2.0 * np.where(np.isnan(good), bad, good)))
    np.testing.assert_allclose(replay.values, expected, atol=1e-5)


def test_a_loss_that_keeps_numbers_has_them_as_the_run_had_if_it_is_its_own(dpo_config, pair_data):
    run = train(dpo_config(eval_data=pair_data, max_steps=4, loss="bco", beta=0.3))
    own, named, other = phi2.replay(run), phi2.replay(run, "bco", beta=0.3), phi2.replay(run, "bco", beta=0.30001)
    assert (own.values == named.values).all() and set(own.evaluation.about["state"].values()) != {0.0}
    assert np.abs(other.values - own.values).max() > 1e-3


def test_a_loss_of_labelled_answers_is_replayed_on_pairs(registry):
    """-s of a good answer, 3 s of a bad one: each pair has the mean of both, and so have its slopes."""

    @phi2.preference_loss("labels", unit="answer")
    def labels(answers) -> torch.Tensor:
        return torch.where(answers.is_good, -1.0, 3.0) * answers.logratio

    replay = phi2.replay(SUMS, "labels")
    assert replay.values.tolist() == [(-1 - 3) / 2, (1 + 3) / 2, (-0.5 - 9) / 2]
    assert set(replay.d_w) == {-0.5} and set(replay.d_l) == {1.5} and "labels" in str(replay)


def test_a_loss_is_tried_before_it_is_replayed(registry):
    @phi2.preference_loss("beside_others")
    def beside_others(pairs: PairBatch) -> torch.Tensor:
        return pairs.margin - pairs.margin.mean()

    @phi2.preference_loss("noisy")
    def noisy(pairs: PairBatch) -> torch.Tensor:
        return pairs.margin + torch.rand(len(pairs.margin))

    with pytest.raises(ValueError, match='register it with scope="window"'):
        phi2.replay(SUMS, "beside_others")
    with pytest.raises(ValueError, match="draws random numbers"):
        phi2.replay(SUMS, "noisy")


def test_a_loss_that_needs_more_than_pairs_is_refused(registry):
    @phi2.preference_loss("imitating", needs=("gold",))
    def imitating(pairs: PairBatch) -> torch.Tensor:
        return -pairs.gold_logps.sum(dim=-1)

    with pytest.raises(
        ValueError, match="loss 'imitating' needs gold answer .column reference., which arrays cannot tell: not"
    ):
        phi2.replay(SUMS, "imitating")


def test_another_loss_gives_what_its_own_evaluation_of_that_model_would(dpo_config, pair_data, tmp_path):
    """Two runs that do not move: each loss on the log-probs of the other."""
    still = dict(eval_data=pair_data, max_steps=1, learning_rate=0.0)
    ours = train(dpo_config(**still))
    theirs = train(dpo_config(**still, loss="ipo", beta=0.7, output=str(tmp_path / "other")))
    assert phi2.replay(ours, "ipo", beta=0.7).metrics == phi2.replay(theirs).metrics


def test_a_loss_of_a_file_is_replayed_from_the_run_folder(dpo_config, pair_data, tmp_path, registry):
    path = tmp_path / "mine.py"
    code = "import phi2\n\n@phi2.preference_loss('mine')\ndef mine(pairs, *, beta: float = 2.0):\n"
    path.write_text(f"{code}    return -beta * pairs.margin\n")
    run = train(dpo_config(eval_data=pair_data, max_steps=1, loss="mine", loss_file=str(path)))
    path.unlink()
    del registry["mine"]
    assert phi2.replay(run).metrics["loss"] == run.evaluations["eval_loss"][-1]


@pytest.fixture(scope="module")
def run(tiny_phi, pair_data, tmp_path_factory):
    from phi2.lora_config import LoraConfig

    lora = LoraConfig(r=4, target_modules=("q_proj", "fc1"))
    where = dict(model=str(tiny_phi), data=pair_data, output=tmp_path_factory.mktemp("replay") / "run", device="cpu")
    return phi2.dpo(**where, lora=lora, eval_data=pair_data, max_steps=2, eval_steps=1, learning_rate=1e-2)


def test_the_command_prints_tables_and_writes_lines(run, tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    losses = "sigmoid,ipo(beta=0.3, nll_weight=0.5),simpo"
    assert main(["replay", str(run), "--losses", losses, "--evaluation", "all", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "11 pairs behind update 1" in said and "heaviest pairs of ipo(beta=0.3, nll_weight=0.5)" in said
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 * 3 * 11 and {line["step"] for line in lines} == {1, 2}
    ipo = [line["value"] for line in lines if line["step"] == 2 and line["loss"].startswith("ipo")]
    assert ipo == phi2.replay(run, "ipo", beta=0.3, nll_weight=0.5).values.tolist()


def test_losses_of_a_file_are_replayed_by_the_command(run, tmp_path, capsys, registry):
    path = tmp_path / "mine.py"
    path.write_text("import phi2\n\n@phi2.preference_loss('flat')\ndef flat(pairs):\n    return 0 * pairs.margin\n")
    assert main(["replay", str(run), "--losses", "flat", "--loss_file", str(path)]) == 0
    assert "flat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--losses", "ippo"], "did you mean ipo?"),
        (["--losses", "ipo(gama=1.0)"], "does not take 'gama'"),
        (["--losses", "ipo,ipo"], "loss ipo is there twice"),
        (["--losses", ""], "losses must name one loss at least"),
        (["--evaluation", "3"], "evaluation must be last or one of 1, 2, got '3'"),
        (["--evaluation", "first"], "evaluation must be last or one of 1, 2, got 'first'"),
        (["--losses", "score_margin_of_none"], "loss must be one of"),
        (["--loss_file", "mine.py"], "loss_file mine.py needs losses"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_one_line(run, capsys, arguments, told):
    assert main(["replay", str(run), *arguments]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_an_output_that_is_there_is_left_alone(run, tmp_path, capsys):
    output = tmp_path / "kept"
    output.write_text("mine")
    assert main(["replay", str(run), "--output", str(output)]) == 1
    assert "exists" in capsys.readouterr().err and output.read_text() == "mine"


def test_a_run_without_reference_replays_losses_that_need_none(dpo_config, pair_data):
    run = train(dpo_config(loss="simpo", eval_data=pair_data, max_steps=1))
    assert phi2.replay(run, "cpo").values.shape == (11,)
    with pytest.raises(ValueError, match="loss 'sigmoid' needs log-probs of a reference: .* is of a run without one"):
        phi2.replay(run, "sigmoid")


TOKENS = {name: np.zeros((3, 4)) for name in SUMS}
BAD_SCORES = {"score_chosen": np.array([2.0, 3, 1]), "score_rejected": np.array([1.0, 2, 2])}
NO_SCORES = {"score_chosen": np.array([1, 2, math.nan]), "score_rejected": np.zeros(3)}


@pytest.mark.parametrize(
    ("given", "loss", "told"),
    [
        (
            [1.0],
            "sigmoid",
            "logps must be a PairBatch, a mapping or namespace of arrays, or the path of a run, got list",
        ),
        ({**SUMS, "policy": 1}, "sigmoid", "got 'policy'"),
        ({"policy_chosen_logps": np.zeros(3)}, "sft", "logps needs policy_rejected_logps"),
        ({k: v for k, v in SUMS.items() if k != "ref_chosen_logps"}, "sigmoid", "logps needs ref_chosen_logps"),
        ({k: v for k, v in SUMS.items() if "policy" in k}, "sigmoid", "give ref_chosen_logps and ref_rejected_logps"),
        ({**SUMS, "policy_rejected_logps": np.zeros(2)}, "sigmoid", r"shape \(3,\) or \(3, T\), got \(2,\)"),
        ({**SUMS, "ref_chosen_logps": np.zeros((3, 1))}, "sigmoid", r"must have shape \(3,\), got \(3, 1\)"),
        ({**SUMS, "ref_chosen_logps": np.array([0, math.inf, 0])}, "sigmoid", "must be finite, but row 1 is not"),
        ({**SUMS, "ref_chosen_logps": ["a", "b", "c"]}, "sigmoid", "ref_chosen_logps must be an array of numbers"),
        ({**SUMS, "chosen_length": np.array([0, 1, 1])}, "sigmoid", "chosen_length must be whole numbers from 1 on"),
        ({**SUMS, "chosen_length": np.array([1.5, 1, 1])}, "sigmoid", "must be whole numbers from 1 on, got 1.5"),
        ({**TOKENS, "chosen_length": np.array([1, 5, 1])}, "sigmoid", r"must be whole numbers in \[1, 4\], got 5"),
        ({**SUMS, "chosen_mask": np.full((3, 1), 0.5)}, "sigmoid", "chosen_mask must hold 0 and 1"),
        ({**SUMS, "ref_chosen_logps": np.zeros(3, complex)}, "sigmoid", "must be an array of numbers, got torch.comp"),
        ({**SUMS, "columns": np.zeros(3)}, "sigmoid", "columns must be a mapping of .* arrays by name, got ndarray"),
        ({**SUMS, "columns": BAD_SCORES}, "odpo", "loss 'odpo' needs score_chosen above score_rejected"),
        ({**SUMS, "columns": NO_SCORES}, "rpo_bwd_kl", r"loss 'rpo_bwd_kl' is nan for row 2 \(counted from 0\)"),
        (SimpleNamespace(path="runs/a"), "sigmoid", "or the path of a run, got SimpleNamespace"),
        ({**SUMS, "columns": {"weight": np.zeros(4)}}, "sigmoid", r"columns\['weight'\] must have shape \(3,\)"),
        ({**SUMS, "chosen_length": np.ones(3), "chosen_mask": np.ones((3, 1))}, "sigmoid", "not both"),
        (TOKENS, "sigmoid", "is token by token: give chosen_mask or chosen_length"),
        (SUMS, "simpo", "loss 'simpo' reads more than the sum of an answer: give chosen_length"),
        ({name: np.zeros(0) for name in SUMS}, "sigmoid", r"got \(0,\)"),
    ],
    ids=str,
)
def test_arrays_that_do_not_do_are_told_in_one_line(given, loss, told):
    with pytest.raises(ValueError, match=told) as error:
        phi2.replay(given, loss)
    assert "\n" not in str(error.value)


def test_a_loss_of_tokens_wants_tokens():
    with pytest.raises(ValueError, match=r"give \(B, T\) log-probs of chosen answers"):
        phi2.replay({**SUMS, **LENGTHS}, "sigmoid", ld_alpha=0.5)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({"nll_weight": 1.0}, "give chosen_length"),
        ({"humanline_min": -1.0}, r"give \(B, T\) log-probs of chosen answers"),
        ({"ld_alpha": 0.5}, r"give \(B, T\) log-probs of chosen answers"),
        ({"sampo_seed": 0}, r"give \(B, T\) log-probs of chosen answers"),
    ],
)
def test_what_reads_tokens_or_lengths_is_refused_for_bare_sums(settings, lacks):
    with pytest.raises(ValueError, match=lacks):
        phi2.replay(SUMS, "sigmoid", **settings)


def test_metrics_by_token_are_left_out_where_no_lengths_are_known():
    by_token = {"kl", "length/chosen", "length/rejected"}
    known, bare = (phi2.replay(given, "sigmoid").metrics for given in ({**SUMS, **LENGTHS}, SUMS))
    assert known.keys() - bare.keys() == by_token
    assert not any(name.startswith("rewards/") for name in phi2.replay(SUMS, "slic").metrics)


def test_a_negative_nll_weight_is_refused(run):
    with pytest.raises(ValueError, match="nll_weight must not be negative, got -1"):
        phi2.replay(run, "sigmoid", nll_weight=-1)


def test_arguments_without_a_meaning_are_refused(run):
    with pytest.raises(ValueError, match="name a loss: only a run has one"):
        phi2.replay(SUMS)
    with pytest.raises(ValueError, match="evaluation is one of a run"):
        phi2.replay(SUMS, "sigmoid", evaluation=3)
    with pytest.raises(ValueError, match="need a loss"):
        phi2.replay(run, beta=0.2)
