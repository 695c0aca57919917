"""Runs on real rows with the real tokenizer: results in the hands of transformers and peft, and KTO beside trl's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

import phi2
from phi2.cli.commands import main
from phi2.training import dpo

pytestmark = pytest.mark.real_data
IDS = torch.arange(100, 140)[None]
TEXT = "<|im_start|>user\nHow  many spaces?\t\t<|im_end|>\n"


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory):
    """A random Phi-2 of head dim 80 through SFT on Alpaca rows, DPO on ranked chats, and a merge."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    shape = dict(hidden_size=160, num_attention_heads=2, num_hidden_layers=2, intermediate_size=320)
    config = PhiConfig(**shape, vocab_size=51200, partial_rotary_factor=0.4, bos_token_id=50256, eos_token_id=50256)
    PhiForCausalLM(config).save_pretrained(folder / "base")
    for file in (shared / "tokenizer" / "phi-2").glob("*.json"):
        shutil.copy(file, folder / "base")
    short = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "256", "--device", "cpu"]
    short += ["--learning_rate", "1e-2"]
    fresh = ["--lora.target_modules", "[q_proj,fc2,lm_head]"]
    sft_data, dpo_data = shared / "data/sft/alpaca_600.jsonl", shared / "data/preference/dpo_en_200.jsonl"
    base, sft, dpo, merged = (str(folder / name) for name in ("base", "sft", "dpo", "merged"))
    assert main(["sft", "--model", base, "--data", str(sft_data), "--output", sft, *short, *fresh]) == 0
    start = ["--model", base, "--adapter", f"{sft}/adapter"]
    assert main(["dpo", *start, "--data", str(dpo_data), "--output", dpo, *short]) == 0
    assert main(["merge", "--model", base, "--adapter", f"{dpo}/adapter", "--output", merged]) == 0
    return folder


@torch.no_grad()
def test_the_merged_model_gives_its_logits_in_transformers(runs):
    ours, _ = phi2.load(runs / "merged", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(runs / "merged").eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_adapter_gives_its_logits_in_peft(runs):
    ours, _ = phi2.load(runs / "base", device="cpu", adapter=runs / "dpo" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(runs / "base").eval()
    plain = base(IDS).logits
    theirs = PeftModel.from_pretrained(base, runs / "dpo" / "adapter").eval()(IDS).logits
    torch.testing.assert_close(ours(IDS), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-3  # the adapter does something


def test_the_tokenizer_of_the_run_is_transformers_chatml_tokenizer(runs):
    _, ours = phi2.load(runs / "merged", device="cpu")
    theirs = AutoTokenizer.from_pretrained(runs / "merged")
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert theirs.eos_token_id == ours.eos_id == 50296


# ---- labelled answers ----


def test_kto_on_real_rows_has_the_losses_of_trls_trainer(
    shared, runs, run_ours, run_theirs, assert_same_losses, tmp_path
):
    """Of ours the rows as they are, conversations with a label; trl wants prompts and completions in columns. Rows are
    short: of a cut answer trl sets more tokens behind another, shorter prompt than are left of it here."""
    trl, model = pytest.importorskip("trl"), shutil.copytree(runs / "base", tmp_path / "base")
    shutil.copytree(shared / "tokenizer" / "phi-2-instruct", model, dirs_exist_ok=True)
    lines = (shared / "data/preference/kto_en_200.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if sum(len(turn["content"]) for turn in row["messages"]) < 500][:10]
    apart = [{"prompt": (x := row["messages"])[:-1], "completion": x[-1:], "label": row["label"]} for row in rows]
    same = dict(max_steps=5, per_device_train_batch_size=2, learning_rate=1e-3, beta=0.5, lora=None)
    mine = run_ours(dpo, rows, loss="kto", shuffle=False, max_tokens_per_pass=200, model=str(model), **same)
    reference = run_theirs(trl.KTOConfig, trl.KTOTrainer, apart, where=model, **same)
    assert_same_losses(mine, reference)
    assert any(step["kl"] > 0 for step in reference)  # z counts
