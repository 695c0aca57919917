"""`phi2 losses`: the table of all, the page of one with its drawing, and docs/losses.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from phi2.cli.commands import main
from phi2.losses.batch import Columns
from phi2.losses.bound import bind_loss
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.plot import HEIGHT, UNDRAWN, WIDTH, plots
from phi2.losses.presets import PRESETS
from phi2.losses.properties import made_up_answers, uses_batch
from phi2.losses.registry import PREFERENCE_LOSSES, preference_loss
from phi2.losses.table import AnyColumn, about, columns_of, document, needs, own_losses

ROOT = Path(__file__).parents[1]
OWN = list(own_losses())


def printed(capsys, *arguments: str) -> str:
    assert main(["losses", *arguments]) == 0
    return capsys.readouterr().out


def test_the_committed_table_of_losses_is_the_registry():
    assert (ROOT / "docs" / "losses.md").read_text(encoding="utf-8") == document()  # phi2 losses --markdown


def test_the_readme_counts_the_losses():
    assert f"[docs/losses.md](docs/losses.md)): {len(OWN)}, from" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_markdown_is_the_page_and_nothing_else(capsys):
    assert printed(capsys, "--markdown") == document()


def test_the_table_names_every_loss_modifier_and_preset_with_its_knobs(capsys):
    text = printed(capsys)
    for name, knobs in {n: loss.knobs for n, loss in PREFERENCE_LOSSES.items()}.items():
        assert f"\n{name} " in text and all(f"{knob} {value}" in text for knob, value in knobs.items())
    assert all(f"\n{name} " in text for name in (*MODIFIERS, *PRESETS))
    assert max(map(len, text.partition("Presets")[0].splitlines())) <= 120


@pytest.mark.parametrize("name", OWN)
def test_every_loss_says_its_formula_and_its_source(name):
    formula, _, source = about(PREFERENCE_LOSSES[name].function)
    assert formula and source


def test_the_columns_that_a_loss_reads_are_found_by_calling_it():
    read = {name: columns_of(loss) for name, loss in own_losses().items()}
    scored = {"odpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"}
    assert {name for name, columns in read.items() if columns} == scored
    assert all(read[name] == ["score_chosen", "score_rejected"] for name in scored)


def test_a_page_explains_a_loss_and_draws_it(capsys):
    text = printed(capsys, "ipo")
    assert "arXiv:2310.12036 Eq. 17" in text and "Knobs: beta 0.1" in text and "Needs: reference" in text
    assert "weight, -dL/ds_w" in text and "margin l_w - l_l, in nats" in text


def test_a_page_explains_the_parts_of_a_preset(capsys):
    text = printed(capsys, "trl:mpo")
    assert "--nll_weight 1" in text and "\nsigmoid\n" in text and "\nbco_pair\n" in text


def test_what_a_loss_of_windows_needs_is_told(capsys):
    assert "needs reference, window, state (mean, answers)" in printed(capsys)
    text = printed(capsys, "bco")
    assert "Needs: reference, window, state (mean, answers)" in text
    assert text.endswith("Not drawn: a value depends on the others of its window.\n")


NEEDS = {
    "kto": "reference, labels, answers to other prompts",
    "bco_unpaired": "reference, labels, window, state (mean, answers)",
    "plackett_luce": "reference, several answers",
    "rrhf": "several answers",
    "tpo": "gold answer (column reference), window",
}


@pytest.mark.parametrize("name", NEEDS)
def test_which_answers_a_loss_needs_is_told(name):
    assert needs(PREFERENCE_LOSSES[name]) == NEEDS[name]


def test_a_loss_of_ones_own_has_a_page_too(capsys, tmp_path, registry):
    path = tmp_path / "mine.py"
    path.write_text("import phi2\n@phi2.preference_loss('mine')\ndef mine(pairs):\n    return -2 * pairs.margin\n")
    text = printed(capsys, "mine", "--loss_file", str(path))
    assert "It has no docstring." in text and "margin l_w - l_l" in text


def test_an_unknown_name_is_told_with_the_nearest(capsys):
    assert main(["losses", "ippo"]) == 1
    assert capsys.readouterr().err.endswith("got 'ippo'; did you mean ipo?\n")


def test_markdown_beside_a_name_is_refused(capsys):
    assert main(["losses", "ipo", "--markdown"]) == 1
    assert "markdown prints the losses of this package" in capsys.readouterr().err


# ---- the drawing ----


def rows_of(drawing: str, title: str) -> list[str]:
    lines = drawing.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == title) + 1
    return [line.partition("|")[2] for line in lines[first : first + HEIGHT]]


def test_the_drawing_has_the_values_at_its_ends():
    # hinge, beta 0.1: 1 + 4 at a margin of -40, 0 from 10 on; its weight is 0.1, then 0
    drawing = plots(bind_loss("hinge"), Columns())
    assert "        5 |*" in drawing and "      0.1 |*" in drawing
    loss, weight = rows_of(drawing, "loss"), rows_of(drawing, "weight, -dL/ds_w")
    assert loss[0].startswith("*") and loss[-1].endswith("*" * 20) and len(loss[-1]) == 61
    assert weight[0] == "*" * 38 and weight[-1] == " " * 38 + "*" * 23  # a margin of 10 is at 37.5 of 60


TITLES = {
    "pair": ["loss", "weight, -dL/ds_w"],
    "prompt": ["loss", "weight, -dL/ds_1"],
    "answer": ["loss of a good answer", "weight, -dL/ds", "loss of a bad answer", "weight, dL/ds"],
}
OF_OTHERS = ("aot", "aot_unpaired", "dr_dpo", "beta_dpo", "alphadpo", "amapo", "bco", "bco_unpaired")


@pytest.mark.parametrize("name", OWN)
def test_every_margin_has_one_mark_in_each_drawing(name):
    drawing = plots(bind_loss(name), AnyColumn(WIDTH))
    assert (drawing == UNDRAWN) == (name in OF_OTHERS)
    for title in TITLES[PREFERENCE_LOSSES[name].unit] if drawing != UNDRAWN else []:
        marks = torch.tensor([[c == "*" for c in row.ljust(61)] for row in rows_of(drawing, title)])
        assert (marks.sum(dim=0) == 1).all(), title


def test_a_loss_of_labels_is_drawn_for_a_good_and_for_a_bad_answer():
    # kto, beta 0.1, z = 0: 1 - sigma(-4) of a good answer at l = -40, and mirrored of a bad one
    drawing = plots(bind_loss("kto"), AnyColumn(WIDTH))
    good, bad = (rows_of(drawing, f"loss of a {kind} answer") for kind in ("good", "bad"))
    assert "    0.982 |*" in drawing and good[0].startswith("*") and bad[0].endswith("*")
    assert [row.ljust(61)[::-1] for row in good] == [row.ljust(61) for row in bad]
    assert drawing.count("l, in nats") == 2


def test_a_loss_of_lists_is_drawn_as_the_pair_that_is_its_shortest():
    assert (
        plots(bind_loss("plackett_luce"), Columns()).splitlines()[1:13]
        == (plots(bind_loss("sigmoid"), Columns()).splitlines()[1:13])
    )
    assert "margin l_1 - l_2 of two answers, in nats" in plots(bind_loss("plackett_luce"), Columns())


# ---- a loss of one's own ----


def test_the_loss_in_the_introduction_works(registry, tmp_path):
    code = document().partition("```python\n")[2].partition("```")[0]
    path = tmp_path / "mine.py"
    path.write_text(code)
    loss = bind_loss("margin_to_best", {"beta": 2.0}, path)
    answers = made_up_answers([(2, 3, 1), (4, 2)], [(3.0, 2.0, 1.0), (1.0, 0.0)], Columns(), False)
    first, second = answers.logratio[:3], answers.logratio[3:]
    gaps = torch.stack([first[0] - first.mean(), second[0] - second.mean()])
    torch.testing.assert_close(loss(answers), -logsigmoid(2 * gaps))
    assert not uses_batch(loss, answers)


def test_a_curve_that_is_no_number_is_not_drawn(registry):
    @preference_loss("root")
    def root(pairs):
        return pairs.margin.sqrt()

    assert "Not drawn: it is not everywhere a finite number." in plots(bind_loss("root"), Columns())
