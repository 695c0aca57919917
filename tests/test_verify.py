"""`phi2 verify`: every line is green on a sound model, and each is red once what it promises is broken."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

import phi2
from phi2.checkpoints import peft_files, weights
from phi2.checkpoints.weights import load, load_model, save_pretrained
from phi2.cli.commands import main
from phi2.lab import checks, noise
from phi2.lab.verify import OF_POLICY, OF_RUNS, Line, Verification, line_of, rows_of, subject_of
from phi2.lab.verify_config import VerifyConfig
from phi2.training import dpo, optim, session
from phi2.training.objective import Objective
from phi2.training.reference import another_model
from phi2.training.session import Rows, start


@contextmanager
def subject_on(folder: Path, **settings):
    config = VerifyConfig(device="cpu", **settings)
    run = config.run(str(folder / "run"))
    opened = start(run)
    opened.rows = Rows(rows_of(config, opened.tokenizer), [], {})
    with subject_of(opened, run, folder) as subject:
        yield subject


@pytest.fixture(scope="module")
def subject(tiny_phi, pair_data, tmp_path_factory):
    with subject_on(tmp_path_factory.mktemp("verify"), model=str(tiny_phi), data=pair_data, rows=6) as opened:
        yield opened


@pytest.fixture
def opened(tiny_phi, pair_data, tmp_path):
    """A session, the settings of a short run on it, and a folder."""
    config = VerifyConfig(model=str(tiny_phi), data=pair_data, rows=6, device="cpu")
    run = config.run(str(tmp_path / "run"))
    session = start(run)
    session.rows = Rows(rows_of(config, session.tokenizer), [], {})
    return session, run, tmp_path


def is_red(name: str, subject) -> bool:
    return line_of(name, OF_POLICY[name], subject).is_red


def test_a_sound_model_is_green_from_python(tiny_phi, pair_data):
    found = phi2.verify(model=str(tiny_phi), data=pair_data, rows=6, device="cpu")
    assert [line.verdict for line in found.lines] == ["green"] * 18, str(found)
    assert len(found.rows) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sound_model_is_green_in_half_precision(tiny_phi, pair_data, dtype):
    found = phi2.verify(model=str(tiny_phi), data=pair_data, rows=3, device="cpu", dtype=dtype)
    assert found.red == [], str(found)


def test_an_adapter_is_verified_as_the_policy_that_it_is(dpo_config, pair_data):
    run = dpo.train(dpo_config(max_steps=3))
    found = phi2.verify(model=dpo_config().model, adapter=run / "adapter", data=pair_data, rows=6, device="cpu")
    assert found.red == [] and "margins (policy - reference)" in str(found)


def test_lists_of_scored_answers_are_verified_too(tiny_phi, write_rows):
    rows = [{"prompt": "Q" * n, "completions": ["ab", " c d", "ef" * n], "scores": [n, 3.5, -1]} for n in (1, 2, 5)]
    found = phi2.verify(model=str(tiny_phi), data=write_rows(rows), device="cpu")
    assert found.red == [] and len(found.noise.margins) == 3, str(found)


def test_the_command_prints_the_noise_floor_and_a_line_for_each_promise(tiny_phi, pair_data, capsys):
    assert main(["verify", "--model", str(tiny_phi), "--data", pair_data, "--rows", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "of 2 pairs have a margin below it" in told
    assert sum(line.startswith("green") for line in told.splitlines()) == 18


def test_the_command_ends_with_1_and_the_number_of_red_lines(tiny_phi, pair_data, make_phi, monkeypatch, capsys):
    other = another_model(load_model(make_phi(seed=3)))
    monkeypatch.setattr("phi2.training.reference.adapters_off", lambda model: other)
    assert main(["verify", "--model", str(tiny_phi), "--data", pair_data, "--rows", "4", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    red = {line[9:49].strip() for line in told.out.splitlines() if line.startswith("RED")}
    assert {"policy is reference at step 0", "loss at step 0", "same seed, same adapter"} <= red
    assert told.err.splitlines()[-1] == f"phi2 verify: {len(red)} of 18 lines are red"
    assert "step 1: policy and reference must agree" in told.out


def test_the_page_tells_of_every_line():
    page = (Path(__file__).parents[1] / "docs" / "verify.md").read_text(encoding="utf-8")
    told = {
        cell.strip() for line in page.splitlines() if line.startswith("|") for cell in line.split("|")[1].split(";")
    }
    names = {*OF_POLICY, *OF_RUNS, "model saved and loaded"}
    assert {name.removeprefix("log-probs ") for name in names} <= {name.removeprefix("log-probs ") for name in told}


# ---- a fault for every line ----


def test_attention_that_looks_at_its_neighbours_is_red_where_there_are_any(subject, monkeypatch):
    see_all = phi2.model.Visibility
    monkeypatch.setattr("phi2.model.Visibility", lambda T, S, until, device: see_all(T, S, None, device))
    names = [name for name in OF_POLICY if name.startswith("log-probs")]
    red = {name for name in names if is_red(name, subject)}
    assert red == {*names} - {"log-probs are finite", "log-probs in a padded batch"}
    assert is_red("gradient of separate rows", subject)


def test_it_is_red_in_bfloat16_too(tiny_phi, pair_data, tmp_path, monkeypatch):
    see_all = phi2.model.Visibility
    with subject_on(tmp_path, model=str(tiny_phi), data=pair_data, rows=6, dtype="bfloat16") as brain:
        monkeypatch.setattr("phi2.model.Visibility", lambda T, S, until, device: see_all(T, S, None, device))
        assert is_red("log-probs packed", brain) and is_red("log-probs with a shared prompt", brain)


def test_rows_of_a_batch_that_are_mixed_are_red(subject, monkeypatch):
    forward = phi2.model.Phi2Model.forward

    def mixed(*given, **named):
        hidden = forward(*given, **named)
        return hidden + 0.01 * hidden.mean(dim=0, keepdim=True) if len(hidden) > 1 else hidden

    monkeypatch.setattr(phi2.model.Phi2Model, "forward", mixed)
    assert is_red("log-probs in a padded batch", subject)


def test_a_loss_averaged_over_each_pass_is_red(subject, monkeypatch):
    losses_of = Objective.losses

    def uneven(*given):
        losses, after = losses_of(*given)
        return losses / len(losses), after

    monkeypatch.setattr(Objective, "losses", uneven)
    assert is_red("gradient of another split", subject)


def test_a_recomputed_block_with_half_its_gradient_is_red(subject, monkeypatch):
    def half(block, x, *inputs, use_reentrant):
        return block(x / 2 + x.detach() / 2, *inputs)

    monkeypatch.setattr("phi2.model.checkpoint", half)
    assert is_red("gradient with activation checkpointing", subject)


def test_a_cache_that_is_one_token_behind_is_red(subject, monkeypatch):
    late = property(lambda cached: cached.slots[:, None] - 1)
    monkeypatch.setattr(phi2.cache.StepPass, "positions", late)
    assert is_red("cached decoding is a full pass", subject)


def test_an_id_that_no_tokenizer_has_is_red(subject, monkeypatch):
    monkeypatch.setattr(checks, "choices_of", lambda model, tokenizer: model.config.vocab_size)
    assert is_red("ids are within the vocabulary", subject)


def test_an_adapter_that_is_written_otherwise_is_red(subject, monkeypatch):
    state = peft_files.adapter_state
    monkeypatch.setattr(
        peft_files, "adapter_state", lambda model: {k: v.half().float() for k, v in state(model).items()}
    )
    assert is_red("adapter saved and loaded", subject)


def test_other_rotary_angles_than_those_of_transformers_are_red(subject, monkeypatch):
    angles = phi2.model.rotary_angles
    monkeypatch.setattr("phi2.model.rotary_angles", lambda positions, *given: angles(positions * 1.001, *given))
    assert is_red("logits of transformers", subject)


def test_transformers_that_is_not_installed_is_skipped_and_said(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = line_of("logits of transformers", OF_POLICY["logits of transformers"], subject)
    assert (line.verdict, line.is_red, line.note) == ("skipped", False, "transformers is not installed")


def test_a_model_that_is_no_number_is_red_and_its_module_named(tiny_phi, pair_data, tmp_path):
    model, tokenizer = load(tiny_phi, "cpu", "float32")
    with torch.no_grad():
        model.model.layers[1].mlp.fc1.bias[3] = torch.inf
    save_pretrained(model, tokenizer, tmp_path / "broken")
    found = phi2.verify(model=str(tmp_path / "broken"), data=pair_data, rows=2, device="cpu")
    lines = {line.name: line for line in found.red}
    assert lines["log-probs are finite"].note == "first in model.layers.1.mlp.fc1"
    assert math.isnan(lines["log-probs packed"].measured.value)
    assert "non-finite logits; first in model.layers.1.mlp.fc1" in lines["cached decoding is a full pass"].note
    assert len(lines) == 17 and "nan  allowed" in str(found), str(found)
    assert "some log-probs are no numbers in float32: it has no noise floor" in str(found)


def test_a_model_that_is_written_in_fewer_bits_is_red(opened, monkeypatch):
    session, _, folder = opened
    save = weights.save_file

    def rounded(tensors, *given, **named):
        save({name: tensor.half().float() for name, tensor in tensors.items()}, *given, **named)

    monkeypatch.setattr(weights, "save_file", rounded)
    line = line_of("", checks.model_round_trip, session, folder / "model")
    assert line.is_red and line.note.startswith("first model.embed_tokens.weight")


def test_an_adapter_of_no_seed_is_red(opened, monkeypatch):
    attach, seeds = session.attach, count()
    monkeypatch.setattr(session, "attach", lambda model, config, seed: attach(model, config, next(seeds)))
    assert line_of("", checks.same_seed, *opened).is_red


def test_runs_that_move_nothing_prove_nothing(opened):
    session, run, folder = opened
    line = line_of("", checks.same_seed, session, replace(run, learning_rate=0.0), folder)
    assert line.verdict == "skipped" and line.note.startswith("the second update did not move the adapter")


def test_an_optimizer_that_forgets_its_moments_is_red(opened, monkeypatch):
    checks.same_seed(*opened)
    restore = optim.Optimizer.restore

    def forget(optimizer, tensors, numbers):
        restore(optimizer, {k: v if k.endswith("step") else torch.zeros_like(v) for k, v in tensors.items()}, numbers)

    monkeypatch.setattr(optim.Optimizer, "restore", forget)
    assert line_of("", checks.resumed, *opened).is_red


# ---- the noise floor ----


def test_a_reading_moves_by_its_largest_and_mean_difference():
    before, after = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([1.5, 1.0]), torch.tensor([3.0])]
    assert noise.moved(before, after) == pytest.approx((1.0, 0.5, 0.5, 0.25))


def test_margins_below_what_an_answer_moves_by_are_counted(subject):
    still, little = noise.Moved(0, 0, 0, 0), noise.Moved(0.1, 0.1, 0.5, 0.1)
    floor = replace(
        subject.noise,
        layouts={"order": still},
        precisions={torch.bfloat16: little},
        margins=torch.tensor([0.4, -0.4, 0.6, -3.0]),
    )
    assert (floor.drowned(torch.float32), floor.drowned(torch.bfloat16)) == (0, 2)
    assert "5.0e-01 nats in bfloat16: 2 of 4 pairs have a margin below it" in str(floor)


def test_bfloat16_is_noisier_than_float16_and_that_than_another_batch(subject):
    found = subject.noise
    half, brain = (found.precisions[dtype].token_mean for dtype in (torch.float16, torch.bfloat16))
    assert found.layouts["batch shape"].token_mean < half < brain


# ---- what cannot be verified ----


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"model": "no/such"}, "no/such: no such folder, and"),
        ({"data": "toy-sft"}, "toy-sft holds supervised rows, and preference rows are needed"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"data": [{"text": "no pair"}]}, "data: no usable row among 1: unknown-format"),
        (
            {"data": [{"prompt": "a", "completion": "b", "label": True}]},
            "loss 'sigmoid' compares answers to one prompt",
        ),
        ({"rowz": 1}, "there is no setting 'rowz'; did you mean rows?"),
    ],
)
def test_what_cannot_be_verified_is_told_in_one_line(tiny_phi, pair_data, settings, told):
    with pytest.raises(ValueError) as caught:
        phi2.verify(**{"model": str(tiny_phi), "data": pair_data, **settings})
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_a_row_longer_than_the_context_is_told_with_what_to_do(tiny_phi, write_rows):
    long = write_rows([{"prompt": "Q" * 300, "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="more than the model's context of 256: give a max_length"):
        phi2.verify(model=str(tiny_phi), data=long, device="cpu")


def test_red_is_red_in_a_terminal(subject):
    lines = [Line("a", checks.Measured(value, 1)) for value in (2, 1)] + [Line("b", None, "not here", skipped=True)]
    shown = Verification([], subject.noise, lines).shown(color=True).splitlines()[-3:]
    assert [line[:5] for line in shown] == ["\x1b[31m", "\x1b[32m", "\x1b[2ms"]


def test_a_line_is_verdict_name_number_and_what_is_allowed():
    line = Line("log-probs packed", checks.Measured(2e-3, 1e-4, "nats a token"))
    assert str(line).split() == "RED log-probs packed 2.0e-03 allowed 1.0e-04 nats a token".split()
