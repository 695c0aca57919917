"""What `phi2 losses` says: every loss with its formula, knobs and needs, for a terminal or as docs/losses.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from textwrap import fill
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2.losses.batch import Columns, Unit
from phi2.losses.bound import bind_loss
from phi2.losses.knobs import told
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.plot import WIDTH as POINTS
from phi2.losses.plot import plots
from phi2.losses.presets import PRESETS, Preset
from phi2.losses.properties import made_up_answers
from phi2.losses.registry import PREFERENCE_LOSSES, Need, PreferenceLoss

WIDTH = 118
ANSWERS: dict[Unit, str] = {"answer": "labels", "prompt": "several answers"}
OTHER_NEEDS: dict[Need, str] = {
    "gold": "gold answer (column reference)",
    "mismatched": "answers to other prompts",
    "entropy": "entropy of each token",
    "log_sum_square": "log sum p^2 of each token",
    "kl": "KL to the reference at each token",
}
LEFT_OUT = {  # of those a survey names
    "BNF": "needs the reference's probability of ids that were not said, as targets",
    "QRPO": "needs rewards of the reference's own samples beside those of the answers",
    "FocalPO": "the constant of its factor was not found: the authors' repository has no code",
    "SPO (SiLU)": "oxRL's -z sigma(z) falls without end, its own text tells of a minimum; no other source was found",
    "SquaredPO": "e^-l of a whole answer overflows, and how the paper normalises it was not found",
    "RC (disentanglement band)": "needs gradients of the run",
    "TR-DPO, BEMA": "move the reference of any loss: `--sync_ref_model`, docs/references.md",
    "D2PO, TIS-DPO, ConfPO, TGDPO, MaPPO, xi-DPO, SA-DPO, ASFT": "no formula was found in code or could be checked",
    "DDO-RM": "no code was found, and how it centres its rewards could not be checked",
}
INTRO = """# Preference losses

By `phi2 losses --markdown`. `phi2 losses NAME` says more of one, how it differs from its paper or from trl, and draws
it. How each is checked: [losses_checks.md](losses_checks.md).

s = sum of log pi(y|x) over the answer, r = the same under the reference, l = s - r, n = tokens of the answer, w =
chosen, l as index = rejected, sigma = logistic function, sg = a number without gradient. Families:
`phi2/losses/logistic.py`, `links.py`, `pointwise.py`, `reference_free.py`, `scored.py`, `window.py`, `unpaired.py`,
`listwise.py`.

Most losses compare a chosen with a rejected answer. Given k answers to a prompt with a score each
([formats.md](formats.md)), such a loss is the mean over all pairs of which one is better. A loss that needs labels
takes single answers, good or bad, and of a pair or of a list of labelled answers each one. A loss that needs several
answers takes a list, of which a pair is the shortest. A gold answer is a third one, which is imitated and compared with
nothing. A mixture takes what all its parts can be given.

A loss that needs the window depends on all rows of an update: it sees them at once, however they are cut into passes,
in two phases where there are several. Numbers that it keeps from one update to the next are part of checkpoints and of
`metrics.jsonl`, as `state/NAME`: one that starts whole (a count) is a number of Python, any other a tensor of shape (),
so that no GPU is waited for. Evaluation takes all its rows as one window and moves no state. Answers to other prompts,
by which KTO estimates a KL, are those of the row before in the window; they cost another pass of both models, without
gradient.

## Your own

One function in a file of yours, `phi2 dpo --loss_file mine.py --loss margin_to_best`. Of pairs it is given a
`phi2.PairBatch` and returns a value of each pair; with `unit="answer"` or `unit="prompt"` it is given a
`phi2.AnswerBatch` and returns a value of each answer, or of each prompt:

```python
import phi2
import torch
import torch.nn.functional as F


@phi2.preference_loss("margin_to_best", unit="prompt")
def margin_to_best(answers: phi2.AnswerBatch, *, beta: float = 0.1):
    # The best answer to each prompt against the mean of all: -log sigma(beta (l_w - mean(l)))
    ratios = answers.grid(answers.logratio)  # (P, K), 0 where a prompt has fewer answers than K
    count = answers.grid(torch.ones_like(answers.logratio)).sum(dim=-1)  # (P,) answers to each prompt
    return -F.logsigmoid(beta * (ratios[:, 0] - ratios.sum(dim=-1) / count))  # best first
```

A loss of windows that keeps numbers is called with them, and gives back the values and the numbers behind the update:

```python
@phi2.preference_loss("centred", scope="window", state={"mean": 0.0, "updates": 0})
def centred(pairs: phi2.PairBatch, state: dict, *, beta: float = 0.1):
    # DPO against the mean margin so far, a tensor of shape (); updates is a Python number, since it starts whole
    mean = 0.9 * state["mean"] + 0.1 * pairs.margin.detach().mean()
    return -F.logsigmoid(beta * (pairs.margin - mean)), {"mean": mean, "updates": state["updates"] + 1}
```

## Losses
"""
ON_PRESETS = """\
## Presets

A loss as its paper (`paper:`) or a library (`trl:`, `halos:`, `tulu3:`) has it: the name stands for a loss or a mixture
with knobs set, wherever a loss is named. Knobs that are given beside it win.
"""
ON_MODIFIERS = """## Modifiers

With any loss, also with yours: `--loss_args.ld_alpha 0.5`. A mixture is a weighted sum, `--loss sigmoid:0.8,sft:0.2`;
knobs go to every part that takes them; in a YAML file `loss` may be a list, each part with `loss`, `weight` and `args`
of its own. The likelihood of the chosen answers comes in two kinds: `sft`, a mean per sequence, and a mean over all
tokens of the update, `--nll_weight` in one phase and `sft_tokens` as a part like any other.
"""


class About(NamedTuple):
    """What a docstring says: the first paragraph, what stands below it, and its source."""

    formula: str
    notes: str
    source: str


def about(function: Callable[..., Any]) -> About:
    text, _, source = (inspect.getdoc(function) or "").partition("Source:")
    formula, _, notes = text.strip().partition("\n\n")
    return About(_line(formula), notes.strip(), _line(source).rstrip("."))


def _line(text: str) -> str:
    return " ".join(text.split())


def needs(loss: PreferenceLoss) -> str:
    """The reference, what answers, the whole window, what it keeps from one update to the next, and its columns."""
    reference = [] if loss.reference_free else ["reference"]
    answers = [ANSWERS[loss.unit]] if loss.unit in ANSWERS else []
    others = [OTHER_NEEDS[need] for need in loss.needs]
    window = ["window"] if loss.scope == "window" else []
    state = [f"state ({', '.join(loss.state)})"] if loss.state else []
    return ", ".join(reference + answers + others + window + state + columns_of(loss)) or "nothing"


def columns_of(loss: PreferenceLoss) -> list[str]:
    """Names of the columns that a loss asks for, found out by calling it."""
    columns = AnyColumn(2)
    answers = made_up_answers([(2, 3), (3, 1)], [(1.0, 0.0)] * 2, columns, loss.reference_free, loss.needs)
    batch = answers.pairs if loss.unit == "pair" else answers
    loss(*([batch, loss.state] if loss.state else [batch]))
    return list(columns.asked)


class AnyColumn(Columns):
    """Has whatever column is asked for, the same number for every prompt: 0 for the rejected answer, 1 for all else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.asked = count, dict[str, Tensor]()

    def __missing__(self, name: str) -> Tensor:
        return self.asked.setdefault(name, torch.full((self.count,), 0.0 if name.endswith("rejected") else 1.0))


def own_losses() -> dict[str, PreferenceLoss]:
    return {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own}


def overview() -> str:
    """All losses, modifiers and presets, for a terminal."""
    losses = [
        _entry(name, loss.function, f"{told(loss.knobs) or 'no knobs'}; needs {needs(loss)}")
        for name, loss in PREFERENCE_LOSSES.items()
    ]
    modifiers = [_entry(name, each.function, told(each.knobs.defaults)) for name, each in MODIFIERS.items()]
    presets = [f"{name:<20} {_stands_for(preset)}" for name, preset in PRESETS.items()]
    return "\n".join(
        [
            "Losses (--loss NAME; several with weights: --loss sigmoid:0.8,sft:0.2)",
            "",
            *losses,
            "",
            "Modifiers, with any loss (--loss_args.KNOB VALUE)",
            "",
            *modifiers,
            "",
            "Presets (--loss NAME)",
            "",
            *presets,
            "",
            "phi2 losses NAME explains one and draws it.",
        ]
    )


def _entry(name: str, function: Callable[..., Any], knobs: str) -> str:
    formula, _, source = about(function)
    below = [fill(line, WIDTH, initial_indent=" " * 15, subsequent_indent=" " * 15) for line in (knobs, source)]
    first = fill(f"{name:<14} {formula}", WIDTH, subsequent_indent=" " * 15)
    return "\n".join([first, *below])


def _stands_for(preset: Preset) -> str:
    return f"{preset.loss} with {told(preset.knobs)}: {preset.note}"


def page(name: str, loss_file: str | None = None) -> str:
    """One loss, preset or mixture: what it is, and how it looks.

    Raises:
        ValueError: for a name that is none; FileNotFoundError when there is no such loss file.
    """
    loss = bind_loss(name, None, loss_file)
    texts = [f"{name}: {_stands_for(PRESETS[name])}"] if name in PRESETS else []
    for part in loss.single:
        registered = PREFERENCE_LOSSES[part.name]
        doc = inspect.getdoc(registered.function) or "It has no docstring."
        texts.append(f"{part.name}\n\n{doc}\n\nKnobs: {told(part.knobs) or 'none'}\nNeeds: {needs(registered)}")
    return "\n\n".join([*texts, plots(loss, AnyColumn(POINTS))])


def document() -> str:
    """docs/losses.md: every loss of this package, modifier and preset."""
    losses = [_row("`--loss`", "what it is", "knobs", "needs", "source"), "|---" * 5 + "|"]
    for name, loss in own_losses().items():
        formula, _, source = about(loss.function)
        losses.append(_row(f"`{name}`", formula, told(loss.knobs), needs(loss), source))
    modifiers = [_row("modifier", "what it does", "knobs", "source"), "|---" * 4 + "|"]
    for name, each in MODIFIERS.items():
        formula, _, source = about(each.function)
        modifiers.append(_row(f"`{name}`", formula, told(each.knobs.defaults), source))
    presets = [_row("`--loss`", "stands for", "with", "what sets it apart"), "|---" * 4 + "|"]
    presets += [_row(f"`{name}`", f"`{p.loss}`", told(p.knobs), p.note) for name, p in PRESETS.items()]
    left_out = [f"- {names}: {reason}." for names, reason in LEFT_OUT.items()]
    parts = [INTRO, *losses, "", ON_MODIFIERS, *modifiers, "", ON_PRESETS, *presets, "", "## Left out\n", *left_out]
    return "\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
