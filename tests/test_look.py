"""The first look at a loss: a function of its pairs alone, of each pair by itself, and over columns that are there."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.losses.batch import AnswerBatch, Columns, PairBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.properties import made_up_answers, require_pure, uses_batch
from phi2.losses.registry import PREFERENCE_LOSSES, preference_loss
from phi2.training.dpo import train
from phi2.training.look import look_at_loss, varied

BUILT_IN = sorted(n for n, loss in PREFERENCE_LOSSES.items() if loss.is_own)


def made_up(
    lengths: list[tuple[int, int]], loss: BoundLoss | None = None, columns: Columns | None = None
) -> AnswerBatch:
    reference_free, needs = (False, ()) if loss is None else (loss.reference_free, loss.needs)
    return made_up_answers(lengths, [PAIR] * len(lengths), columns or Columns(), reference_free, needs)


def pair(row: int, prompt: int = 2, chosen: int = 3, rejected: int = 4, **columns) -> EncodedPreference:
    parts = [np.arange(1, n + 1, dtype=np.int32) for n in (prompt, chosen, rejected)]
    return EncodedPreference(parts[0], (parts[1], parts[2]), PAIR, Origin("rows.jsonl", row), columns)


PAIRS = [pair(i + 1, chosen=1 + i % 5, rejected=1 + i % 7, weight=1.0 + i % 3) for i in range(20)]
SCORES = {"chosen": 2.0, "rejected": 0.5}


def look(loss: Callable[[PairBatch], Tensor], pairs: list = PAIRS, eval_pairs: list = (), scope: str = "pair"):
    bound = BoundLoss("mine", lambda pairs, _: (loss(pairs), {}), {}, False, 1.0, None, scope=scope)
    look_at_loss(bound, pairs, eval_pairs)


LENGTHS = st.lists(st.tuples(st.integers(1, 900), st.integers(0, 900)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(BUILT_IN), lengths=LENGTHS, beta=st.floats(1e-3, 50))
def test_every_built_in_loss_passes_whatever_the_lengths_and_beta(name, lengths, beta):
    loss = bind_loss(name, {"beta": beta} if "beta" in PREFERENCE_LOSSES[name].knobs else {})
    columns = Columns({f"score_{side}": torch.full((len(lengths),), x) for side, x in SCORES.items()})
    answers = made_up(lengths, loss, columns)
    require_pure(loss, answers)
    assert loss.scope == "window" or not uses_batch(loss, answers)


def test_made_up_pairs_are_log_probabilities_of_a_policy_that_moved():
    pairs = made_up([(3, 2), (5, 0)]).pairs
    assert pairs.chosen_mask.sum(-1).tolist() == [3, 5] and pairs.rejected_mask.sum(-1).tolist() == [2, 0]
    for logps in (pairs.policy_chosen_logps, pairs.ref_chosen_logps):
        assert (logps <= 0).all() and (logps[~pairs.chosen_mask] == 0).all() and logps.dtype == torch.float32
    assert (pairs.chosen_logratio.abs() > 0.01).all()


def test_a_pair_alone_has_no_padding():
    alone = made_up([(3, 2), (5, 0)]).only(0).pairs
    assert alone.chosen_mask.tolist() == [[True] * 3] and alone.rejected_mask.tolist() == [[True] * 2]


# ---- of each pair by itself ----

USES_BATCH = {
    "centred": lambda pairs: (pairs.margin - pairs.margin.mean()) ** 2,
    "centred, no gradient through the centre": lambda pairs: -F.logsigmoid(pairs.margin - pairs.margin.mean().detach()),
    "sorted": lambda pairs: -F.logsigmoid(pairs.policy_chosen.sort()[0] - pairs.ref_chosen.sort()[0]),
    "weights that sum to one": lambda pairs: pairs.columns["weight"] / pairs.columns["weight"].sum() * pairs.margin,
    "its place in the batch": lambda pairs: pairs.margin * torch.arange(len(pairs.margin)),
    "its neighbour": lambda pairs: pairs.margin - pairs.chosen_logratio.roll(1),
    "log-mean-exp": lambda pairs: pairs.margin * 0 + torch.logsumexp(-pairs.margin / 10, 0),
    "padding": lambda pairs: -pairs.policy_chosen_logps.mean(-1),
    "deviation": lambda pairs: pairs.margin / pairs.margin.std(),
    "the two best": lambda pairs: pairs.margin - pairs.margin.topk(2).values.sum(),
}


@pytest.mark.parametrize("name", USES_BATCH)
def test_a_loss_over_other_pairs_that_does_not_say_so_is_refused(name):
    message = r"loss 'mine' gives a pair another value .*: register it with scope=\"window\", and it is given all pairs"
    with pytest.raises(ValueError, match=message) as caught:
        look(USES_BATCH[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", USES_BATCH)
def test_a_loss_over_other_pairs_that_says_so_may(name):
    look(USES_BATCH[name], scope="window")


def test_a_statistic_of_a_column_is_seen_though_the_first_rows_agree():
    rows = [pair(i, weight=float(i == 700)) for i in range(1000)]
    with pytest.raises(ValueError, match="when other pairs stand beside it"):
        look(lambda pairs: pairs.margin * (pairs.columns["weight"] - pairs.columns["weight"].mean()), rows)


def test_a_data_set_of_one_pair_has_nothing_to_compare():
    look(USES_BATCH["centred"], pairs=PAIRS[:1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_loss_says_nothing(name):
    rows = [dataclasses.replace(row, columns={f"score_{side}": x for side, x in SCORES.items()}) for row in PAIRS]
    look_at_loss(bind_loss(name, {}), rows, [])


# ---- of its pairs alone ----


def in_place(change: Callable[[PairBatch], None]) -> Callable[[PairBatch], Tensor]:
    def loss(pairs: PairBatch) -> Tensor:
        change(pairs)
        return -F.logsigmoid(0.1 * pairs.margin)

    return loss


IN_PLACE = {
    "policy_chosen_logps": lambda pairs: pairs.policy_chosen_logps.mul_(2),
    "policy_rejected_logps": lambda pairs: pairs.policy_rejected_logps.clamp_(min=-50),  # none is lower here
    "ref_chosen_logps": lambda pairs: pairs.ref_chosen_logps.data.zero_(),
    "ref_rejected_logps": lambda pairs: pairs.ref_rejected_logps.__isub__(1),
    "rejected_mask": lambda pairs: pairs.rejected_mask.fill_(True),
    "margin": lambda pairs: pairs.margin.sub_(1),
    "chosen_length": lambda pairs: pairs.chosen_length.add_(1),
    "columns": lambda pairs: pairs.columns["weight"].div_(2),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_loss_that_works_in_place_is_refused(name):
    with pytest.raises(ValueError, match=rf"loss 'mine' changes what it is given \({name}\): it must not work in"):
        look(in_place(IN_PLACE[name]))


@pytest.mark.parametrize("need", ["gold", "kl"])
def test_what_else_a_loss_needs_is_no_place_to_work_in_either(need):
    answers = made_up_answers([(3, 2), (4, 2)], [PAIR] * 2, Columns(), reference_free=False, needs=(need,))

    def mine(pairs: PairBatch) -> Tensor:
        values = pairs.gold_logps if need == "gold" else pairs.extras["kl"][0]
        values.mul_(2)
        return -F.logsigmoid(0.1 * pairs.margin)

    loss = BoundLoss("mine", lambda pairs, _: (mine(pairs), {}), {}, False, 1.0, None, needs=(need,))
    with pytest.raises(ValueError, match=r"changes what it is given \((gold_logps|extras)\)"):
        require_pure(loss, answers)


def test_a_loss_that_replaces_a_column_is_refused():
    with pytest.raises(ValueError, match=r"changes what it is given \(columns\)"):
        look(in_place(lambda pairs: pairs.columns.pop("weight")))


def counting() -> Callable[[PairBatch], Tensor]:
    calls = []
    return lambda pairs: pairs.margin * (calls.append(None) or len(calls))


RANDOM = {
    "noise": lambda pairs: pairs.margin + torch.randn(len(pairs.margin)),
    "dropout": lambda pairs: F.dropout(pairs.margin, 0.5),
    "a seed of its own": lambda pairs: pairs.margin * (1 + 0 * torch.manual_seed(0).initial_seed()),
    "python's random": lambda pairs: pairs.margin * random.random(),
    "a state": counting(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_loss_that_is_another_one_at_each_call_is_refused(name):
    with pytest.raises(ValueError, match="loss 'mine' is no function of its pairs alone: it draws random numbers, or"):
        look(RANDOM[name])


def test_the_look_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    look_at_loss(bind_loss("sigmoid", {}), PAIRS, [])
    with pytest.raises(ValueError, match="draws random numbers"):
        look(RANDOM["noise"])
    assert torch.equal(torch.get_rng_state(), before)


# ---- columns ----

READS = {
    "index": lambda pairs: pairs.columns["w"] * pairs.margin,
    "get": lambda pairs: pairs.columns.get("w", 1.0) * pairs.margin,
    "in": lambda pairs: pairs.margin * (2.0 if "w" in pairs.columns else 1.0),
}
GAPS = {"high": r"rows.jsonl row 18 has 'high'$", None: "rows.jsonl row 18 has none$"}


@pytest.mark.parametrize("value", GAPS)
@pytest.mark.parametrize("read", READS)
def test_a_column_that_is_a_number_in_some_rows_only_is_refused_with_the_first_other_row(read, value):
    rows = [pair(i, w=1.0, v=2.0) for i in range(1, 18)]
    rows += [
        pair(18, v=1.0, **({} if value is None else {"w": value})),
        pair(19, w="low", v=1.0),
        pair(20, w=1.0, v=0.5),
    ]
    named = "loss reads the column 'w'; columns of numbers here are v; 'w' is not one: "
    with pytest.raises(ValueError, match=named + GAPS[value]):
        look(READS[read], rows)


def test_evaluation_rows_need_the_columns_too():
    with pytest.raises(ValueError, match="'w' is not one: rows.jsonl row 3 has none"):
        look(READS["index"], [pair(1, w=1.0), pair(2, w=2.0)], [pair(3)])


def test_a_column_that_is_nowhere_is_refused_with_those_that_are_numbers_and_may_be_optional():
    with pytest.raises(ValueError, match="the loss reads the column 'w'; columns of numbers here are weight$"):
        look(READS["index"])
    look(READS["get"])
    look(READS["in"])


def test_columns_that_no_loss_reads_may_have_gaps():
    look_at_loss(bind_loss("sigmoid", {}), [pair(1, w=1.0), pair(2, w="high"), pair(3)], [])


def weighted(pairs: PairBatch) -> Tensor:
    return pairs.columns["weight"] * plain(pairs)


def plain(pairs: PairBatch) -> Tensor:
    return -F.logsigmoid(pairs.chosen_logratio - pairs.rejected_logratio)


ONES = [pair(1, weight=1.0), pair(2, weight=1.0)]


@pytest.mark.parametrize(
    ("loss", "pairs", "count"),
    [(plain, PAIRS, 13), (weighted, PAIRS, 0), (plain, ONES, 0), (plain, [pair(1, weight=2.0), pair(2)], 1)],
)
def test_weights_in_the_rows_that_a_loss_does_not_read_are_told(loss, pairs, count, capsys):
    look(loss, pairs)
    remedy = "loss_args.weight_column weight multiplies each row's loss by it"
    expected = f"loss mine does not use the column weight of {count} rows; {remedy}\n"
    assert capsys.readouterr().out == (expected if count else "")


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("rejected", [1.0, 5.0])
def test_a_pair_without_a_higher_score_is_refused_by_the_loss_of_its_logarithm(rejected, held_out):
    """One of thousands, and neither of its scores is the lowest or the highest of its column."""
    good = [pair(i + 1, score_chosen=float(i % 7), score_rejected=-1.0 - i) for i in range(3001)]
    good.append(pair(3002, score_chosen=9.0, score_rejected=8.0))
    bad = [*good[:41], pair(42, score_chosen=1.0, score_rejected=rejected), *good[42:]]
    refusal = "^rows.jsonl row 42: loss 'odpo' needs score_chosen above score_rejected in every pair$"
    with pytest.raises(ValueError, match=refusal):
        look_at_loss(bind_loss("odpo"), *((good, bad) if held_out else (bad, [])))


def test_no_row_is_named_for_what_all_are_refused_for(registry):
    def odd(pairs: PairBatch) -> Tensor:
        raise ValueError("never")

    with pytest.raises(ValueError, match="^never$"):
        look(odd, PAIRS)


def test_no_row_is_named_for_a_loss_that_draws(registry):
    chances = itertools.cycle([1.0, 0.0])
    with pytest.raises(ValueError, match="^loss 'mine' is no function of its pairs alone"):
        look(lambda pairs: pairs.margin * next(chances), PAIRS)


def test_scores_that_are_equal_to_a_loss_are_a_tie():
    """In float32, as a loss is given them; each column and the gap have more extreme rows."""
    rows = [pair(1, score_chosen=2.0, score_rejected=1.0), pair(2, score_chosen=2.0**25, score_rejected=1.0)]
    rows += [pair(3, score_chosen=2.0**24 + 1, score_rejected=2.0**24), pair(4, score_chosen=4.0, score_rejected=3.5)]
    rows.append(pair(5, score_chosen=2.0**25 + 4, score_rejected=2.0**25))
    with pytest.raises(ValueError, match="loss 'odpo' needs score_chosen above score_rejected in every pair"):
        look_at_loss(bind_loss("odpo"), [*rows, *rows[:2] * 20], [])


def test_the_pairs_looked_at_have_the_lowest_and_the_highest_number_of_each_column():
    rows = [pair(i, w=float(-abs(i - 331)), v=float(i == 5)) for i in range(1000)]
    chosen = {row.origin.row for row in varied(rows, {})}
    assert {331, 999, 5} <= chosen and len(chosen) < 16


# ---- whole runs ----


def register(loss: Callable[[PairBatch], Tensor], **options) -> str:
    def mine(pairs: PairBatch) -> Tensor:
        return loss(pairs)

    preference_loss("mine", **options)(mine)
    return "mine"


def test_a_run_refuses_before_it_loads_the_model(dpo_config, registry, monkeypatch):
    monkeypatch.setattr("phi2.training.session.Session.load_policy", None)
    with pytest.raises(ValueError, match="when other pairs stand beside it"):
        train(dpo_config(loss=register(USES_BATCH["centred"])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reference_free", [False, True])
def test_a_loss_that_is_no_number_on_real_rows_is_refused_before_the_first_update(
    dpo_config, registry, value, reference_free, monkeypatch
):
    monkeypatch.setattr("phi2.training.objective.Objective.update", None)
    loss = register(lambda pairs: pairs.policy_chosen * 0 + value, reference_free=reference_free)
    with pytest.raises(ValueError, match=f"step 1: loss 'mine' is {value}"):
        train(dpo_config(loss=loss))


def test_a_gradient_that_is_no_number_where_policy_and_reference_agree_is_refused(dpo_config, registry):
    loss = register(lambda pairs: (pairs.margin**2).sqrt())  # 0 there, its slope 0 / 0
    with pytest.raises(ValueError, match="step 1: loss 'mine' is 0, but its gradient is no number"):
        train(dpo_config(loss=loss))


# ---- rows that bring what a reference said ----


def test_log_probabilities_of_a_reference_in_the_rows_are_not_ignored(dpo_config, write_rows):
    row = {"prompt": "Q", "chosen": " a", "rejected": " b", "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}
    data = write_rows([row] * 4)
    with pytest.raises(ValueError) as caught:
        train(dpo_config(data=data, max_steps=1))
    assert f"{data} row 1 has ref_chosen_logps and ref_rejected_logps, and loss 'sigmoid' asks" in str(caught.value)
    assert "ignore_columns" in str(caught.value) and "\n" not in str(caught.value)
    named = ["ref_chosen_logps", "ref_rejected_logps"]
    assert (train(dpo_config(data=data, max_steps=1, ignore_columns=named)) / "adapter").exists()


def test_a_reference_free_loss_of_ones_own_reads_them(dpo_config, write_rows, metrics_of):
    @preference_loss("of_sums", reference_free=True)
    def of_sums(pairs: PairBatch) -> Tensor:
        margin = pairs.policy_chosen - pairs.policy_rejected
        return -F.logsigmoid(margin - (pairs.columns["ref_chosen_logps"] - pairs.columns["ref_rejected_logps"]))

    row = {"prompt": "Q", "chosen": " a", "rejected": " b"}
    losses = []
    for number in (-3.0, -50.0):
        data = write_rows([{**row, "ref_chosen_logps": number, "ref_rejected_logps": -4.0}] * 4)
        config = dpo_config(data=data, max_steps=1, loss="of_sums")
        run = train(dataclasses.replace(config, output=f"{config.output}{number}"))
        losses.append(metrics_of(run)[0]["loss"])
    assert losses[0] > losses[1] + 1
