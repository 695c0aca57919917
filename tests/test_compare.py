"""Variants and seeds on one session: each run is a plain one, and the table is the same however it was come by."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import phi2
from phi2.cli.commands import main
from phi2.data.config import DataSpec
from phi2.inference.generate import choices_of
from phi2.lab import compare
from phi2.lab.compare import Bench, run
from phi2.lab.comparison import Comparison, at_kl, farthest_common_kl
from phi2.lab.measure import Measure
from phi2.lab.variants import variants_of
from phi2.lora import disabled
from phi2.runs.log import Interrupted
from phi2.training import dpo
from phi2.training.config import DPOConfig
from phi2.training.packing import row_of_answers
from phi2.training.reference import score
from phi2.training.scoring import Scored, answer_batch


@pytest.fixture(scope="module")
def comparison(compare_config) -> Comparison:
    return run(compare_config())


def cell(comparison: Comparison, variant: str, seed: int) -> Path:
    (row,) = (row for row in comparison.rows if (row["variant"], row["seed"]) == (variant, seed))
    return comparison / row["run"]


@pytest.mark.parametrize("variant, changes", [("sigmoid", {}), ("simpo(beta=2.0)", {"loss": "simpo", "beta": 2.0})])
def test_a_cell_is_bit_for_bit_the_plain_run_with_its_own_reference_pass(
    comparison, compare_config, variant, changes, tmp_path, metrics_of, assert_same_weights
):
    own = {field.name: getattr(compare_config(), field.name) for field in fields(DPOConfig) if field.name != "loss"}
    reference = {} if variant == "sigmoid" else {"precompute_ref_log_probs": False}
    settings = {**own, **reference, "seed": 43, "output": str(tmp_path / "plain"), **changes}
    plain = dpo.train(DPOConfig(**settings))
    ours = cell(comparison, variant, 43)
    assert metrics_of(ours) == metrics_of(plain)
    assert_same_weights(ours, plain.path)
    assert {path.name for path in plain.path.iterdir()} - {"reference"} <= {path.name for path in ours.iterdir()}


def test_two_comparisons_give_the_same_bytes(comparison, compare_config):
    again = run(compare_config())
    assert (again / "results.jsonl").read_bytes() == (comparison / "results.jsonl").read_bytes()
    assert str(again) == str(comparison)


KILLED = """
import os, signal, torch

from phi2.lab import compare
from phi2.lab.compare_config import CompareConfig
from phi2.data.config import DataSpec
from phi2.lora_config import LoraConfig
from phi2.training import loop

seen = 0

def kill(loss, step):
    global seen
    seen += 1
    if seen == {update}:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
loop.require_finite = kill
compare.run({config!r})
"""


def test_a_killed_comparison_goes_on_to_the_same_table(comparison, compare_config, metrics_of):
    """Killed in the second run, behind its first checkpoint."""
    config = compare_config(save_steps=2)
    code = KILLED.format(update=7, config=config)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(replace(config, resume=True))
    assert (resumed / "results.jsonl").read_bytes() == (comparison / "results.jsonl").read_bytes()
    assert metrics_of(cell(resumed, "sigmoid", 43)) == metrics_of(cell(comparison, "sigmoid", 43))


def test_a_finished_run_is_not_run_again(compare_config, monkeypatch):
    config = compare_config(losses="sigmoid,ipo", seeds=1)
    first = run(config)
    table = (first / "results.jsonl").read_bytes()
    shutil.rmtree(first / "cells" / "ipo")
    fitted = []
    fit = dpo.fit
    monkeypatch.setattr(
        dpo, "fit", lambda session, config, watch: fitted.append(config.loss) or fit(session, config, watch)
    )
    assert (run(replace(config, resume=True)) / "results.jsonl").read_bytes() == table
    assert fitted == ["ipo"]


def test_runs_in_two_processes_give_the_same_table(comparison, compare_config):
    assert (run(compare_config(jobs=2)) / "results.jsonl").read_bytes() == (comparison / "results.jsonl").read_bytes()


def test_no_run_is_handed_out_before_a_process_is_free(compare_config):
    """What waits in a process begins even behind Ctrl-C."""
    handed = []

    class Pool:
        def submit(self, function, *which):
            handed.append(which)
            done = Future()
            done.set_result(None)
            return done

    config = compare_config()
    cells = Bench(config, variants_of(config)).cells
    finished = compare._finished(Pool(), cells, jobs=2)
    counts = [len(handed) for _ in finished]
    assert counts == [2, 3, 4, 4] and handed == [(cell.variant.name, cell.seed) for cell in cells]


def test_ctrl_c_among_several_processes_says_how_to_go_on(compare_config, monkeypatch):
    def stopped(pool, cells, jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_finished", stopped)
    with pytest.raises(Interrupted, match="^stopped; go on with resume: true$"):
        run(compare_config(jobs=2))


def test_a_comparison_has_arrays_runs_and_a_table(comparison):
    assert comparison.variants == ["sigmoid", "simpo(beta=2.0)"] and comparison.seeds == [42, 43]
    assert comparison.metrics["accuracy"].shape == (2, 2)
    margin = comparison.metrics["chosen_drift"] - comparison.metrics["rejected_drift"]
    np.testing.assert_allclose(comparison.metrics["margin"], margin)
    assert (comparison.metrics["kl"] > 0).all() and (comparison.metrics["length"] >= 1).all()
    assert comparison.runs("sigmoid")[0].config["loss"] == "sigmoid"
    with pytest.raises(ValueError, match="variant must be one of .*, got 'sigmod'; did you mean sigmoid"):
        comparison.runs("sigmod")
    assert str(comparison).splitlines()[1].startswith("sigmoid") and "<table" in comparison._repr_html_()
    assert str(phi2.Comparison(comparison.path)) == str(comparison)


def drifts_of(comparison: Comparison, variant: str, reference: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """By log-ratios to the base or another reference over the held-out pairs: of chosen and rejected answers."""
    model, _ = comparison.runs(variant)[0].load(device="cpu")
    base, _ = phi2.load(reference or comparison.config["model"], device="cpu")
    config = DPOConfig(**{k: comparison.config[k] for k in ("model", "data", "output")})
    pairs = phi2.start(config).rows.train
    tokens = row_of_answers(pairs)
    batch = answer_batch(pairs, Scored(score(model, tokens), score(base, tokens), {})).pairs
    return batch.chosen_logratio, batch.rejected_logratio


def test_a_loss_without_reference_is_measured_like_the_others(comparison):
    """By what its own run does not know."""
    chosen, rejected = drifts_of(comparison, "simpo(beta=2.0)")
    row = next(row for row in comparison.rows if (row["variant"], row["seed"]) == ("simpo(beta=2.0)", 42))
    assert row["metrics"]["chosen_drift"] == pytest.approx(chosen.mean().item(), abs=1e-4)
    assert row["metrics"]["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def test_a_run_whose_reference_moves_is_measured_from_where_it_began(compare_config):
    """At the end its reference is the policy itself."""
    variant = "sigmoid(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)"
    moved = run(compare_config(losses=f"sigmoid,{variant}", seeds=1))
    (own,) = moved.runs(variant)
    assert own.evaluations["eval_logps/chosen"][-1] == own.evaluations["eval_ref_logps/chosen"][-1]
    (row,) = (row for row in moved.rows if row["variant"] == variant)
    chosen, rejected = drifts_of(moved, variant)
    assert row["metrics"]["chosen_drift"] == pytest.approx(chosen.mean().item(), abs=1e-4)
    assert row["metrics"]["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert abs(row["metrics"]["chosen_drift"]) > 0.01


@pytest.fixture(scope="module")
def mixed_references(compare_config, tiny_phi, tmp_path_factory) -> Comparison:
    """Another model is the comparison's reference; one variant needs none, and one has the start of the run."""
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_phi, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    return run(compare_config(losses="sigmoid,simpo,ipo(reference=auto)", reference=str(other), seeds=1))


@pytest.mark.parametrize("variant", ["sigmoid", "simpo", "ipo(reference=auto)"])
def test_every_variant_is_measured_from_the_reference_of_the_comparison(mixed_references, variant):
    chosen, _ = drifts_of(mixed_references, variant, mixed_references.config["reference"])
    (row,) = (row for row in mixed_references.rows if row["variant"] == variant)
    assert row["metrics"]["chosen_drift"] == pytest.approx(chosen.mean().item(), rel=1e-3)
    assert row["metrics"]["kl"] > 0.1


def test_kl_and_entropy_are_those_of_the_whole_distributions(dpo_config):
    config = dpo_config(test_fraction=0.3)
    session = phi2.start(config)
    with session.policy(config) as model, torch.no_grad():
        model.lm_head.adapter.lora_B.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        prompt, answer = np.array([5, 9, 7], dtype=np.int32), np.array([8, 6], dtype=np.int32)
        measure = Measure(session, config, None, None, elsewhere=True, tasks=None)
        kl, entropy = measure.kl_and_entropy(model.eval(), [prompt], [answer])
        ids = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))[None]
        policy = model(ids)[0, 2:4, : choices_of(model, session.tokenizer)].double().log_softmax(dim=-1)
        with disabled(model):
            base = model(ids)[0, 2:4, : choices_of(model, session.tokenizer)].double().log_softmax(dim=-1)
    assert (kl > 1e-3).all()
    torch.testing.assert_close(kl.double(), (policy.exp() * (policy - base)).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(policy.exp() * policy).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_figure_has_a_row_for_each_other_variant(comparison):
    drawing = comparison.figure("margin")
    assert drawing.startswith("<svg") and drawing.count("<circle") == 1 and "simpo(beta=2.0), difference: " in drawing
    with pytest.raises(ValueError, match="metric must be one of accuracy, .*, got 'marginn'; did you mean margin"):
        comparison.figure("marginn")


def test_the_page_is_one_file_with_the_command_that_makes_it_again(comparison):
    page = (comparison / "report.html").read_text()
    assert page.count("<svg") >= 8 and "<script" not in page and 'src="' not in page and 'href="http' not in page
    assert f"phi2 compare --config {comparison.path}/compare.yaml --output {comparison.path}-again" in page
    assert (comparison / "cells/sigmoid/42/report.html").exists() and "cells/sigmoid/42/report.html" in page


def test_the_command_of_the_page_gives_the_same_table(comparison, tmp_path, capsys):
    code = main(["compare", "--config", str(comparison / "compare.yaml"), "--output", str(tmp_path / "again")])
    assert code == 0 and str(comparison) in capsys.readouterr().out
    assert (tmp_path / "again/results.jsonl").read_bytes() == (comparison / "results.jsonl").read_bytes()


def test_rows_that_one_variant_cannot_use_are_refused_with_its_name(compare_config):
    with pytest.raises(ValueError, match="^variant odpo: the loss reads the column 'score_chosen'"):
        run(compare_config(losses="sigmoid,odpo"))


BROKEN = "sigmoid(learning_rate=1e+30)"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named_and_ends_no_other(compare_config, jobs):
    config = compare_config(losses=f"ipo,{BROKEN},simpo", seeds=1, jobs=jobs)
    found = run(config)
    (failure,) = found.failures
    assert re.match(r"sigmoid\(learning_rate=1e\+30\), seed 42 failed: step \d: the loss is nan; try", failure)
    assert failure in str(found) and failure in html.unescape((found / "report.html").read_text())
    assert np.isnan(found.metrics["accuracy"][:, 0]).tolist() == [False, True, False]
    assert "failure" not in found.rows[0] and not found.ended(BROKEN)
    before = (found / "results.jsonl").read_bytes()
    again = run(replace(config, resume=True, match="kl"))  # nothing is run again
    assert again.failures == found.failures and again.metrics["kl"][0, 0] > 0
    assert (run(replace(config, resume=True)) / "results.jsonl").read_bytes() == before


def test_where_every_run_fails_there_is_no_table(compare_config):
    config = compare_config(losses=BROKEN, seeds=1)
    with pytest.raises(ValueError, match=r"^every run failed; sigmoid\(learning_rate=1e\+30\), seed 42: step \d"):
        run(config)
    assert not (Path(config.output) / "results.jsonl").exists()


def test_another_comparison_is_not_written_over(comparison, compare_config, tmp_path):
    config = compare_config(output=str(comparison.path))
    with pytest.raises(ValueError, match="holds a comparison already; give another output, or resume: true"):
        run(config)
    with pytest.raises(ValueError, match="compare.yaml: .*these differ: learning_rate 0.01 -> 0.02$"):
        run(replace(config, resume=True, learning_rate=0.02))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds no comparison"):
        run(replace(config, output=str(tmp_path)))


def test_pairs_that_changed_are_named(compare_config, pair_data, tmp_path):
    data = Path(shutil.copy(pair_data, tmp_path / "rows.jsonl"))
    config = compare_config(data=str(data), losses="sigmoid", seeds=1)
    run(config)
    data.write_text(data.read_text().replace("Q?", "R?"))
    with pytest.raises(ValueError, match="the data changed since this run began"):
        run(replace(config, resume=True))


def test_an_output_that_cannot_be_written_is_one_line(compare_config, tmp_path, full_disk):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(compare_config(output=str(tmp_path / "file" / "out")))
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        run(compare_config(output=str(tmp_path / "out")))


CURVE = [
    {"step": 1, "kl": 0.09, "accuracy": 0.5},
    {"step": 2, "kl": 0.49, "accuracy": 0.7},
    {"step": 3, "kl": 0.3, "accuracy": 0.9},
]


def test_at_equal_distance_a_metric_is_read_on_the_line_between_two_evaluations():
    """Over the root of the KL."""
    found = at_kl(CURVE, 0.36)
    assert found == pytest.approx({"step": 1.75, "kl": 0.36, "accuracy": 0.65})  # 0.6 of the way from 0.3 to 0.7
    assert at_kl(CURVE, 0.09) == pytest.approx(CURVE[0]) and at_kl(CURVE, 0.49) == pytest.approx(CURVE[1])


@pytest.mark.parametrize("kl", [0.05, 0.5])
def test_a_run_that_starts_beyond_the_distance_or_never_gets_there_has_no_value(kl):
    assert at_kl(CURVE, kl) == {}


def test_the_distance_is_the_largest_that_all_reach():
    assert farthest_common_kl([CURVE, CURVE[:1], [{"kl": 0.4}]]) == 0.09


def test_a_comparison_at_equal_distance_needs_no_new_runs(comparison, compare_config):
    config = compare_config(output=str(comparison.path), match="kl", resume=True)
    steps = (comparison / "results.jsonl").read_bytes()
    matched = run(config)
    kl = matched.metrics["kl"]
    assert (kl == kl[0, 0]).all() and "at a KL of" in str(matched)
    assert (matched.metrics["step"] <= 4).all()
    assert (run(replace(config, match="steps")) / "results.jsonl").read_bytes() == steps


def test_a_run_that_never_gets_there_has_no_value_in_the_table(comparison, compare_config):
    """Its KL too is a dash: it never was so far."""
    steps = (comparison / "results.jsonl").read_bytes()
    ends = comparison.metrics["kl"]
    config = compare_config(output=str(comparison.path), match="kl", match_kl=float(ends.mean()), resume=True)
    matched = run(config)
    there = ~np.isnan(matched.metrics["kl"])
    assert there.any() and not there.all()
    assert f", where {(~there).sum()} of 4 runs have no value, nor has their mean; mean ±" in str(matched)
    np.testing.assert_array_equal(np.isnan(matched.metrics["accuracy"]), ~there)
    assert (run(replace(config, match="steps", match_kl=None)) / "results.jsonl").read_bytes() == steps


def test_a_distance_that_no_run_reaches_is_refused_and_the_table_stays(comparison, compare_config):
    steps = (comparison / "results.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"match_kl 1e\+06: no run has a value there; the largest KL that all reach is "
    ):
        run(compare_config(output=str(comparison.path), match="kl", match_kl=1e6, resume=True))
    assert (comparison / "results.jsonl").read_bytes() == steps
    run(compare_config(output=str(comparison.path), resume=True))


def test_a_comparison_of_an_earlier_version_goes_on(comparison, compare_config):
    """A setting that it did not know was at its default."""
    path, steps = comparison / "compare.yaml", (comparison / "results.jsonl").read_bytes()
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if name != "max_tokens_per_pass"}))
    assert (run(compare_config(output=str(comparison.path), resume=True)) / "results.jsonl").read_bytes() == steps


def test_rows_may_be_compared_on_as_they_are(dpo_config, tmp_path):
    where = {"model": dpo_config().model, "output": tmp_path / "out", "device": "cpu"}
    rows = [{"prompt": "Q", "chosen": f" the {i}", "rejected": f" sea {i}"} for i in range(4)]
    phi2.compare(losses="ipo", seeds=1, data=rows, eval_data=rows, max_steps=1, **where)
    assert " on data; 1 seed each" in (tmp_path / "out" / "report.html").read_text()


def test_toy_skills_are_graded(tmp_path):
    settings = dict(model="nano-instruct", data="toy-dpo", max_steps=1, per_device_train_batch_size=2, device="cpu")
    few = [DataSpec("toy-dpo", split="test", rows=4)]
    comparison = phi2.compare(losses=["sigmoid"], seeds=1, output=tmp_path / "out", eval_data=few, **settings)
    assert {"toy", "toy/quiz", "accuracy"} <= comparison.metrics.keys()
    assert json.loads((comparison / "results.jsonl").read_text())["metrics"]["toy"] > 0.5
