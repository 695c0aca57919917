"""A resumed run notices that something it depends on is not what it began with, and names it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi2.checkpoints.weights import load_model, load_tokenizer, save_pretrained
from phi2.lora_config import LoraConfig
from phi2.losses.registry import PREFERENCE_LOSSES, preference_loss
from phi2.losses.source import source_of_loss
from phi2.runs.inputs import digest_of_adapter, digest_of_model
from phi2.runs.run import Run
from phi2.training import dpo, sft
from phi2.training.session import Session

LOSS = """import phi2
import torch.nn.functional as F
SHIFT = 1.0
def push(margin):
    return -F.logsigmoid(margin - SHIFT)
@phi2.preference_loss("mine")
def mine(pairs, *, beta: float = 0.1):
    return pairs.columns["weight"] * push(beta * pairs.margin)
"""


@pytest.fixture
def own(sft_data, pair_data, tiny_phi, tmp_path) -> dict[str, Path]:
    """Copies of a model, a reference and of rows that a test may change."""
    (tmp_path / "mine.py").write_text(LOSS)
    return {
        "model": shutil.copytree(tiny_phi, tmp_path / "model"),
        "reference": shutil.copytree(tiny_phi, tmp_path / "other"),
        "sft": shutil.copy(sft_data, tmp_path / "rows.jsonl"),
        "pairs": shutil.copy(pair_data, tmp_path / "pairs.jsonl"),
        "eval": shutil.copy(pair_data, tmp_path / "eval.jsonl"),
        "loss": tmp_path / "mine.py",
    }


def resumed(module, config) -> Run:
    return module.train(dataclasses.replace(config, resume=True))


def edit_rows(path: Path, change: dict) -> None:
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(first) | change) + "\n", *others]))


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Never in place: a run may have the file's pages in its memory."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors[name])
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_template(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save(folder)


def edit_special_tokens(folder: Path) -> None:
    edit_text(folder / "tokenizer_config.json", '"pad_token": "<|im_end|>"', '"pad_token": "<|endoftext|>"')


def reverse_rows(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


NORM, ADAPTED = "model.final_layernorm.bias", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def scale_norm(folder: Path) -> None:
    edit_tensor(folder / "model.safetensors", NORM, lambda tensor: tensor.mul_(1.5))


def edit_config(folder: Path) -> None:
    edit_text(folder / "config.json", '"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e-04')


# What changes before a run goes on: in which file, how, and how the error names it.
CHANGES = {
    "a row": ("pairs", lambda path: edit_rows(path, {"chosen": " other"}), "data"),
    "the order of rows": ("pairs", reverse_rows, "data and the columns of the data"),
    "a number of a row": ("pairs", lambda path: edit_rows(path, {"weight": 1.5}), "columns of the data"),
    "a label of a row": ("pairs", lambda path: edit_rows(path, {"source": "x"}), "columns of the data"),
    "an evaluation row": ("eval", lambda path: edit_rows(path, {"rejected": " x"}), "evaluation data"),
    "a number of an evaluation row": ("eval", lambda path: edit_rows(path, {"weight": 9}), "evaluation data"),
    "the loss": ("loss", lambda path: edit_text(path, "pairs.columns", "50 * pairs.columns"), "loss"),
    "what the loss calls": ("loss", lambda path: edit_text(path, "-F.log", "-2 * F.log"), "loss"),
    "a constant of the loss": ("loss", lambda path: edit_text(path, "SHIFT = 1.0", "SHIFT = 2.0"), "loss"),
    "the reference": ("reference", scale_norm, "reference"),
    "the settings of the reference": ("reference", edit_config, "reference"),
    "the base": ("model", scale_norm, "base model"),
    "the settings of the base": ("model", edit_config, "base model"),
    "a special token": ("model", edit_special_tokens, "tokenizer"),
    "the template": ("model", edit_template, "chat template"),
}


@pytest.fixture
def preference_run(own, dpo_config) -> dpo.DPOConfig:
    """A finished run that depends on all of them."""
    where = {"model": str(own["model"]), "data": str(own["pairs"]), "eval_data": str(own["eval"])}
    loss = {"loss": "mine", "loss_file": str(own["loss"]), "reference": str(own["reference"])}
    config = dpo_config(**where, **loss, max_steps=1, gradient_accumulation_steps=1)
    dpo.train(config)
    return config


def test_a_run_goes_on_with_what_it_began_with_and_says_nothing(preference_run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(dpo, preference_run).path == Path(preference_run.output)


@pytest.mark.parametrize("change", CHANGES)
def test_each_thing_a_run_depends_on_is_noticed_alone_before_any_work(preference_run, own, monkeypatch, change):
    place, edit, name = CHANGES[change]
    edit(own[place])
    monkeypatch.setattr(Session, "load_policy", None)
    with pytest.raises(ValueError) as caught:
        resumed(dpo, preference_run)
    run = preference_run.output
    way = f"; the file of its losses, as it was, is {run}/loss.py" if name == "loss" else ""
    assert str(caught.value) == f"{run}: the {name} changed since this run began; it cannot be resumed{way}"


def test_all_that_changed_is_named_at_once(preference_run, own):
    edit_rows(own["eval"], {"weight": 9})
    edit_text(own["loss"], "SHIFT = 1.0", "SHIFT = 2.0")
    with pytest.raises(ValueError, match=": the evaluation data and the loss changed since this run began"):
        resumed(dpo, preference_run)


def test_a_run_that_cannot_be_resumed_stays_as_it_was(preference_run, own):
    run = Path(preference_run.output)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    own["pairs"].write_text(own["pairs"].read_text() * 2)
    with pytest.raises(ValueError, match="the data and the columns of the data changed"):
        resumed(dpo, dataclasses.replace(preference_run, logging_steps=2))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_may_change_is_written_down_when_a_run_goes_on(preference_run):
    resumed(dpo, dataclasses.replace(preference_run, logging_steps=2))
    assert "logging_steps: 2" in (Path(preference_run.output) / "config.yaml").read_text()


def test_the_loss_file_is_kept_in_the_run_and_can_be_resumed_from_there(preference_run, own):
    kept = Path(preference_run.output) / "loss.py"
    assert kept.read_text() == LOSS
    own["loss"].unlink()
    PREFERENCE_LOSSES.pop("mine")  # another process
    resumed(dpo, dataclasses.replace(preference_run, loss_file=str(kept)))


def test_a_file_laid_out_otherwise_is_the_same(preference_run, own):
    for path in (own["model"] / "config.json", own["model"] / "tokenizer.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    model = load_model(own["model"])
    save_pretrained(model, load_tokenizer(own["model"]), own["reference"], max_shard_size=20_000, overwrite=True)
    assert len(list(own["reference"].glob("model-*.safetensors"))) > 1
    resumed(dpo, preference_run)


@pytest.mark.parametrize("change", ["start model", "adapter", "compute dtype"])
def test_what_other_kinds_of_runs_depend_on_is_noticed(sft_config, own, tmp_path, monkeypatch, change):
    where = {"model": str(own["model"]), "data": str(own["sft"]), "max_steps": 1}
    if change == "adapter":
        adapter = sft.train(sft_config(**where, output=str(tmp_path / "first"))) / "adapter"
        where |= {"adapter": str(adapter), "lora": LoraConfig()}
    config = sft_config(**where, **({"lora": None} if change == "start model" else {}))
    sft.train(config)
    if change == "adapter":
        edit_tensor(adapter / "adapter_model.safetensors", ADAPTED, lambda t: t.add_(0.1))
    elif change == "start model":
        scale_norm(own["model"])
    else:  # "auto" on another device
        monkeypatch.setattr("phi2.training.session.compute_dtype", lambda config: torch.bfloat16)
    with pytest.raises(ValueError, match=f": the {change} changed since this run began; it cannot be resumed"):
        resumed(sft, config)


def test_rows_that_changed_are_noticed(sft_config, own):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1)
    sft.train(config)
    with own["sft"].open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(ValueError, match="the data changed since this run began; it cannot be resumed"):
        resumed(sft, config)


def test_a_run_from_random_weights_depends_on_the_shape_alone(sft_config, own, make_phi):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1, lora=None, from_scratch=True)
    sft.train(config)
    shutil.copy(make_phi(seed=1) / "model.safetensors", own["model"])
    resumed(sft, config)
    edit_config(own["model"])
    with pytest.raises(ValueError, match="the start model changed"):
        resumed(sft, config)


def test_another_base_under_the_same_name_is_noticed(sft_config, own, make_phi):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1)
    sft.train(config)
    shutil.copy(make_phi(seed=1) / "model.safetensors", own["model"])
    with pytest.raises(ValueError, match="the base model changed since this run began"):
        resumed(sft, config)


def test_a_run_of_an_earlier_version_goes_on_and_says_what_could_not_be_compared(sft_config, own):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1)
    path = sft.train(config) / "inputs.json"
    data = json.loads(path.read_text())["data"]
    path.write_text(json.dumps({"data": data, "base model": "a" * 64}))  # all there was, made in another way
    with pytest.warns(UserWarning, match="whether the columns of the data and the base model and .* is not known"):
        resumed(sft, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(sft, config)  # now it is


def test_rows_of_a_run_of_an_earlier_version_are_compared(sft_config, own):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1)
    path = sft.train(config) / "inputs.json"
    path.write_text(json.dumps({"data": "a" * 64, "base model": "a" * 64}))
    with pytest.raises(ValueError, match="the data changed since"):
        resumed(sft, config)


def test_a_start_model_that_is_gone_is_not_needed_and_told(sft_config, own):
    config = sft_config(model=str(own["model"]), data=str(own["sft"]), max_steps=1, lora=None)
    sft.train(config)
    (own["model"] / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="whether the start model changed since this run began is not known"):
        resumed(sft, config)


def test_a_loss_without_a_source_cannot_be_compared_and_this_is_told(dpo_config):
    names: dict = {}
    exec("def typed(pairs): return -pairs.margin", names)
    preference_loss("typed")(names["typed"])
    config = dpo_config(loss="typed", max_steps=1)
    dpo.train(config)
    with pytest.warns(UserWarning, match="whether the loss changed since this run began is not known"):
        resumed(dpo, config)


@pytest.mark.parametrize("place", ["run", "shared"])
def test_a_reference_cache_that_changed_is_noticed(dpo_config, tmp_path, place, shift_logps):
    shared = {"reference_cache": str(tmp_path / "cache")} if place == "shared" else {}
    config = dpo_config(precompute_ref_log_probs=True, max_steps=1, **shared)
    folder = (tmp_path / "cache") if shared else dpo.train(config) / "reference"
    if shared:
        dpo.train(dataclasses.replace(config, output=str(tmp_path / "first")))
        dpo.train(config)
    resumed(dpo, config)
    shift_logps(next(folder.glob("*/*.safetensors")), 1e-4)  # less than rounding may explain
    with pytest.raises(ValueError, match=": the reference cache changed since this run began; it cannot be resumed"):
        resumed(dpo, config)


@pytest.mark.filterwarnings("error")
def test_a_reference_cache_that_is_gone_is_made_again(dpo_config):
    config = dpo_config(precompute_ref_log_probs=True, max_steps=1)
    shutil.rmtree(dpo.train(config) / "reference")
    for _ in range(2):
        resumed(dpo, config)
    assert "tokenizer" in json.loads((Path(config.output) / "inputs.json").read_text())


# ---- digests ----


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.1.mlp.fc1.weight"])
def test_every_weight_of_a_file_counts(own, name):
    before = digest_of_model(own["model"])
    edit_tensor(own["model"] / "model.safetensors", name, lambda tensor: tensor.mul_(1.001))
    assert digest_of_model(own["model"]) != before


@pytest.mark.parametrize("row", [0, 13, 271])
def test_one_row_of_a_matrix_counts(own, row):
    before = digest_of_model(own["model"])
    edit_tensor(own["model"] / "model.safetensors", "model.embed_tokens.weight", lambda t: t[row].add_(0.01))
    assert digest_of_model(own["model"]) != before


def test_a_folder_without_weights_has_no_digest(tmp_path):
    assert digest_of_model(tmp_path) is None and digest_of_adapter(tmp_path) is None


def test_a_damaged_file_is_named_in_one_line(own):
    path = own["model"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated or damaged \(") as caught:
        digest_of_model(own["model"])
    assert "\n" not in str(caught.value)


def test_the_source_of_a_loss_has_that_of_a_built_in_one_it_calls():
    source = source_of_loss(PREFERENCE_LOSSES["caldpo"].function)
    assert "def caldpo" in source and "def sppo_hard" in source and "def ipo" not in source


def test_the_source_of_a_loss_has_what_it_took_from_around_it():
    def with_shift(shift: float):
        return lambda pairs: pairs.margin - shift

    assert source_of_loss(with_shift(1.0)) == source_of_loss(with_shift(1.0)) != source_of_loss(with_shift(2.0))


@pytest.mark.parametrize("use", ["from own_helper import push", "import own_helper"])
def test_the_source_of_a_loss_has_that_of_a_module_of_ones_own(tmp_path, monkeypatch, use):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_helper", raising=False)
    (tmp_path / "own_helper.py").write_text("def push(x):\n    return x + 12345\n")
    path, push = tmp_path / "uses_it.py", "own_helper.push" if use.startswith("import") else "push"
    path.write_text(f"import torch\n{use}\ndef loss(pairs):\n    return torch.relu({push}(pairs.margin))\n")
    names: dict = {"__name__": "uses_it"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    source = source_of_loss(names["loss"])
    assert "x + 12345" in source and "def relu" not in source


def test_a_loss_that_was_typed_in_has_no_source():
    names: dict = {}
    exec("def typed(pairs): return pairs.margin", names)
    assert source_of_loss(names["typed"]) is None
