"""What a run left behind, as an object: numbers, samples, the model, a table; and folders that hold none."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import accumulate

import numpy as np
import pytest
import torch

import phi2
from phi2.checkpoints.weights import load
from phi2.training import dpo, sft

LINES = [
    {"step": 2, "type": "train", "loss": 1.5, "grad_norm": 3.0},
    {"step": 2, "type": "eval", "eval_loss": 1.75},
    {"step": 4, "type": "train", "loss": 0.5},
    {"step": 4, "type": "eval", "eval_loss": 0.75},
]


@pytest.fixture
def folder(tmp_path):
    """A run of two logged updates and two evaluations."""
    (tmp_path / "config.yaml").write_text("model: nano\nloss: <ipo>\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_metrics_are_arrays_over_the_updates(folder):
    metrics = phi2.Run(folder).metrics
    assert metrics["step"].tolist() == [2, 4] and metrics["loss"].tolist() == [1.5, 0.5]


def test_a_metric_that_an_update_lacks_is_nan(folder):
    np.testing.assert_array_equal(phi2.Run(folder).metrics["grad_norm"], [3.0, np.nan])


def test_evaluations_are_apart_from_updates(folder):
    run = phi2.Run(folder)
    assert run.evaluations["eval_loss"].tolist() == [1.75, 0.75] and run.evaluations.keys() == {"step", "eval_loss"}
    assert run.metrics.keys() == {"step", "loss", "grad_norm"}


def test_a_run_that_goes_on_is_read_anew_and_its_torn_line_left_out(folder):
    run = phi2.Run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "type": "train", "loss": 0.25}\n{"step": 8, "ty')
        file.flush()
        assert run.metrics["loss"].tolist() == [1.5, 0.5, 0.25]


def test_a_run_stands_for_its_folder(folder):
    run = phi2.Run(folder)
    with open(run / "config.yaml") as file:
        assert file.read() == (run.path / "config.yaml").read_text()
    assert phi2.Run(run).path == folder


def test_training_returns_the_run_that_is_opened_later(sft_config):
    run = sft.train(sft_config(sample_prompts=["Q?"], max_steps=2))
    opened = phi2.Run(sft_config().output)
    assert [len(column) for column in opened.metrics.values()] == [2] * len(run.metrics)
    assert opened.config["max_steps"] == 2
    assert [(sample["step"], sample["prompt"]) for sample in opened.samples] == [(2, "Q?")]


def test_settings_of_a_run_start_it_again(dpo_config, metrics_of, tmp_path):
    run = dpo.train(dpo_config(max_steps=2))
    again = phi2.dpo(**{**run.config, "output": tmp_path / "again"})
    assert metrics_of(again) == metrics_of(run)


@pytest.mark.parametrize("lora", ["adapter", "model"])
def test_a_run_loads_what_it_made(sft_config, lora, tmp_path):
    run = sft.train(sft_config(max_steps=2, **({} if lora == "adapter" else {"lora": None})))
    base, (model, tokenizer) = load(run.config["model"])[0], run.load(device="cpu")
    ids = torch.tensor([tokenizer.encode("that is")])
    expected = load(base_of(run), adapter=str(run / "adapter")) if lora == "adapter" else load(str(run / "model"))
    assert torch.equal(model(ids), expected[0](ids)) and not torch.equal(model(ids), base(ids))


def base_of(run: phi2.Run) -> str:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_notebook_shows_the_numbers_and_the_loss_curve(folder):
    html = phi2.Run(folder)._repr_html_()
    assert "Preference optimisation (&lt;ipo&gt;) of nano" in html
    assert "<th>loss</th><td>1.5</td><td>0.5</td><td>0.75</td>" in html
    assert html.count("<svg") == 1 and 'aria-label="Loss"' in html


def test_the_style_of_a_cell_is_for_that_cell_alone(folder):
    html = phi2.Run(folder)._repr_html_()
    style = html.partition("<style>")[2].partition("</style>")[0]
    depths = [*accumulate({"{": 1, "}": -1}.get(character, 0) for character in style.strip().removeprefix(".phi2 "))]
    assert style.startswith(".phi2 {") and depths.index(0) == len(depths) - 1  # nothing behind the brace that closes it


def test_a_run_without_a_line_is_shown(folder):
    (folder / "metrics.jsonl").unlink()
    html = phi2.Run(folder)._repr_html_()
    assert "No update was logged." in html and "<svg" not in html


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("config.yaml", "model: [", r"config\.yaml: not valid YAML"),
        ("config.yaml", "nano", r"config\.yaml: must hold a mapping, got str"),
        ("metrics.jsonl", '{"step": 1}\n{"step": \n', r"metrics\.jsonl line 2: not valid JSON"),
        ("metrics.jsonl", '{"step": 1}\n7\n', r"metrics\.jsonl line 2: must hold a JSON object, got int"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(folder, name, content, told):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=told) as caught:
        phi2.Run(folder)._repr_html_()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        phi2.Run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no run: it has no config\.yaml"):
        phi2.Run(tmp_path)


def test_a_run_without_a_result_has_no_model_yet(folder):
    with pytest.raises(ValueError, match="no adapter and no model yet"):
        phi2.Run(folder).load()


def test_numbers_are_read_without_torch(folder):
    code = f"import sys, phi2; phi2.Run({str(folder)!r})._repr_html_(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
