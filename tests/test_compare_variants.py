"""What is compared: from texts, mappings and grids to settings of runs, all checked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from phi2.cli.commands import main
from phi2.data.config import DataSpec
from phi2.files import read_yaml
from phi2.keywords import config_of
from phi2.lab.compare import run
from phi2.lab.compare_config import CompareConfig
from phi2.lab.variants import entry_of, split_texts, variants_of


def test_variants_of_a_yaml_file_are_texts_mappings_and_a_grid(compare_config):
    variants = [
        "paper:ipo",
        "sigmoid:0.8,sft:0.2",
        {"loss": "sigmoid", "learning_rate": 1e-3, "ld_alpha": 0.5, "lora": {"r": 2, "target_modules": ["q_proj"]}},
    ]
    found = variants_of(compare_config(losses=None, variants=variants, grid={"beta": [0.1, 0.2]}))
    assert len(found) == 6 and len({variant.folder for variant in found}) == 6
    assert [variant.loss.number("beta") for variant in found[:2]] == [0.1, 0.2]
    last = found[-1].config
    assert (last.learning_rate, last.loss_args, last.beta, last.lora.r) == (1e-3, {"ld_alpha": 0.5}, 0.2, 2)


def test_a_grid_may_hold_the_losses(compare_config):
    found = variants_of(compare_config(losses=None, grid={"loss": ["sigmoid", "ipo"], "beta": [0.1, 0.2]}))
    assert [variant.name for variant in found] == [
        "sigmoid(beta=0.1)", "sigmoid(beta=0.2)", "ipo(beta=0.1)", "ipo(beta=0.2)"
    ]  # fmt: skip


def test_texts_are_cut_at_commas_outside_parentheses():
    assert split_texts("sigmoid, simpo(beta=2.0, gamma=1e-1),paper:ipo") == [
        "sigmoid", "simpo(beta=2.0, gamma=1e-1)", "paper:ipo"
    ]  # fmt: skip
    assert entry_of("simpo(beta=2.0, gamma=1e-1)") == {"loss": "simpo", "beta": 2.0, "gamma": 0.1}


@pytest.mark.parametrize("text", ["sigmoid:0.8,sft:0.2", "ipo, paper:ipo:1", "sigmoid:1e-1(beta=0.2)"])
def test_a_mixture_among_losses_is_not_cut_into_variants(text):
    with pytest.raises(ValueError, match="is a part of a mixture, and a comma parts variants here: give a list"):
        split_texts(text)


def test_a_list_of_losses_may_hold_a_mixture(compare_config):
    config = compare_config(losses=["sigmoid:0.8,sft:0.2", "ipo"])
    assert [variant.name for variant in variants_of(config)] == ["sigmoid:0.8,sft:0.2", "ipo"]


def test_a_loss_of_a_file_stands_beside_one_of_the_library(compare_config, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import phi2\n@phi2.preference_loss('mine')\ndef mine(pairs, *, beta: float = 0.1):\n"
        "    return -beta * pairs.margin\n"
    )
    first, second = variants_of(compare_config(losses="sigmoid,mine", loss_file=str(mine)))
    assert (first.config.loss_file, second.config.loss_file) == (None, str(mine))


REFUSED = {
    "no losses": ({"losses": ""}, "losses must name one loss at least"),
    "an unknown loss": ({"losses": "sigmoid,ipoo"}, "variant ipoo: loss must be one of .*did you mean ipo?"),
    "an unknown knob": ({"losses": "ipo(betta=1)"}, r"variant ipo\(betta=1\): .*'betta'; did you mean beta?"),
    "a misspelt setting": ({"losses": "ipo(learning_rat=1)"}, "did you mean learning_rate?"),
    "a knob without value": ({"losses": "ipo(beta)"}, r"a variant is written name or name\(setting=value, ...\)"),
    "the same twice": ({"losses": "ipo,sigmoid,ipo"}, "variant ipo is there twice"),
    "the same by another name": ({"losses": "sigmoid,paper:dpo"}, "variant paper:dpo is there twice, also as sigmoid"),
    "an empty grid": ({"grid": {"beta": []}}, "grid is empty: beta has no values"),
    "no grid": ({"grid": {}}, "grid is empty"),
    "too many": ({"losses": "ipo", "grid": {"beta": [i / 500 for i in range(1, 501)]}, "seeds": 3}, "1000 runs.*1500"),
    "a knob that is set twice": ({"losses": "ipo(beta=1)", "grid": {"beta": [1]}}, "beta is set in the variant"),
    "no seeds": ({"seeds": 0}, "seeds must be at least 1, got 0"),
    "another base": ({"losses": "ipo(dtype=float16)"}, "dtype is the same in all runs"),
    "a distance at equal steps": ({"match_kl": 0.1}, "match_kl 0.1 is for match: kl, got match: steps"),
    "a distance of nothing": ({"match": "kl", "match_kl": 0.0}, "match_kl must be above 0, got 0"),
    "an unknown baseline": ({"baseline": "simpo"}, "baseline must be one of"),
    "a reference that moves, asked beforehand": (
        {"sync_ref_model": True},
        r"needs precompute_ref_log_probs false, which is true in a comparison; .*sigmoid\(sync_ref_model=True\)",
    ),
    "no held-out pairs": ({"eval_data": None}, "a comparison needs held-out pairs: give eval_data or test_fraction"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_one_line_before_any_work(compare_config, case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        run(compare_config(**changes, output=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_settings_of_a_comparison_are_flags(compare_config, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    grid = {"loss": ["sigmoid", "ipo"], "beta": [0.1]}
    path.write_text(yaml.safe_dump({"model": "m", "data": "toy-dpo", "output": "o", "grid": grid}))
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(path), "--seeds", "5", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seeds"], shown["grid"]) == (5, grid)


def test_the_study_of_the_recipes_has_twenty_variants_and_five_seeds():
    config = config_of(CompareConfig, read_yaml(Path(__file__).parents[1] / "recipes/dpo_taxonomy.yaml"))
    assert len(variants_of(config)) == 20 and (config.seeds, config.match, config.match_kl) == (5, "kl", 0.1)


def test_toy_pairs_bring_held_out_ones(tmp_path):
    config = CompareConfig(model="m", data="toy-dpo", losses="ipo", output=str(tmp_path))
    assert config.eval_data == [DataSpec("toy-dpo", split="test", rows=200)]
