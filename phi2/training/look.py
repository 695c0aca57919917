"""The first look at a preference loss, before anything large is loaded: on rows of the run, with made-up log-probs.

A loss that keeps a state which it was not registered with, draws random numbers or works in place is refused. One that
gives a row another value when other rows stand beside it must say so, `scope="window"`: otherwise it would see a part
of an update's rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from phi2.data.columns import LOSS_COLUMNS
from phi2.data.encoded import EncodedPreference
from phi2.data.flat import flat_rows, of_each_layout
from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.bound import BoundLoss
from phi2.losses.knobs import told
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.properties import made_up_answers, require_pure, require_scope
from phi2.losses.registry import PREFERENCE_LOSSES
from phi2.training.scoring import column_gaps, numeric_columns

SPREAD = 8  # rows over the whole data set that are looked at
SCORES = ("score_chosen", "score_rejected")
REFERENCE_COLUMNS = {  # sums over answers, as trl writes and reads them under their names of now and before
    *("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"),
    *("reference_chosen_logps", "reference_rejected_logps", "reference_logps"),
}


def look_at_loss(loss: BoundLoss, rows: Sequence[EncodedPreference], eval_rows: Sequence[EncodedPreference]) -> None:
    """Refuses a loss that would train on something else than it says.

    Raises:
        ValueError: when the loss is not pure, when it reads a column that is not a number in every row, when a modifier
            leaves it as it is, when a row's value depends on other rows and the loss does not say so, or when the rows
            bring log-probabilities of a reference and the run would ask its own.
    """
    kinds = [*of_each_layout(rows), *of_each_layout(eval_rows)]
    require_one_reference(loss, kinds)
    gaps = column_gaps(kinds)
    looked_at = [row for each in (rows, eval_rows) for row in varied(each, gaps)]
    shown = shown_answers(looked_at, gaps, loss)
    try:
        require_pure(loss, shown)
    except ValueError as error:
        raise ValueError(f"{where(loss, looked_at, gaps, str(error))}{error}") from error
    for part in loss.single:
        require_effect(part, shown)
        require_use(part, shown)
        require_scope(part, shown)
    tell_unread(loss, shown, rows, eval_rows)


def where(loss: BoundLoss, rows: Sequence[EncodedPreference], gaps: dict[str, str], refusal: str) -> str:
    """The row that a loss refuses, "rows.jsonl row 3: "; nothing where it is not that row's fault alone."""

    def is_refused(row: EncodedPreference) -> bool:
        try:
            with torch.random.fork_rng(devices=[]):
                loss(shown_answers([row], gaps, loss))
        except ValueError as error:
            return str(error) == refusal
        return False

    refused = [row for row in rows if is_refused(row)]
    return f"{refused[0].origin}: " if 0 < len(refused) < len(rows) else ""


def tell_unread(loss: BoundLoss, answers: AnswerBatch, *data: Sequence[EncodedPreference]) -> None:
    """Prints which columns of a row's weight or an answer's label, not 1 everywhere, the loss leaves unread."""
    for name in LOSS_COLUMNS:
        numbers = np.concatenate([flat_rows(rows, "preference").numbers(name) for rows in data])
        count = int((~np.isnan(numbers) & (numbers != 1)).sum())
        if count and not reads(loss, name, answers):
            has_remedy = name == "weight" and loss.scope == "pair"
            remedy = "; loss_args.weight_column weight multiplies each row's loss by it" if has_remedy else ""
            print(f"loss {loss.name} does not use the column {name} of {count} rows{remedy}")


def reads(loss: BoundLoss, name: str, answers: AnswerBatch) -> bool:
    """Whether a loss is another one for other numbers in a column. One that is not there in every row is not read."""
    if name not in answers.columns.keys():
        return False
    other = Columns({**answers.columns, name: 0.5 * answers.columns[name] + 1}, answers.columns.gaps)
    return not torch.equal(loss(answers), loss(replace(answers, columns=other)))


def require_one_reference(loss: BoundLoss, rows: Sequence[EncodedPreference]) -> None:
    """Refuses rows with log-probabilities of a reference that nothing would look at."""
    for row in () if loss.reference_free else rows:
        if names := sorted(REFERENCE_COLUMNS.intersection(row.columns)):
            raise ValueError(
                f"{row.origin} has {' and '.join(names)}, and loss {loss.name!r} asks the reference itself, token by"
                " token: name them in ignore_columns, or register a loss with reference_free=True that reads them"
            )


def require_effect(loss: BoundLoss, answers: AnswerBatch) -> None:
    """Refuses a modifier that changes nothing which the loss reads, and one beside which a knob changes nothing."""
    for name in loss.modifiers:
        modifier, plain = MODIFIERS[name], loss.without(name)
        given = {knob: loss.knobs[knob] for knob in modifier.knobs.defaults}
        changed = {knob: value for knob, value in given.items() if value != modifier.knobs.defaults[knob]}
        if not modifier.may_miss:
            continue
        if changed and torch.allclose(loss(answers), plain(answers)):
            raise ValueError(f"{told(changed)} changes nothing in loss {loss.name!r}, which reads nothing it acts on")
        for knob in plain.knobs:
            if acts(plain, knob, answers) and not acts(loss, knob, answers):
                raise ValueError(f"{knob} of loss {loss.name!r} changes nothing beside {told(given)}")


def require_use(loss: BoundLoss, answers: AnswerBatch) -> None:
    """Refuses a number that only another choice of the loss makes use of."""
    registered = PREFERENCE_LOSSES.get(loss.name)
    if registered is None:
        return
    changed = {knob: loss.knobs[knob] for knob, value in registered.knobs.items() if loss.knobs[knob] != value}
    for choice, others in registered.choices.items():
        for knob in changed:
            users = [other for other in others if acts(loss.with_knob(choice, other), knob, answers)]
            if users and not acts(loss, knob, answers):
                beside = told({choice: loss.knobs[choice]})
                raise ValueError(
                    f"{told({knob: changed[knob]})} changes nothing in loss {loss.name!r} beside {beside}, but beside"
                    f" {', '.join(users)}"
                )


def acts(loss: BoundLoss, knob: str, answers: AnswerBatch) -> bool:
    """Whether a number among a loss's knobs has an effect on these answers; one that is refused as it is has none."""
    value = loss.number(knob)
    if value is None:
        return False
    try:
        other = loss.with_knob(knob, 0.5 * value)
    except ValueError:  # another knob leaves it without effect
        return False
    return not torch.equal(loss(answers), other(answers))


def varied(rows: Sequence[EncodedPreference], gaps: dict[str, str]) -> list[EncodedPreference]:
    """Some rows of a data set, among them those with the lowest and the highest number in each column, score, and gap
    between the scores of a chosen and a rejected answer."""
    if not rows:
        return []
    flat = flat_rows(rows, "preference")
    columns = [name for name in flat[0].columns if name not in gaps]
    with np.errstate(over="ignore"):
        by = {name: flat.numbers(name).astype(np.float32) for name in columns}  # as a loss is given them
    extremes = [*by.values(), flat.first_scores]
    if {*SCORES} <= by.keys():
        extremes.append(by[SCORES[0]] - by[SCORES[1]])
    spread = range(0, len(flat), max(1, len(flat) // SPREAD))[:SPREAD]
    places = [*spread, *(int(end(values)) for values in extremes for end in (np.argmin, np.argmax))]
    return [flat[place] for place in dict.fromkeys(places)]


def shown_answers(rows: Sequence[EncodedPreference], gaps: dict[str, str], loss: BoundLoss) -> AnswerBatch:
    """What a loss is shown of them: their lengths, scores and columns, and made-up log-probabilities."""
    compared = [slice(len(row.answers) - row.has_gold) for row in rows]
    lengths = [[len(answer) for answer in row.answers[each]] for row, each in zip(rows, compared, strict=True)]
    scores = [row.scores[each] for row, each in zip(rows, compared, strict=True)]
    columns = numeric_columns(rows, gaps, torch.device("cpu"))
    return made_up_answers(lengths, scores, columns, loss.reference_free, loss.needs)
