"""The model card of a run: a header the hub accepts, and instructions that work."""

from __future__ import annotations

import re

import pytest
import yaml

from phi2.data.sources import DataSpec
from phi2.lora_config import LoraConfig
from phi2.runs.card import write_card
from phi2.runs.folder import to_plain
from phi2.training.dpo import DPOConfig
from phi2.training.sft import SFTConfig

PREFERENCE = dict(model="microsoft/phi-2", data="ultrafeedback_binarized,toy-dpo", output="x")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    return folder


def card(run, config, results=None):
    return write_card(run, to_plain(config), results or {}).read_text(encoding="utf-8")


def header(text):
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


def test_the_header_names_base_data_and_kind(run):
    assert header(card(run, DPOConfig(**PREFERENCE))) == {
        "base_model": "microsoft/phi-2",
        "datasets": ["HuggingFaceH4/ultrafeedback_binarized"],
        "library_name": "phi2",
        "pipeline_tag": "text-generation",
        "tags": ["phi", "preference-optimization", "lora"],
    }


def test_the_hub_accepts_the_header(run):
    from huggingface_hub import ModelCard

    data = ModelCard(card(run, DPOConfig(**PREFERENCE))).data
    assert (data.base_model, data.library_name) == ("microsoft/phi-2", "phi2")


def test_what_is_no_hub_id_stays_out_of_the_header(run):
    found = header(card(run, SFTConfig(model="nano", data="rows.jsonl", output="x", lora=None)))
    assert "base_model" not in found and "datasets" not in found and found["tags"] == ["phi", "sft"]


def test_the_text_says_what_was_trained_on_what(run):
    data = ["toy-sft", DataSpec("more.jsonl", rows=5)]
    text = card(run, SFTConfig(model="nano", data=data, output="x", lora=LoraConfig(r=4)))
    assert "Supervised fine-tuning of `nano` on `toy-sft`, `more.jsonl`" in text and "LoRA adapter of rank 4" in text


@pytest.mark.parametrize("row", [{"text": "the end"}, {"text": "the end", "source": "a book"}])
def test_rows_that_were_given_as_rows_are_data_without_a_name(run, row):
    assert "Supervised fine-tuning of `nano` on `data`;" in card(
        run, SFTConfig(model="nano", data=[row] * 3, output="x")
    )


def test_rows_of_another_library_are_told_by_their_number(run):
    rows = pytest.importorskip("datasets").Dataset.from_list([{"text": "the end"}] * 3)
    config = SFTConfig(model="nano", data=rows, output="x")
    assert "of `nano` on `3 rows in memory`;" in card(run, config)


def test_hyperparameters_and_results_are_rows_of_tables(run):
    text = card(run, DPOConfig(**PREFERENCE, beta=0.25), {"rewards/accuracies": 0.75})
    assert "| beta | `0.25` |" in text and "| lora.r | `16` |" in text and "| rewards/accuracies | 0.75 |" in text


def test_where_things_lie_and_how_often_they_were_saved_is_no_hyperparameter(run):
    text = card(run, DPOConfig(**PREFERENCE, save_steps=77))
    assert "| output |" not in text and "| save_steps |" not in text


def test_a_bar_in_a_setting_does_not_end_its_cell(run):
    text = card(run, SFTConfig(model="nano", data="toy-sft", output="x", lora=LoraConfig(target_modules="fc1|fc2")))
    assert r"| lora.target_modules | `fc1\|fc2` |" in text


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(("result", "loads"), [("adapter", "adapter="), ("model", "phi2.load(")])
def test_the_code_is_python_and_loads_what_the_run_left(run, result, loads):
    (run / result).mkdir()
    ours, theirs = python_blocks(card(run, SFTConfig(model="nano", data="toy-sft", output="x")))
    for code in (ours, theirs):
        compile(code, "card", "exec")
        assert str(run / result) in code
    assert loads in ours and "from_pretrained" in theirs


def test_the_code_of_ours_runs(run, capsys):
    import phi2

    model, tokenizer = phi2.load("nano")
    phi2.save_pretrained(model, tokenizer, run / "model")
    text = card(run, SFTConfig(model="nano", data="toy-sft", output="x", lora=None))
    exec(python_blocks(text)[0], {})
    assert capsys.readouterr().out


def test_a_card_that_was_there_is_replaced(run):
    card(run, DPOConfig(**PREFERENCE, beta=0.25))
    assert "0.25" not in card(run, DPOConfig(**PREFERENCE, beta=0.5))
    assert [path.name for path in run.iterdir()] == ["README.md"]
