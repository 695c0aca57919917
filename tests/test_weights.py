"""Checkpoints in and out: what loads, what is refused and how it is named, and that saving is all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi2 import lora
from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import load, load_config, load_model, pick_device, pick_dtype, save_pretrained
from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

CONFIG = Phi2Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    partial_rotary_factor=0.5,
    bos_token_id=256,
    eos_token_id=256,
)
SHARD = 40_000  # bytes; the model above then takes several files
EMBEDDING, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.bias"


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_model(seed: int = 0) -> Phi2ForCausalLM:
    model = Phi2ForCausalLM(CONFIG)
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The 256 bytes and <|endoftext|>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {"bos_token": "<|endoftext|>"})


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model in one file."""
    save_pretrained(make_model(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_pretrained(make_model(), tokenizer, tmp_path / "sharded", max_shard_size=SHARD)
    return tmp_path / "sharded"


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Rewrites model.safetensors with tensors replaced, added or (None) left out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


def change_json(path: Path, **changes) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


def assert_same_weights(model: Phi2ForCausalLM, expected: Phi2ForCausalLM) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def one_line_error(match: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=rf"\A[^\n]*{match}[^\n]*\Z")


# Loading


def test_one_file_loads_as_it_was_saved(folder):
    assert_same_weights(load_model(folder), make_model())


def test_shards_load_as_they_were_saved(sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert_same_weights(load_model(sharded), make_model())


def test_a_loaded_model_is_in_eval_mode_and_trainable(folder):
    model = load_model(folder)
    assert not model.training and all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_loaded_model_computes_what_the_saved_one_did(folder):
    ids = torch.arange(12)[None]
    assert torch.equal(load_model(folder)(ids), make_model()(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_weights_take_the_dtype_asked_for(folder, dtype):
    assert {p.dtype for p in load_model(folder, dtype=dtype).parameters()} == {pick_dtype(dtype, torch.device("cpu"))}


def test_half_precision_files_load_as_float32_on_the_cpu(tmp_path, tokenizer):
    save_pretrained(make_model(), tokenizer, tmp_path / "half", dtype="float16")
    assert load_model(tmp_path / "half").dtype == torch.float32


def test_a_model_outlives_its_file(folder):
    """The parameters are copies: overwriting the file in place does not reach them."""
    model = load_model(folder)
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * size)
    assert_same_weights(model, make_model())


def test_the_embedding_decides_the_vocabulary_size(folder):
    change_json(folder / "config.json", vocab_size=51200)
    model = load_model(folder)
    assert (model.config.vocab_size, model.lm_head.out_features) == (300, 300)


def test_rotary_tables_in_the_file_are_skipped(folder):
    change_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert_same_weights(load_model(folder), make_model())


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi-2.v4", 2_779_683_840),
        ("phi-2.v5", 2_779_683_840),
        ("phi-1_5.v4", 1_418_270_720),
        ("phi-2-instruct.derived", 2_775_059_577),
    ],
)
def test_published_configs_give_the_published_number_of_parameters(shared, tmp_path, name, parameters):
    (tmp_path / "config.json").write_text((shared / f"configs/{name}.config.json").read_text())
    with torch.device("meta"):
        model = Phi2ForCausalLM(load_config(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mixformer.phi-2", "phi-msft.phi-2"])
def test_configs_of_older_layouts_are_refused(shared, tmp_path, name):
    (tmp_path / "config.json").write_text((shared / f"configs/{name}.config.json").read_text())
    with one_line_error("config.json: .*older"):
        load_config(tmp_path)


# What does not load


def test_a_missing_config_names_the_folder(tmp_path):
    with one_line_error(f"no config.json in {tmp_path}", FileNotFoundError):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_config_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with one_line_error("config.json: "):
        load_config(tmp_path)


def test_a_wrong_config_field_is_named(folder):
    change_json(folder / "config.json", num_hidden_layers="two")
    with one_line_error("config.json: num_hidden_layers .* got 'two'"):
        load_config(folder)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with one_line_error("LoRA adapter: .*--adapter"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "README.md"])
def test_without_safetensors_the_remedy_is_named(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    with one_line_error(r"safe_serialization=True", FileNotFoundError):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with one_line_error("model.safetensors: truncated or damaged"):
        load_model(folder)


def test_a_header_of_noise_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    with one_line_error("model.safetensors: truncated or damaged"):
        load_model(folder)


def test_a_truncated_shard_is_named(sharded):
    path = next(sharded.glob("model-00002-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with one_line_error(f"{path.name}: truncated or damaged"):
        load_model(sharded)


def test_a_missing_shard_is_named(sharded):
    path = next(sharded.glob("model-00002-*"))
    path.unlink()
    with one_line_error(f"index.json: names the shard {path.name}", FileNotFoundError):
        load_model(sharded)


def test_an_index_that_promises_an_absent_tensor_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    change_json(path, weight_map=weight_map | {"model.ghost": weight_map[EMBEDDING]})
    with one_line_error("index.json: disagrees with model-.* model.ghost"):
        load_model(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {EMBEDDING: 3}, {EMBEDDING: "../model.safetensors"}])
def test_an_index_without_plain_file_names_is_refused(sharded, weight_map):
    change_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with one_line_error("index.json: weight_map must"):
        load_model(sharded)


def test_everything_that_does_not_fit_is_in_one_error(folder):
    integers = torch.zeros(64, dtype=torch.int64)
    wrong = {"lm_head.weight": torch.zeros(2, 2), "model.final_layernorm.bias": integers}
    change_tensors(folder, **wrong, **{HEAD_BIAS: None, "extra": torch.zeros(1)})
    with one_line_error(
        r"1 missing \(lm_head.bias\); 1 unexpected \(extra\); 1 of another shape \(lm_head.weight \(2, 2\) for"
        r" \(300, 64\)\); 1 not floating point \(model.final_layernorm.bias I64\)"
    ):
        load_model(folder)


def test_a_long_list_is_counted_and_cut_short(folder):
    change_json(folder / "config.json", num_hidden_layers=12)
    with one_line_error("140 missing") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("layers.0.wte.weight", "mixformer"),
        ("transformer.embd.wte.weight", "phi-msft"),
        ("transformer.h.0.mixer.Wqkv.weight", "phi-msft"),
        ("model.layers.0.self_attn.query_key_value.weight", "4.36"),
    ],
)
def test_older_layouts_are_refused_by_name(folder, name, layout):
    change_tensors(folder, **{name: torch.zeros(2)})
    with one_line_error(f"{name} is of the older layout .*{layout}"):
        load_model(folder)


@pytest.mark.parametrize(("device", "match"), [("tpu9", "device must be"), ("cuda:99", "torch sees")])
def test_a_device_that_is_not_there_is_refused(device, match):
    with one_line_error(match):
        pick_device(device)


@pytest.mark.parametrize("dtype", ["int8", "half", torch.float64])
def test_other_dtypes_are_refused(dtype):
    with one_line_error("dtype must be one of float32, bfloat16, float16"):
        pick_dtype(dtype, torch.device("cpu"))


# Saving


def test_saved_configs_carry_the_tokens_of_the_tokenizer(tmp_path, tokenizer):
    save_pretrained(make_model(), tokenizer.with_chatml(), tmp_path / "chat")
    config, generation = (
        json.loads((tmp_path / "chat" / f).read_text()) for f in ("config.json", "generation_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (257, 258)
    assert generation == {"bos_token_id": 257, "eos_token_id": [256, 258], "pad_token_id": 258}


def test_saved_configs_name_the_dtype_of_the_weights(tmp_path, tokenizer):
    save_pretrained(make_model().bfloat16(), tokenizer, tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_dtype_casts_what_is_stored_and_not_the_model(tmp_path, tokenizer):
    model = make_model()
    save_pretrained(model, tokenizer, tmp_path / "half", dtype="float16")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16} and model.dtype == torch.float32


def test_weights_that_are_views_of_one_buffer_are_saved_apart(tmp_path, tokenizer):
    model = make_model()
    attention = model.model.layers[0].self_attn
    buffer = torch.cat([attention.q_proj.weight, attention.k_proj.weight]).detach()
    attention.q_proj.weight, attention.k_proj.weight = map(torch.nn.Parameter, buffer.chunk(2))
    save_pretrained(model, tokenizer, tmp_path / "views")
    assert_same_weights(load_model(tmp_path / "views"), make_model())


def test_saved_weights_can_be_read_by_whoever_can_read_the_config(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_saving_leaves_no_temporary_folder(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_occupied_folder_is_refused(folder, tokenizer):
    with one_line_error("not empty; .*overwrite=True"):
        save_pretrained(make_model(1), tokenizer, folder)
    assert_same_weights(load_model(folder), make_model())


def test_overwrite_replaces_the_whole_folder(folder, tokenizer):
    (folder / "model-00001-of-00002.safetensors").touch()
    save_pretrained(make_model(1), tokenizer, folder, overwrite=True)
    assert_same_weights(load_model(folder), make_model(1))
    assert not (folder / "model-00001-of-00002.safetensors").exists()


def test_overwrite_spares_a_folder_that_holds_no_model(tmp_path, tokenizer):
    (tmp_path / "thesis.tex").touch()
    with one_line_error("holds no model, so it is not replaced"):
        save_pretrained(make_model(), tokenizer, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_may_be_filled(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    save_pretrained(make_model(), tokenizer, tmp_path / "empty")
    assert_same_weights(load_model(tmp_path / "empty"), make_model())


def test_what_an_interrupted_save_left_is_cleared_away(folder, tokenizer):
    (folder.parent / ".model.unfinished/deep").mkdir(parents=True)
    (folder.parent / ".model.old").mkdir()
    (folder.parent / ".model.old/config.json").touch()
    save_pretrained(make_model(1), tokenizer, folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model(folder, tokenizer):
    with one_line_error("XB"):
        save_pretrained(make_model(1), tokenizer, folder, overwrite=True, max_shard_size="5XB")
    assert_same_weights(load_model(folder), make_model())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_model(folder):
    """In a process of its own, which may not write a file larger than 64 KiB."""
    code = """
import resource, signal, sys
from dataclasses import replace
from phi2.model import Phi2ForCausalLM
from phi2.checkpoints.weights import load, save_pretrained
model, tokenizer = load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_pretrained(Phi2ForCausalLM(model.config), tokenizer, sys.argv[1], overwrite=True)
except OSError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert "could not be written" in run.stdout and run.stdout.count("\n") == 1, run.stderr
    assert_same_weights(load_model(folder), make_model())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_with_lora_is_refused(tmp_path, tokenizer):
    model = make_model()
    lora.attach(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    with one_line_error("merge it before saving"):
        save_pretrained(model, tokenizer, tmp_path / "merged")


def test_a_quantised_model_is_refused(tmp_path, tokenizer):
    model = make_model()
    model.lm_head.register_buffer("weight_int8", torch.zeros(2, dtype=torch.int8))
    with one_line_error("quantised"):
        save_pretrained(model, tokenizer, tmp_path / "quantised")


# The whole


def test_load_gives_model_and_tokenizer(folder, tokenizer):
    model, loaded = load(folder, device="cpu")
    assert_same_weights(model, make_model())
    assert loaded.encode("héllo") == tokenizer.encode("héllo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_load_prefers_cuda_and_half_precision_there(folder):
    model, _ = load(folder)
    assert (model.device.type, model.dtype) == ("cuda", pick_dtype("auto", torch.device("cuda")))
    assert model.dtype in (torch.bfloat16, torch.float16)


def test_load_refuses_a_tokenizer_with_more_ids_than_embeddings(tmp_path, tokenizer):
    small = Phi2ForCausalLM(replace(CONFIG, vocab_size=200))
    save_pretrained(small, tokenizer, tmp_path / "small")
    with one_line_error("257 ids, more than the 200 embedding rows"):
        load(tmp_path / "small", device="cpu")


def test_load_attaches_an_adapter_and_takes_its_tokenizer(folder, tokenizer, tmp_path):
    model = make_model()
    lora.attach(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter", str(folder))
    tokenizer.with_chatml().save(tmp_path / "adapter")
    adapted, loaded = load(folder, device="cpu", adapter=tmp_path / "adapter")
    assert lora.has_adapter(adapted) and not adapted.training and loaded.eos_id == 258
