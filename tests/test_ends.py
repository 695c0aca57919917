"""What ends a text, from the checkpoint that lists it through every command that writes another."""

from __future__ import annotations

import json
import shutil

import pytest

from phi2.checkpoints.convert import convert, merge_adapter
from phi2.checkpoints.weights import load
from phi2.inference.generate import generate
from phi2.training import dpo, sft

LISTED, BEYOND = 65, 270  # an ordinary token, and an embedding row without one


@pytest.fixture(params=["generation_config.json", "config.json"])
def base(request, make_phi, tmp_path):
    """A checkpoint that lists two more ends in one of its files."""
    folder = tmp_path / "base"
    shutil.copytree(make_phi(), folder)
    (folder / "generation_config.json").unlink()
    path = folder / request.param
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": [258, LISTED, BEYOND]}))
    return folder


def converted(base, tmp_path, **_):
    return convert(str(base), str(tmp_path / "converted"), dtype="bfloat16"), None


def fine_tuned(base, tmp_path, sft_config, **_):
    return sft.train(sft_config(model=str(base), lora=None, max_steps=1, learning_rate=1e-5)) / "model", None


def adapted(base, tmp_path, sft_config, **_):
    return base, sft.train(sft_config(model=str(base), max_steps=1, learning_rate=1e-5)) / "adapter"


def aligned(base, tmp_path, dpo_config, **_):
    return base, dpo.train(dpo_config(model=str(base), max_steps=1, learning_rate=1e-5)) / "adapter"


def merged(base, tmp_path, sft_config, **_):
    _, adapter = adapted(base, tmp_path, sft_config)
    return merge_adapter(str(base), str(adapter), str(tmp_path / "merged")), None


@pytest.mark.parametrize("command", [converted, fine_tuned, adapted, aligned, merged])
def test_every_listed_end_survives(base, tmp_path, sft_config, dpo_config, command):
    folder, adapter = command(base, tmp_path, sft_config=sft_config, dpo_config=dpo_config)
    _, tokenizer = load(folder, adapter=adapter)
    assert {258, LISTED, BEYOND} <= tokenizer.stop_ids


def test_an_end_and_a_pad_go_with_their_row(base, tmp_path):
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "pad_token_id": BEYOND}))
    model, tokenizer = load(convert(str(base), str(tmp_path / "cut"), vocab_size=260))
    assert LISTED in tokenizer.stop_ids and BEYOND not in tokenizer.stop_ids
    assert model.config.pad_token_id is None


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["258", -1, True, 2.0, 272, [258, "x"]])
def test_an_id_that_is_none_is_refused_with_its_file(make_phi, tmp_path, file, name, value):
    folder = tmp_path / "base"
    shutil.copytree(make_phi(), folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=rf"\A[^\n]*/{file}: {name} must be an id from 0 to 271[^\n]*\Z"):
        load(folder)


def test_every_listed_end_stops_a_reply(base):
    model, tokenizer = load(base)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data[LISTED] = 9.0
    assert generate(model, tokenizer, "a").finish_reason == "stop"


def test_settings_of_generation_config_that_are_not_used_are_named(make_phi, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(make_phi(), folder)
    path = folder / "generation_config.json"
    more = {"repetition_penalty": 1.2, "do_sample": True, "temperature": 1.0, "typical_p": 1.0, "max_length": 9}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.warns(
        UserWarning, match="not used unless you give it: repetition_penalty 1.2, do_sample True, max_length 9$"
    ):
        load(folder)


def test_an_adapter_with_a_tokenizer_of_its_own_keeps_the_ends_of_its_base(base, sft_config, tmp_path):
    adapter = sft.train(sft_config(model=str(base), max_steps=1, learning_rate=1e-5)) / "adapter"
    (adapter / "generation_config.json").unlink()  # as an adapter has none that peft saved
    assert LISTED in load(base, adapter=adapter)[1].stop_ids
