"""Losses as a paper or a library has them: what `--loss paper:ipo` stands for, and where it differs from the others.

A preset is a loss or a mixture with knobs set; knobs that are given beside it win. Where a recipe has more than a loss
(HALOs' moving reference), or there is a cheaper way to a part of it (trl's `sft` term over the tokens of a batch), the
note says what is missing or what to add.
"""

from __future__ import annotations

from typing import NamedTuple

from phi2.losses.knobs import Knob


class Preset(NamedTuple):
    """A loss or mixture as `--loss` takes it, its knobs, and in words what sets it apart."""

    loss: str
    knobs: dict[str, Knob]
    note: str


PRESETS = {
    "paper:dpo": Preset("sigmoid", {"beta": 0.1}, "trl's `sigmoid` is the same"),
    "paper:ipo": Preset(
        "ipo", {"beta": 0.1, "reduction": "sum"}, "sums over tokens, as arXiv:2310.12036 writes; trl has means"
    ),
    "trl:ipo": Preset("ipo", {"beta": 0.1}, "means per token, which trl says the authors confirmed"),
    "paper:simpo": Preset(
        "simpo",
        {"beta": 2.0, "gamma": 1.0},
        "the lowest beta the authors try, and gamma / beta 0.5; trl adds a likelihood term",
    ),
    "trl:simpo": Preset(
        "simpo:1,sft:1",
        {"beta": 0.1, "gamma": 0.5},
        "the CPO trainer's defaults, cpo_alpha 1 included, which SimPO has not; the likelihood is a mean per sequence"
        " here, per token of a micro-batch there",
    ),
    "trl:cpo": Preset("cpo", {"beta": 0.1, "cpo_alpha": 1.0}, "but for the likelihood, a mean per sequence here"),
    "paper:orpo": Preset(
        "orpo", {"beta": 0.25}, "lambda of its Phi-2 runs; trl has 0.1, and the prompt in the likelihood term"
    ),
    "trl:tpo_l": Preset(
        "tpo",
        {"beta": 0.01, "contrast": "tpo_l", "tpo_l_gamma": 0.5},
        "trl's defaults; the contrast is `simpo`, the likelihood of a third answer is beside it",
    ),
    "halos:slic": Preset("slic", {"delta": 1.0, "slic_lambda": 0.1}, "HALOs weighs the likelihood token by token"),
    "paper:rso": Preset("hinge", {"beta": 0.05}, "trl's `hinge` with another beta"),
    "halos:cdpo": Preset("cdpo", {"beta": 0.1, "label_smoothing": 0.2}, "trl has no cDPO"),
    "halos:humanline_dpo": Preset(
        "sigmoid",
        {"beta": 0.1, "humanline_min": -1.0, "humanline_max": 1.5},
        "the clamp alone; the reference does not follow the policy as it does there",
    ),
    "paper:exo": Preset(
        "exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, "trl has the same, and wants its label_smoothing set"
    ),
    "paper:bco": Preset("bco", {"beta": 0.01}, "with the shift by a running mean; trl's `bco_pair` leaves it out"),
    "trl:bco_pair": Preset("bco_pair", {"beta": 0.1}, "trl's default beta"),
    "trl:nca_pair": Preset("nca_pair", {"beta": 0.1}, "trl's default beta; the paper has 0.01"),
    "paper:kto": Preset(
        "kto", {"beta": 0.1}, "z is estimated over the update, where paper and trl take it over a micro-batch"
    ),
    "paper:infonca": Preset(
        "infonca", {"beta": 0.01, "temperature": 1e-4}, "its authors' knobs: all weight on the best answer"
    ),
    "paper:nca": Preset(
        "nca", {"beta": 0.01, "temperature": 1e-4}, "its authors' knobs; of two answers, what trl calls `nca_pair`"
    ),
    "paper:sppo": Preset("sppo", {"beta": 0.001}, "wins by the scores of k answers; trl has certain ones, of pairs"),
    "trl:sppo_hard": Preset("sppo_hard", {"beta": 0.1}, "trl's default beta; the paper has 0.001"),
    "trl:discopop": Preset("discopop", {"beta": 0.1, "discopop_tau": 0.05}, "trl's default beta; the paper has 0.05"),
    "trl:mpo": Preset(
        "sigmoid:0.8,bco_pair:0.2",
        {"beta": 0.1},
        "add `--nll_weight 1` for its `sft` term, which counts tokens: a mean per sequence is `sft` here",
    ),
    "tulu3:dpo_norm": Preset("sigmoid_norm", {"beta": 5.0}, "trl's `sigmoid_norm` is the same"),
    "paper:sampo": Preset(
        "sigmoid", {"beta": 0.1, "sampo_seed": 0}, "a pair keeps its drawn tokens; the authors draw anew; not in trl"
    ),
    "trl:ld_dpo": Preset("sigmoid", {"beta": 0.1, "ld_alpha": 0.5}, "on policy and reference, as in trl"),
    "paper:f_dpo": Preset(
        "sigmoid",
        {"beta": 0.1, "f_divergence_type": "js_divergence"},
        "one of the paper's divergences; trl has the same four",
    ),
    "paper:caldpo": Preset("caldpo", {"beta": 0.001}, "with the half of the authors' code; not in trl"),
}
