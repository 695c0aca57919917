"""Supervised runs end to end on a tiny Phi: one gradient however a window is cut, precision, NEFTune, settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import phi2
from phi2.checkpoints.weights import load_model
from phi2.lora import lora_modules
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training import sft
from phi2.training.optim import Optimizer
from phi2.training.passes import Passes
from phi2.training.session import start
from phi2.training.sft import SFTConfig, evaluate, neftune, train

LORA = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
PROMPTS = ["Q?", "Q??"]


class Recorder(Optimizer):
    """Keeps the gradients of an update and leaves the weights alone."""

    def step(self) -> Tensor:
        self.gradients = {name: p.grad.clone() for p, name in self.names.items()}
        self.adamw.zero_grad()
        return torch.zeros(())


def policy_of(config: SFTConfig) -> Phi2ForCausalLM:
    """Adapters have learned something, so that every part of them has a gradient."""
    model = start(config).load_policy(config)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def rows_of(config: SFTConfig) -> list:
    return start(config).rows.train


# ---- one gradient, however the window is cut ----


def mean_over_tokens(model: Phi2ForCausalLM, rows: list) -> Tensor:
    """The loss by its definition: each row alone, whole logits."""
    losses = []
    for row in rows:
        ids, mask = torch.from_numpy(row.ids).long(), torch.from_numpy(row.mask)
        logps = model(ids[None]).float().log_softmax(-1)[0]
        losses.append(-logps[:-1].gather(1, ids[1:, None])[mask[1:], 0])
    return torch.cat(losses).mean()


SPLITS = {  # of rows the samples, and how many tokens a pass holds
    "one pass": (lambda rows: [[row] for row in rows], 10**6),
    "some passes": (lambda rows: [[row] for row in rows], 60),
    "one row a pass": (lambda rows: [[row] for row in rows], 1),
    "packed": (lambda rows: [rows[:4], rows[4:5], rows[5:9], rows[9:]], 100),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_gradient_is_that_of_the_mean_over_the_windows_target_tokens(sft_config, split, lora, checkpointing):
    config = sft_config(lora=lora, gradient_checkpointing=checkpointing)
    model, rows = policy_of(config), rows_of(config)
    loss = mean_over_tokens(model, rows)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    recorder = Recorder(model, config, 1, scale_loss=False)
    samples, max_tokens = SPLITS[split]
    metrics = sft.update(config, model.train(), recorder, samples(rows), Passes(max_tokens).cut).wait()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["target_tokens"] == sum(int(row.mask[1:].sum()) for row in rows)
    for name, gradient in recorder.gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_rows_with_more_targets_count_more(sft_config):
    """What a mean of the passes' means would get wrong."""
    config = sft_config()
    rows = sorted(rows_of(config), key=lambda row: row.target_tokens)
    window, model = [rows[0], rows[-1]], policy_of(config)
    alone = [mean_over_tokens(model, [row]).item() for row in window]
    tokens = [row.target_tokens for row in window]
    metrics = sft.update(config, model, Recorder(model, config, 1, False), [[row] for row in window], Passes(1).cut)
    loss = metrics.wait()["loss"]
    weighted = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    assert loss == pytest.approx(weighted, rel=1e-5) and abs(loss - sum(alone) / 2) > 1e-3


@pytest.mark.parametrize("max_tokens", [1, 50, 10**6])
def test_evaluation_is_the_mean_over_all_target_tokens_whatever_the_passes(sft_config, max_tokens):
    config = sft_config()
    model, rows = policy_of(config), rows_of(config)
    found = evaluate(config, model.train(), rows, Passes(max_tokens).cut)
    assert found["eval_loss"] == pytest.approx(mean_over_tokens(model, rows).item(), rel=1e-5)
    assert found["target_tokens"] == sum(row.target_tokens for row in rows)
    assert model.training


def test_evaluation_has_no_dropout(sft_config, tiny_phi_with_dropout):
    config = sft_config(model=str(tiny_phi_with_dropout))
    model, rows = policy_of(config), rows_of(config)
    cut = Passes(50).cut
    assert evaluate(config, model.train(), rows, cut) == evaluate(config, model, rows, cut)


# ---- whole runs ----


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_run_learns_and_leaves_its_folder(sft_config, sft_data, lora):
    config = sft_config(lora=lora, max_steps=8, eval_data=sft_data, eval_steps=4, save_steps=4, sample_prompts=PROMPTS)
    run = train(config)
    result = "model" if lora is None else "adapter"
    written = {path.name for path in run.path.iterdir()}
    assert written == {
        *("config.yaml", "environment.json", "inputs.json", "data_audit.json", "eval_audit.json"),
        *("metrics.jsonl", "samples.jsonl", "README.md", "checkpoints", result),
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-4", "step-8"}
    evaluations = [line for line in metrics_lines(run) if line["type"] == "eval"]
    assert [line["step"] for line in evaluations] == [4, 8]
    before = mean_over_tokens(load_model(config.model), rows_of(config)).item()
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"] < before
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in samples] == [(s, prompt) for s in (4, 8) for prompt in PROMPTS]
    assert all(line["finish_reason"] in ("stop", "length") for line in samples)


def metrics_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_update_leaves_one_line_of_metrics(sft_config):
    lines = metrics_lines(train(sft_config(warmup_steps=2, max_steps=4)))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {"step", "type", "loss", "grad_norm", "learning_rate", "target_tokens", "epoch", "tokens_per_second"}
    assert all(line.keys() == names for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 0.005, 0.01, 0.005])
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1.0, 4 / 3])  # 11 rows, 4 an update


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (0.5, 2), (2.0, 6)])
def test_a_run_without_max_steps_makes_its_epochs(sft_config, epochs, steps):
    assert len(metrics_lines(train(sft_config(max_steps=-1, num_train_epochs=epochs)))) == steps


def test_the_result_is_the_model_of_the_last_evaluation(sft_config, sft_data):
    config = sft_config(eval_data=sft_data)
    run = train(config)
    model, tokenizer = phi2.load(config.model, device="cpu", adapter=run / "adapter")
    expected = metrics_lines(run)[-1]["eval_loss"]
    assert mean_over_tokens(model, rows_of(config)).item() == pytest.approx(expected, rel=1e-5)
    assert tokenizer.prompt_style == "chatml"


def test_held_out_rows_are_evaluated_and_not_trained_on(sft_config):
    run = train(sft_config(test_fraction=0.2))
    assert json.loads((run / "data_audit.json").read_text())["kept"] == 8  # of 11; 3 are held out
    assert [line["type"] for line in metrics_lines(run)] == ["train"] * 6 + ["eval"]


def test_the_audit_counts_rows_that_were_dropped(sft_config, write_rows):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a" * 30, "completion": " b"}, {"prompt": "a", "text": 3}]
    run = train(sft_config(data=write_rows(rows), max_length=16, max_steps=1))
    audit = json.loads((run / "data_audit.json").read_text())
    assert (audit["rows"], audit["kept"], audit["dropped"]["prompt-too-long"]["rows"]) == (3, 1, 1)


@pytest.mark.parametrize("packing", ["best_fit", "wrapped"])
def test_packed_runs_train_on_full_blocks(sft_config, packing):
    lines = metrics_lines(train(sft_config(packing=packing, packing_length=48, max_steps=4, max_length=48)))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[0]["epoch"] > 1 / 3


def test_a_sample_prompt_that_does_not_fit_is_refused_before_the_first_update(sft_config):
    with pytest.raises(ValueError, match="the prompt has .* tokens, at most 255 leave room"):
        train(sft_config(sample_prompts=["?" * 300]))
    assert not (Path(sft_config().output) / "metrics.jsonl").exists()


WRAPPED = {"packing": "wrapped", "packing_length": 300, "max_length": 64}


@pytest.mark.parametrize("changes", [{}, {"max_length": None}, WRAPPED], ids=str)
def test_rows_longer_than_the_models_context_are_refused_before_the_first_update(sft_config, write_rows, changes):
    data = write_rows([{"text": "a" * 100}] * 9 + [{"text": "b" * 300}])
    with pytest.raises(ValueError, match=r"row \d+ has \d+ tokens, more than the model's context of 256: "):
        train(sft_config(data=data, **changes))


def test_a_held_out_row_longer_than_the_models_context_is_refused(sft_config, write_rows):
    with pytest.raises(ValueError, match="row 1 has 301 tokens, more than the model's context of 256"):
        train(sft_config(eval_data=write_rows([{"text": "a" * 300}])))


def test_a_row_as_long_as_the_models_context_trains(sft_config, write_rows):
    train(sft_config(data=write_rows([{"text": "a" * 300}]), max_length=256, max_steps=1))


def test_lora_settings_beside_an_adapter_are_refused(sft_config):
    with pytest.raises(ValueError, match="adapter brings its own LoRA settings"):
        sft_config(adapter="x", lora=LoraConfig(r=4))


def test_a_row_longer_than_a_block_is_refused(sft_config):
    with pytest.raises(ValueError, match="packing_length is 8, but a row has 66 tokens"):
        train(sft_config(packing="best_fit", packing_length=8))


def test_from_scratch_starts_from_the_seed_and_not_from_the_folders_weights(
    sft_config, tmp_path, weights_of, assert_same_weights
):
    settings = dict(lora=None, from_scratch=True, max_steps=1, warmup_steps=1)  # its one update has learning rate 0
    runs = [
        train(sft_config(**settings, output=str(tmp_path / str(number)), seed=seed))
        for number, seed in enumerate((1, 1, 2))
    ]
    assert_same_weights(runs[0], runs[1])
    name = "model.embed_tokens.weight"
    start = load_model(sft_config().model).state_dict()[name]
    first, _, other = (weights_of(run)[name] for run in runs)
    assert not torch.equal(first, other) and not torch.equal(first, start)
    assert first.std().item() == pytest.approx(0.2, rel=0.05)  # initializer_range of the folder's config.json


def base_folder(make_phi, vocab_size: int) -> Path:
    """A model whose tokenizer has 258 ids and no ChatML."""
    folder = make_phi(vocab_size=vocab_size)
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] == "<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 257, "eos_token_id": 257}))
    return folder


def test_a_base_tokenizer_learns_chatml_and_goes_with_the_result(sft_config, make_phi):
    folder = base_folder(make_phi, 272)
    assert Tokenizer.from_folder(folder).prompt_style == "instruct"
    assert Tokenizer.from_folder(train(sft_config(model=str(folder), max_steps=1)) / "adapter").prompt_style == "chatml"


OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(
    ("choice", "written", "said"),
    [
        ("auto", "[{{ m.role }}]", "the model's own"),
        ("chatml", "<|im_start|>", "ChatML, in place of the model's own"),
        ("mine.jinja", "<{{ m.role }}>", "mine.jinja, in place of the model's own"),
    ],
)
def test_a_models_own_template_is_replaced_by_name_only(
    sft_config, make_phi, tmp_path, monkeypatch, capsys, choice, written, said
):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}")
    folder = make_phi()
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    run = train(sft_config(model=str(folder), max_steps=1, chat_template=choice))
    assert f"chat template: {said}\n" in capsys.readouterr().out
    assert written in Tokenizer.from_folder(run / "adapter").chat_template
    card = (run / "README.md").read_text()
    assert f"Chat template: {said}." in card and f"| chat_template | `{choice}` |" in card


def test_sample_prompts_are_asked_in_the_models_own_template(sft_config, make_phi, monkeypatch):
    asked = []
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda t, *given: asked.append(t.render_prompt(*given)) or [1])
    folder = make_phi()
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    train(sft_config(model=str(folder), max_steps=1, sample_prompts=["Why?"]))
    assert set(asked) == {"[user] Why?<|endoftext|>[assistant] "}


def test_a_base_model_may_stay_without_a_template(sft_config, make_phi, write_rows):
    rows = write_rows([{"prompt": "Q", "completion": "A"}] * 4)
    run = train(sft_config(model=str(base_folder(make_phi, 272)), data=rows, max_steps=1, chat_template="none"))
    assert Tokenizer.from_folder(run / "adapter").chat_template is None


def test_a_model_without_embeddings_for_the_chatml_tokens_is_refused(sft_config, make_phi):
    with pytest.raises(ValueError, match="the tokenizer has 260 ids, the model 258 embedding rows"):
        train(sft_config(model=str(base_folder(make_phi, 258))))


def test_a_folder_without_an_adapter_is_refused_before_the_data_is_read(sft_config, tmp_path):
    run = train(sft_config(max_steps=1))
    with pytest.raises(FileNotFoundError, match=rf"did you mean {run / 'adapter'}\?"):
        train(sft_config(data="missing.jsonl", adapter=str(run), lora=LoraConfig(), output=str(tmp_path / "second")))


def test_training_goes_on_from_an_adapter(sft_config, tmp_path, weights_of):
    first = train(sft_config())
    second = train(sft_config(output=str(tmp_path / "second"), adapter=str(first / "adapter"), lora=LoraConfig()))
    assert metrics_lines(second)[0]["loss"] < metrics_lines(first)[0]["loss"] / 1.2
    assert weights_of(second).keys() == weights_of(first).keys()


# ---- precision ----


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_begin_at_the_float32_loss_and_learn(sft_config, weights_of, tmp_path, dtype, lora):
    exact = metrics_lines(train(sft_config(lora=lora, output=str(tmp_path / "float32"), max_steps=1)))
    run = train(sft_config(lora=lora, dtype=dtype, max_steps=10, save_steps=10))
    lines = metrics_lines(run)
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert min(line["loss"] for line in lines) < 0.9 * lines[0]["loss"]
    assert dtypes_in(weights_of(run)) == ({torch.float32} if lora else {getattr(torch, dtype)})
    assert dtypes_in(weights_of(run / "checkpoints" / "step-10")) == {torch.float32}


def dtypes_in(weights: dict[str, Tensor]) -> set[torch.dtype]:
    """Of what was trained."""
    return {tensor.dtype for name, tensor in weights.items() if "base_layer" not in name}


def test_float16_runs_leave_out_updates_that_overflow(sft_config):
    """The loss scale starts at 65536: the first update of a loss of several nats overflows and is not counted."""
    run = train(sft_config(dtype="float16", max_steps=3))
    state = json.loads((run / "checkpoints" / "step-3" / "state.json").read_text())
    overflowed = [line["step"] for line in metrics_lines(run) if line["grad_norm"] == float("inf")]
    assert state["optimizer"]["updates"] == 3 - len(overflowed)
    assert state["optimizer"]["scaler"]["scale"] == 65536 / 2 ** len(overflowed)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_run_that_diverges_stops_with_a_line_and_no_checkpoint_of_it(sft_config, lora):
    config = sft_config(learning_rate=1e30, lora=lora, max_steps=20, save_steps=1, save_total_limit=20)
    with pytest.raises(ValueError, match=r"(update|step) \d+: the .* (nan|inf); try a lower learning_rate") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    saved = [load_file(path) for path in Path(config.output, "checkpoints").rglob("*.safetensors")]
    assert saved and all(tensor.isfinite().all() for tensors in saved for tensor in tensors.values())


# ---- NEFTune ----


def test_neftune_adds_noise_by_the_length_of_each_sample():
    x = torch.randn(1, 500, 64)
    noise = neftune(5.0, [100, 400])(x) - x
    for part, tokens in ((noise[:, :100], 100), (noise[:, 100:], 400)):
        size = 5.0 / (tokens * 64) ** 0.5
        assert 0.98 * size < part.abs().max() <= size * (1 + 1e-4)
        assert part.mean().abs() < 0.03 * size and part.std().item() == pytest.approx(size / 3**0.5, rel=0.03)


def test_neftune_is_for_training_and_only_where_it_is_asked_for(sft_config):
    losses = []
    for alpha in (0.0, 20.0):
        config = sft_config(neftune_noise_alpha=alpha)
        model, rows = policy_of(config), rows_of(config)
        metrics = sft.update(config, model, Recorder(model, config, 1, False), [rows], Passes(1).cut)
        losses.append(metrics.wait()["loss"])
        losses.append(evaluate(config, model, rows, Passes(10**6).cut)["eval_loss"])
    plain, plain_eval, noisy, noisy_eval = losses
    assert plain == pytest.approx(plain_eval, rel=1e-5) and noisy_eval == plain_eval and abs(noisy - plain) > 1e-3


# ---- settings ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative, got -1.0"),
        ({"test_fraction": 1.0}, r"test_fraction must be in \[0, 1\), got 1.0"),
        ({"max_steps": 0}, "max_steps must be -1 or positive"),
        ({"num_train_epochs": 0.0}, "num_train_epochs positive"),
        ({"lora": None, "adapter": "x"}, "adapter goes on training a LoRA adapter"),
        ({"eval_data": "x", "test_fraction": 0.1}, "give eval_data or test_fraction, not both"),
        ({"from_scratch": True}, "from_scratch trains every weight: it needs lora: null"),
        ({"save_strategy": "no", "save_steps": 5}, "save_steps 5 needs save_strategy steps"),
        ({"packing": "wrapped", "packing_length": 1}, "packing_length must be at least 2, got 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(sft_config, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        sft_config(**changes)
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_run_can_be_read_back(sft_config):
    config = sft_config(max_steps=1, learning_rate=3e-5)
    raw = yaml.safe_load((train(config) / "config.yaml").read_text())
    assert SFTConfig(**{**raw, "lora": LoraConfig(**raw["lora"])}) == config
