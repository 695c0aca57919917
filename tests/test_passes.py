"""How a window goes through the model: its passes by tokens, their memory, and what comes when memory is short."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi2.lora_config import LoraConfig
from phi2.losses.head import target_logps
from phi2.training import dpo, loop, objective, passes, scoring, sft, two_phases
from phi2.training.objective import Objective
from phi2.training.optim import Optimizer
from phi2.training.passes import Passes, bytes_of_token, head_bytes_of_token, most_tokens
from phi2.training.session import start
from phi2_kernels.linear_logprob import GPU_KEPT_BYTES

windows = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@given(windows, st.integers(1, 200))
def test_every_sample_is_in_one_pass_and_only_one_that_is_too_long_exceeds_it(tokens, most):
    passes = Passes(most).cut(tokens)
    assert sorted(index for each in passes for index in each) == list(range(len(tokens)))
    assert all(each == sorted(each) for each in passes)
    assert all(sum(tokens[i] for i in each) <= max(most, *tokens) for each in passes)


@given(windows, st.integers(60, 200))
def test_there_are_no_more_passes_than_twice_what_the_tokens_need(tokens, most):
    assert len(Passes(most).cut(tokens)) <= 2 * -(-sum(tokens) // most)


def test_passes_are_about_even():
    assert Passes(100).cut([10] * 11) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]


def test_what_does_not_fit_evenly_is_packed_as_it_fits():
    tokens = [7, 5, 5, 4, 3]  # evenly 7 + 4 and 5 + 5 + 3, which are 13
    assert Passes(12).cut(tokens) == [[0, 1], [2, 3, 4]]


# ---- memory ----


class Short:
    """Memory that holds passes of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.tried = tokens, []

    def __call__(self, passes: Passes) -> int:
        self.tried.append(passes.max_tokens)
        if passes.max_tokens > self.tokens:
            raise torch.OutOfMemoryError("too much")
        return passes.max_tokens


def test_a_pass_that_memory_does_not_hold_is_halved_once_and_said(capsys):
    passes, memory, undone = Passes(1000), Short(600), []
    assert passes.attempt(lambda: memory(passes), lambda: undone.append(None)) == 500
    assert memory.tried == [1000, 500] and undone == [None]
    assert capsys.readouterr().out == "out of memory: going on with max_tokens_per_pass 500\n"


def test_where_half_is_too_much_the_run_ends_with_one_line():
    passes, memory = Passes(1000), Short(100)
    with pytest.raises(ValueError, match="^max_tokens_per_pass 500: the device's memory does not hold") as caught:
        passes.attempt(lambda: memory(passes), lambda: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_an_update_that_ran_out_of_memory_half_way_is_made_again_from_its_start(
    dpo_config, write_rows, monkeypatch, metrics_of, assert_same_weights, tmp_path, loss
):
    """No gradient of its first passes is left, and dropout is drawn as it was: each row has a pass to itself."""
    data = write_rows([{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)])
    lora = LoraConfig(r=4, target_modules=("q_proj", "fc1"), lora_dropout=0.2)
    settings = dict(loss=loss, data=data, max_steps=2, disable_dropout=False, lora=lora)
    longest = max(row.tokens for row in start(dpo_config(**settings)).rows.train)
    settings |= dict(max_tokens_per_pass=longest)
    whole = dpo.train(dpo_config(**settings, output=str(tmp_path / "whole")))
    scored, calls = objective.scored, []

    def runs_out(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 7:  # behind the look before the first update, in the second half of a window
            raise torch.OutOfMemoryError("too much")
        return scored(*arguments, **keywords)

    for module in (objective, scoring, two_phases):
        monkeypatch.setattr(module, "scored", runs_out)
    again = dpo.train(dpo_config(**settings, output=str(tmp_path / "again")))
    assert len(calls) > 7 and metrics_of(again) == metrics_of(whole)
    assert_same_weights(again, whole)


PASS_OF = {"dpo": (scoring, "scored", Objective), "sft": (sft, "forward", sft)}


@pytest.mark.parametrize("kind", PASS_OF)
def test_an_evaluation_that_ran_out_of_memory_is_made_again_in_smaller_passes(
    kind, dpo_config, sft_config, pair_data, sft_data, monkeypatch, metrics_of, capsys, tmp_path
):
    """And dropout goes on behind it."""
    lora = LoraConfig(r=4, target_modules=("q_proj", "fc1"), lora_dropout=0.2)
    settings = dict(lora=lora, eval_steps=2, max_steps=4, max_tokens_per_pass=1000)
    make, train = (partial(dpo_config, disable_dropout=False), dpo.train) if kind == "dpo" else (sft_config, sft.train)
    make = partial(make, **settings, eval_data=pair_data if kind == "dpo" else sft_data)
    whole = train(make(output=str(tmp_path / "whole")))
    module, name, holder = PASS_OF[kind]
    evaluate, one_pass, calls = holder.evaluate, getattr(module, name), []

    def runs_out(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("too much")
        return one_pass(*arguments, **keywords)

    def within(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, runs_out)
            return evaluate(*arguments)

    monkeypatch.setattr(holder, "evaluate", within)
    again = train(make(output=str(tmp_path / "again")))
    assert capsys.readouterr().out.count("out of memory: going on with max_tokens_per_pass 500\n") == 1
    for found, expected in zip(metrics_of(again), metrics_of(whole), strict=True):
        assert found.pop("type") == expected.pop("type") and found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_step_that_ran_out_of_memory_is_not_made_again(kind, dpo_config, sft_config, monkeypatch):
    """Smaller passes would not help it, and half of it may have been done."""
    make, train = (dpo_config, dpo.train) if kind == "dpo" else (sft_config, sft.train)
    steps = []

    def step(optimizer: Optimizer) -> None:
        steps.append(optimizer.updates)
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        train(make(max_steps=1))
    assert steps == [0]


def test_a_resumed_run_has_the_passes_of_the_run_it_goes_on_with(dpo_config, monkeypatch, tmp_path):
    config = dpo_config(max_steps=2, save_strategy="steps", save_steps=1)
    run = dpo.train(config)
    state = json.loads((run / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["passes"] == {"max_tokens": 2048, "halved": False}


@pytest.mark.parametrize("loop", [dpo, sft])
def test_a_row_longer_than_a_pass_is_refused_with_its_tokens(loop, dpo_config, sft_config):
    config = (dpo_config if loop is dpo else sft_config)(max_tokens_per_pass=3)
    with pytest.raises(ValueError, match=r"max_tokens_per_pass 3: .* row \d+ has \d+ tokens"):
        loop.train(config)


def test_a_pass_must_hold_a_packed_sample(sft_config):
    with pytest.raises(ValueError, match="max_tokens_per_pass must be at least 64, got 32"):
        sft_config(packing="best_fit", packing_length=64, max_tokens_per_pass=32)


@pytest.mark.parametrize("bad", [0, -1])
def test_a_pass_must_hold_a_token(dpo_config, bad):
    with pytest.raises(ValueError, match=f"max_tokens_per_pass must be at least 1, got {bad}"):
        dpo_config(max_tokens_per_pass=bad)


# ---- what a token costs ----


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("lora", [LoraConfig(r=4, target_modules=("q_proj", "fc1")), None], ids=["lora", "full"])
def test_the_bytes_of_a_token_are_those_of_a_longer_pass(dpo_config, lora, fuse):
    """Counted on short passes, checked on one of 200 tokens and one of 100; a block works with a part more."""
    config = dpo_config(lora=lora, fuse=fuse)
    with start(config).policy(config) as model:
        model.train()
        per_token = (kept(model, 200) - kept(model, 100)) / 100
        assert per_token == pytest.approx(bytes_of_token(model) / (1 + 2 / model.config.num_hidden_layers))


@pytest.mark.parametrize("lora", [LoraConfig(r=4, target_modules=("q_proj", "lm_head")), None], ids=["lora", "full"])
def test_the_bytes_of_a_target_are_those_of_more_targets(dpo_config, lora):
    config = dpo_config(lora=lora)
    with start(config).policy(config) as model:
        per_token = (kept(model.train(), 200, targets=200) - kept(model, 200, targets=100)) / 100
        logits = model.config.vocab_size * model.dtype.itemsize
        assert head_bytes_of_token(model) == per_token and logits < per_token < logits + 20 * model.config.hidden_size


def test_a_frozen_head_keeps_no_logits(dpo_config):
    config = dpo_config(lora=LoraConfig(r=4, target_modules=("q_proj",)))
    with start(config).policy(config) as model:
        assert head_bytes_of_token(model) < 2 * model.config.hidden_size * model.dtype.itemsize


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2**31, 10**12))
def test_as_many_tokens_are_held_as_the_memory_allows_with_the_budget_of_the_head(each, of_head, left):
    def needed(tokens: int) -> int:
        return tokens * each + min(tokens * of_head, GPU_KEPT_BYTES)

    tokens = most_tokens(left, each, of_head)
    assert needed(tokens) <= left < needed(tokens + 1)


def kept(model, tokens: int, targets: int = 0) -> int:
    """Bytes of all storages that autograd holds, found by walking what it saved."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.setdefault(id(x), x), lambda x: x):
        hidden = model.model(torch.ones((1, tokens), dtype=torch.long))
        places = torch.arange(targets)
        logps = target_logps(model, hidden, places, places % 7)[0] if targets else None
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found.values()}
    assert hidden.requires_grad and (logps is None or logps.requires_grad)
    return sum(size for place, size in sizes.items() if place not in weights | {places.untyped_storage().data_ptr()})


def test_with_activation_checkpointing_a_token_costs_less(dpo_config):
    config = dpo_config()
    with start(config).policy(config) as model:
        whole = bytes_of_token(model)
        model.model.activation_checkpointing = True
        assert bytes_of_token(model) < whole and model.model.activation_checkpointing


def test_counting_leaves_torchs_random_state_alone(dpo_config):
    config = dpo_config(lora=LoraConfig(r=4, target_modules=("q_proj",), lora_dropout=0.3), disable_dropout=False)
    with start(config).policy(config) as model:
        before = torch.get_rng_state()
        bytes_of_token(model.train())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def gpu_memory(monkeypatch):
    """The CPU says that it has so many bytes free, and an optimizer that needs none: gpu_memory(bytes)."""

    def free(size: float) -> None:
        monkeypatch.setattr(passes, "has_own_memory", lambda device: True)
        monkeypatch.setattr(passes, "free_bytes", lambda device: int(size))

    return free


def need_of_longest(config) -> tuple[int, float]:
    """Tokens of the longest row, and the bytes that training it certainly takes."""
    session = start(config)
    longest = max(row.tokens for row in session.rows.train)
    with session.policy(config) as model:
        return longest, longest * passes.held_bytes_of_token(model)[0] + passes.optimizer_bytes(model)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_device_without_the_memory_for_the_longest_row_is_told_before_any_work(
    kind, dpo_config, sft_config, gpu_memory, monkeypatch
):
    config, module = (dpo_config(), dpo) if kind == "dpo" else (sft_config(), sft)
    longest, need = need_of_longest(config)
    gpu_memory(need - 1)
    monkeypatch.setattr(module, "updates_of", None)
    monkeypatch.setattr(dpo, "make_reference", None)
    told = rf" row \d+ has {longest} tokens, and the free memory of cpu holds a pass of {longest - 1} at most: "
    with pytest.raises(ValueError, match=told + "set a lower max_length .*, gradient_checkpointing: true") as caught:
        module.train(config)
    assert "\n" not in str(caught.value)


def test_a_row_that_may_fit_is_tried(dpo_config, gpu_memory):
    """All of the free memory is just what the row holds: estimates of what else it takes refuse nothing."""
    config = dpo_config(max_steps=1)
    gpu_memory(need_of_longest(config)[1] + 1)
    assert (dpo.train(config).path / "adapter").is_dir()


def test_what_a_gpus_memory_has_chosen_is_told_and_goes_on_with_the_run(dpo_config, gpu_memory, monkeypatch, capsys):
    config = dpo_config(max_steps=2, save_steps=1)
    gpu_memory(1e9)
    monkeypatch.setattr(passes, "fitting_tokens", lambda model: 600)
    told = "max_tokens_per_pass 600, by the free memory of cpu when the run began\n"
    dpo.train(config)
    shutil.rmtree(Path(config.output, "checkpoints", "step-2"), ignore_errors=True)
    assert capsys.readouterr().out.count(told) == 1
    monkeypatch.setattr(passes, "fitting_tokens", lambda model: 300)
    dpo.train(dataclasses.replace(config, resume=True))
    assert capsys.readouterr().out.count(told) == 1


def test_what_is_set_already_is_no_advice(dpo_config, gpu_memory):
    gpu_memory(1)
    with pytest.raises(ValueError, match="holds a pass of 0 at most: set a lower max_length") as caught:
        dpo.train(dpo_config(gradient_checkpointing=True))
    assert "gradient_checkpointing" not in str(caught.value)


def test_memory_that_does_not_hold_the_passes_that_count_holds_no_row(dpo_config, gpu_memory, monkeypatch):
    def runs_out(model, tokens):
        raise torch.OutOfMemoryError("too much")

    gpu_memory(10**9)
    monkeypatch.setattr(passes, "_kept_bytes", runs_out)
    with pytest.raises(ValueError, match="holds a pass of 0 at most"):
        dpo.train(dpo_config())


def test_a_max_tokens_per_pass_of_ones_own_tries_any_row(dpo_config, gpu_memory):
    gpu_memory(1)
    assert (dpo.train(dpo_config(max_steps=1, max_tokens_per_pass=500)).path / "adapter").is_dir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_pass_on_a_gpu_is_what_was_said(dpo_config, checkpointing):
    config = dpo_config(device="cuda", dtype="bfloat16", gradient_checkpointing=checkpointing)
    with start(config).policy(config) as model:
        model.train()
        said, peaks = bytes_of_token(model), []
        for tokens in (512, 1024):
            torch.cuda.reset_peak_memory_stats()
            model.model(torch.ones((4, tokens // 4), dtype=torch.long, device="cuda")).sum().backward()
            peaks.append(torch.cuda.max_memory_allocated())
        measured = (peaks[1] - peaks[0]) / 512
        assert 0.7 * said < measured < 1.1 * said


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_compiling_before_the_first_update_moves_no_bit(
    kind, dpo_config, sft_config, tiny_phi_with_dropout, tmp_path, monkeypatch, metrics_of, assert_same_weights
):
    """As on a GPU: the passes of the first window once more, whose gradients and random numbers are forgotten."""
    make, train = (dpo_config, dpo.train) if kind == "dpo" else (sft_config, sft.train)
    model = dict(model=str(tiny_phi_with_dropout)) | ({"disable_dropout": False} if kind == "dpo" else {})
    runs = []
    for on in (False, True):
        monkeypatch.setattr(loop, "compiles", lambda device, on=on: on)
        runs.append(train(make(**model, max_steps=3, output=str(tmp_path / str(on)))))
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    assert_same_weights(*(run.path for run in runs))
