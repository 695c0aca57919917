"""Every setting changes what is computed, or is refused by its name where it would not: none is given in vain."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file

from phi2.checkpoints.weights import load
from phi2.data.inspect import InspectConfig, inspect_data
from phi2.inference.config import SamplingParams
from phi2.inference.generate import generate
from phi2.lora_config import LoraConfig
from phi2.training import dpo, sft
from phi2.training.config import BemaConfig, DPOConfig, SFTConfig
from phi2.training.session import Session

LORA = LoraConfig(r=4, target_modules=("q_proj", "fc1"))
WITHOUT_EFFECT = {  # field -> why it may leave everything computed as it was
    "output": "where the results go",
    "device": "this test has only a CPU",
    "resume": "goes on with a run, and has tests of its own",
    "gradient_checkpointing": "memory for time, with the same numbers",
    "fuse": "another form of the same computation",
    "reference_cache": "where a reference is kept",
    "max_tokens_per_pass": "how an update is computed, with the same numbers",
}
ENCODE = {  # field -> (another value, what it needs to matter)
    "max_length": (8, {}),
    "train_on": ("all", {}),
    "boundary": ("split", {}),
    "truncation_mode": ("drop", {}),
    "append_eos": (False, {}),
    "ignore_columns": (["images"], {"data": "with images"}),
    "special_tokens_in_text": ("text", {}),
}
TRAINING = {
    "model": ("another model", {}),
    "data": ("other rows", {}),
    "lora": (LoraConfig(r=2, target_modules=("q_proj", "fc1")), {}),
    "adapter": ("an adapter", {"lora": LoraConfig()}),
    "eval_data": ("rows", {}),
    "test_fraction": (0.3, {}),
    "split_seed": (7, {"test_fraction": 0.3}),
    "max_steps": (2, {}),
    "num_train_epochs": (0.5, {"max_steps": -1}),
    "per_device_train_batch_size": (3, {}),
    "gradient_accumulation_steps": (1, {}),
    "learning_rate": (1e-3, {}),
    "lr_scheduler_type": ("cosine", {}),
    "warmup_steps": (1, {}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_epsilon": (1e-2, {}),
    "max_grad_norm": (1e-3, {}),
    "dtype": ("bfloat16", {}),
    "seed": (1, {}),
    "shuffle": (False, {}),
    "logging_steps": (2, {}),
    "eval_steps": (1, {"eval_data": "rows"}),
    "save_strategy": ("no", {}),
    "save_steps": (1, {}),
    "save_total_limit": (1, {"save_steps": 1}),
    "sample_prompts": (["Q?"], {}),
}
SFT = {
    **ENCODE,
    **TRAINING,
    "max_prompt_length": (4, {}),  # for pairs
    "packing": ("best_fit", {}),
    "packing_length": (64, {"packing": "wrapped"}),
    "neftune_noise_alpha": (5.0, {}),
    "chat_template": ("none", {}),
    "from_scratch": (True, {"lora": None}),
}
DPO = {
    "max_prompt_length": (3, {"truncation_mode": "keep_end", "max_length": 8}),
    "loss": ("ipo", {}),
    "beta": (0.5, {}),
    "label_smoothing": (0.2, {}),
    "loss_args": ({"label_smoothing": 0.2}, {}),
    "loss_file": ("a loss file", {"loss": "of_the_test"}),
    "nll_weight": (0.5, {}),
    "reference": ("another model", {}),
    "precompute_ref_log_probs": (True, {}),
    "sync_ref_model": (True, {"ref_model_sync_steps": 1}),
    "ref_model_sync_steps": (1, {"sync_ref_model": True}),
    "ref_model_mixup_alpha": (0.1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "bema": (BemaConfig(), {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "disable_dropout": (False, {"model": "with dropout"}),
    "ledger": (False, {"test_fraction": 0.3}),
    "weights_from": ("a run that evaluated the pairs", {}),
}
INSPECT = {
    **{name: entry for name, entry in SFT.items() if name in ("data", "chat_template", *ENCODE)},
    "model": ("nano", {}),
    "kind": ("preference", {}),
    "rows": (1, {}),
    "ids": (True, {}),
    "max_prompt_length": (4, {}),
}
SAMPLING = {
    "max_new_tokens": (5, {}),
    "temperature": (1.0, {}),
    "top_k": (2, {"temperature": 3.0}),
    "top_p": (0.3, {"temperature": 3.0}),
    "min_p": (0.5, {"temperature": 3.0}),
    "repetition_penalty": (5.0, {}),
    "seed": (1, {"temperature": 3.0}),
    "stop": ("the end of the greedy reply", {}),
}


@pytest.fixture(scope="module")
def things(make_phi, write_rows, pair_data, tiny_phi_with_dropout, tmp_path_factory):
    """What the tables above name in words."""
    turns = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "the boat"}]
    chats = [{"messages": turns}, {"messages": [turns[0] | {"content": "hi"}, turns[1]]}]
    rows = [{"prompt": "Q" * (1 + i) + " t", "completion": "he end" + " the" * 4 * i} for i in range(6)] + chats
    loss = tmp_path_factory.mktemp("loss") / "mine.py"
    loss.write_text(
        "import phi2\n\n\n@phi2.preference_loss('of_the_test')\n"
        "def of_the_test(pairs, *, beta: float = 0.1):\n    return -beta * pairs.margin\n"
    )
    start = dict(data=write_rows(rows), device="cpu", lora=LORA, max_steps=1, learning_rate=1e-2, max_length=64)
    adapter = sft.train(SFTConfig(model=str(make_phi()), output=str(tmp_path_factory.mktemp("start") / "run"), **start))
    judge = dict(start, data=pair_data, eval_data=pair_data, output=str(tmp_path_factory.mktemp("judge") / "run"))
    return {
        "a run that evaluated the pairs": str(dpo.train(DPOConfig(model=str(make_phi()), **judge))),
        "rows": write_rows(rows),
        "with images": write_rows([*rows, {**chats[1], "images": ["x.png"]}]),
        "other rows": write_rows(rows[2:]),
        "another model": str(make_phi(seed=1)),
        "with dropout": str(tiny_phi_with_dropout),
        "an adapter": str(adapter / "adapter"),
        "a loss file": str(loss),
    }


@pytest.fixture(scope="module")
def computed(things, make_phi, pair_data, tmp_path_factory):
    """What a run computes: its metrics, weights, samples and audits, and which files it leaves; or its error."""
    known = {}

    def run(config, train, settings):
        key = (config, json.dumps(settings, default=repr, sort_keys=True))
        if key not in known:
            known[key] = once(config, train, settings)
        return known[key]

    def once(config, train, settings):
        settings = {k: things.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
        data = things["rows"] if config is SFTConfig else pair_data
        base = dict(model=str(make_phi()), data=data, device="cpu", lora=LORA, max_steps=3, max_length=40)
        base |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
        output = tmp_path_factory.mktemp("settings") / "run"
        try:
            folder = train(config(**{**base, "output": str(output), **settings})).path
        except ValueError as error:
            return str(error)
        return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}

    return run


def content(path: Path):
    """What of a file depends on what was computed."""
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
    if path.suffix == ".safetensors":
        return {name: tensor.double().numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.name in ("samples.jsonl", "data_audit.json", "eval_audit.json"):
        return path.read_bytes()
    return None


def assert_is_not_in_vain(name, other, needs, compute):
    """Where it has all it needs it changes something; alone it changes something or is refused by its name."""
    together = compute({**needs, name: other})
    assert together != compute(needs) or refuses(together, name), f"{name} changes nothing with {needs}"
    alone = compute({name: other})
    assert refuses(alone, name) if isinstance(alone, str) else alone != compute({}), f"{name} alone changes nothing"


def refuses(result, name: str) -> bool:
    return isinstance(result, str) and name in result and "\n" not in result


@pytest.mark.parametrize("name", SFT)
def test_no_setting_of_a_supervised_run_is_given_in_vain(name, computed):
    assert_is_not_in_vain(name, *SFT[name], lambda settings: computed(SFTConfig, sft.train, settings))


@pytest.mark.parametrize("name", DPO)
def test_no_setting_of_a_preference_run_is_given_in_vain(name, computed):
    assert_is_not_in_vain(name, *DPO[name], lambda settings: computed(DPOConfig, dpo.train, settings))


@pytest.mark.parametrize("name", INSPECT)
def test_no_setting_of_inspect_is_given_in_vain(name, things, make_phi):
    def shown(settings):
        settings = {k: things.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
        base = dict(model=str(make_phi()), data=things["rows"], kind="supervised", rows=9, max_length=40)
        try:
            return {"shown": inspect_data(InspectConfig(**{**base, **settings}))}
        except ValueError as error:
            return str(error)

    other, needs = INSPECT[name]
    if name == "kind":
        assert "preference" in shown({"kind": other})
    else:
        assert_is_not_in_vain(name, other, needs, shown)


@pytest.mark.parametrize("name", SAMPLING)
def test_no_setting_of_sampling_is_given_in_vain(name, make_phi):
    model, tokenizer = load(make_phi())

    def said(settings):
        try:
            reply = generate(model, tokenizer, "the", **{"max_new_tokens": 12, **settings})
        except ValueError as error:
            return str(error)
        return {"ids": reply.token_ids, "text": reply.text}

    other, needs = SAMPLING[name]
    assert_is_not_in_vain(name, said({})["text"][-1] if name == "stop" else other, needs, said)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (SFTConfig, SFT),
        (DPOConfig, {**TRAINING, **ENCODE, **DPO}),
        (InspectConfig, INSPECT),
        (SamplingParams, SAMPLING),
    ],
)
def test_every_setting_stands_in_a_table(config, table):
    assert {field.name for field in fields(config)} <= table.keys() | WITHOUT_EFFECT.keys()


def test_what_has_no_effect_is_a_setting():
    assert WITHOUT_EFFECT.keys() <= {f.name for config in (SFTConfig, DPOConfig) for f in fields(config)}


def test_dropout_of_an_adapter_needs_dropout_in_a_preference_run():
    with pytest.raises(ValueError, match="^lora_dropout 0.1 needs disable_dropout false, got true$"):
        DPOConfig(model="m", data="d", output="o", lora=LoraConfig(lora_dropout=0.1))


def test_dropout_left_on_where_there_is_none_is_refused(dpo_config):
    with pytest.raises(ValueError, match="^disable_dropout false needs a dropout, got 0 in the model's config.json"):
        dpo.train(dpo_config(disable_dropout=False))


def test_a_warm_up_that_outlasts_the_run_is_refused_before_anything_is_loaded(sft_config, monkeypatch):
    monkeypatch.setattr(Session, "load_policy", None)
    with pytest.raises(ValueError, match="^warmup_steps 7 outlasts the run: it must be at most its 6 updates$"):
        sft.train(sft_config(warmup_steps=7))


def test_the_settings_of_a_finished_run_are_loaded_as_they_stand(sft_config, tmp_path):
    import yaml

    from phi2.cli.flags import parse

    run = sft.train(sft_config(max_steps=1))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**settings, "resume": True}))
    parse("sft", "", lambda config: config, SFTConfig, ["--config", str(tmp_path / "again.yaml")])()
