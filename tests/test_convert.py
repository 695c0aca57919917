"""Conversion: what is changed is changed, what is not stays bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi2.checkpoints.convert import convert, merge_adapter
from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import load
from phi2.lora import attach, lora_modules
from phi2.lora_config import LoraConfig


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(12)[None])


@pytest.fixture
def adapter(tiny_phi, tmp_path):
    """A folder with an adapter whose change is not zero, and the logits of the model under it."""
    model, _ = load(tiny_phi)
    attach(model, LoraConfig(r=4, target_modules=("q_proj", "fc2", "lm_head")))
    for module in lora_modules(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.3)
    save_adapter(model, tmp_path / "adapter", str(tiny_phi))
    return tmp_path / "adapter", logits(model)


def test_a_merged_checkpoint_gives_the_logits_of_base_and_adapter(tiny_phi, adapter, tmp_path):
    folder, expected = adapter
    merged, _ = load(merge_adapter(str(tiny_phi), str(folder), str(tmp_path / "merged"), "float32"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(load(tiny_phi)[0]), expected)


def test_merging_never_writes_over_another_model(tiny_phi, adapter, tmp_path):
    merge_adapter(str(tiny_phi), str(adapter[0]), str(tmp_path / "merged"))
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="merged"):
        merge_adapter(str(tiny_phi), str(adapter[0]), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


def test_a_dtype_is_what_is_stored(tiny_phi, tmp_path):
    converted, _ = load(convert(str(tiny_phi), str(tmp_path / "half"), dtype="bfloat16"))
    assert converted.config.dtype == "bfloat16"
    assert torch.equal(converted.lm_head.weight, load(tiny_phi)[0].lm_head.weight.bfloat16().float())


@pytest.fixture
def mixed(make_phi, tmp_path):
    """A checkpoint whose tensors have several dtypes, under a config.json that names another."""
    folder = tmp_path / "mixed"
    shutil.copytree(make_phi(), folder)
    file = folder / "model.safetensors"
    dtypes = {"embed_tokens": torch.float16, "layernorm": torch.float32, "fc1": torch.float64}
    state = {
        name: tensor.to(next((dtype for part, dtype in dtypes.items() if part in name), torch.bfloat16))
        for name, tensor in load_file(file).items()
    }
    save_file(state, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
    return folder, state


def test_each_tensor_keeps_the_dtype_it_has_in_the_file(mixed, tmp_path):
    folder, state = mixed
    written = load_file(convert(str(folder), str(tmp_path / "again")) / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(written[name].dtype == state[name].dtype and torch.equal(written[name], state[name]) for name in state)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"  # that of most numbers


def test_other_rows_keep_the_dtypes_too(mixed, tmp_path):
    folder, state = mixed
    written = load_file(convert(str(folder), str(tmp_path / "again"), vocab_size=300) / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: tensor.dtype for n, tensor in state.items()}


def test_merging_rounds_once_to_each_dtype_and_leaves_the_other_tensors_alone(mixed, adapter, tmp_path):
    folder, state = mixed
    written = load_file(merge_adapter(str(folder), str(adapter[0]), str(tmp_path / "merged")) / "model.safetensors")
    model, _ = load(folder, "cpu", None, adapter=adapter[0])
    layers = lora_modules(model)
    for name, tensor in written.items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = state[name] if "lm_head" not in name else model.state_dict()[name]  # the adapter brings its own head
        if layer is not None:
            change = layer.active.scaling * layer.lora_B.weight @ layer.lora_A.weight
            expected = (expected.float() + change).to(state[name].dtype)
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, expected), name


@pytest.mark.parametrize("rows", [300, 259])
def test_another_vocabulary_keeps_the_logits_of_the_old_ids(make_phi, tmp_path, rows):
    source = make_phi()
    before, tokenizer = load(source)
    after, _ = load(convert(str(source), str(tmp_path / "resized"), vocab_size=max(rows, len(tokenizer))))
    kept = min(after.config.vocab_size, before.config.vocab_size)
    assert torch.equal(logits(after)[..., :kept], logits(before)[..., :kept])
    assert logits(after).shape[-1] == max(rows, len(tokenizer))


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tiny_phi, tmp_path):
    with pytest.raises(ValueError, match="at least the tokenizer's 260 ids, got 100"):
        convert(str(tiny_phi), str(tmp_path / "small"), vocab_size=100)


@pytest.mark.real_data
def test_chatml_tokens_take_the_free_rows_of_phi_2(shared, make_phi, tmp_path):
    folder = make_phi(vocab_size=51200)
    for file in (shared / "tokenizer" / "phi-2").glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").unlink()
    before, base = load(folder)
    assert base.prompt_style == "instruct"
    after, tokenizer = load(convert(str(folder), str(tmp_path / "chat"), add_chatml=True))
    assert tokenizer.encode("<|im_start|><|im_end|>") == [50295, 50296] and after.config.vocab_size == 51200
    assert torch.equal(logits(after), logits(before))
