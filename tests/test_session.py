"""One session, many fits: each is what a fresh process would have made, and none leaves a trace on what they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import phi2
from phi2.data.config import DataSpec
from phi2.lora import LoraLinear
from phi2.lora_config import LoraConfig
from phi2.training import dpo, session, sft
from phi2.training.objective import Objective
from phi2.training.session import start


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()
    }


def test_a_notebook_opens_one_session_and_fits_two_losses(tmp_path, metrics_of):
    rows = [DataSpec(source="toy-dpo", rows=100)]
    config = phi2.DPOConfig(model="nano-instruct", data=rows, output=str(tmp_path), max_steps=2)
    session = phi2.start(config)
    for loss in ("sigmoid", "ipo"):
        phi2.dpo(session, loss=loss, output=str(tmp_path / loss))
    first = [metrics_of(tmp_path / loss)[0]["loss"] for loss in ("sigmoid", "ipo")]
    assert first == pytest.approx([0.6931, 25.0], rel=1e-3)  # -log sigma(0), (1 / (2 * 0.1))^2


@pytest.mark.parametrize("fit", [phi2.dpo, phi2.sft])
def test_what_is_no_session_is_told_in_one_line(fit):
    with pytest.raises(ValueError, match="a session of phi2.start, got 'nano'$"):
        fit("nano", data="toy-dpo")


@pytest.mark.parametrize("knob", ["gamma", "ld_alpha"])
def test_a_knob_of_a_loss_that_is_no_setting_is_sent_where_it_belongs(knob):
    with pytest.raises(ValueError, match=f"there is no setting '{knob}': this knob of a loss goes into loss_args"):
        phi2.dpo(model="nano", data="toy-dpo", output="x", **{knob: 0.5})


FITS = {  # what is done first on the session, and what is done then
    "another loss": ({"loss": "ipo"}, {}),
    "another adapter": ({"lora": LoraConfig(r=8, target_modules=("dense", "lm_head"))}, {}),
    "fused, then not": ({"fuse": True}, {}),
    "not fused, then so": ({}, {"fuse": True}),
    "recomputed activations": ({"gradient_checkpointing": True}, {}),
    "full training": ({"lora": None}, {}),
    "of all weights after LoRA": ({}, {"lora": None}),
    "another seed and batch size": ({"seed": 7, "per_device_train_batch_size": 2}, {}),
    "a precomputed reference, fused before": (
        {"precompute_ref_log_probs": True, "fuse": True},
        {"precompute_ref_log_probs": True},
    ),
    "a precomputed reference": ({"precompute_ref_log_probs": True}, {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("fits", FITS)
def test_a_second_fit_is_bit_for_bit_that_of_a_fresh_process(
    dpo_config, tmp_path, metrics_of, assert_same_weights, fits
):
    before, then = FITS[fits]
    config = dpo_config(max_steps=3, learning_rate=1e-3, output=str(tmp_path / "fresh"), **then)
    fresh = dpo.train(config)
    session = start(config)
    dpo.fit(session, replace(dpo_config(max_steps=3, learning_rate=1e-3), **before, output=str(tmp_path / "before")))
    second = dpo.fit(session, replace(config, output=str(tmp_path / "second")))
    assert metrics_of(second) == metrics_of(fresh)
    assert_same_weights(second, fresh)


def test_dropout_of_a_second_fit_is_that_of_a_fresh_process(sft_config, tiny_phi_with_dropout, tmp_path, metrics_of):
    config = sft_config(model=str(tiny_phi_with_dropout), max_steps=3, output=str(tmp_path / "fresh"))
    fresh = sft.train(config)
    session = start(config)
    runs = [sft.fit(session, replace(config, output=str(tmp_path / name))) for name in ("a", "b")]
    assert metrics_of(runs[0]) == metrics_of(runs[1]) == metrics_of(fresh)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_fit_leaves_the_base_bit_for_bit_as_it_was(dpo_config, fuse):
    config = dpo_config(max_steps=2, learning_rate=1e-2, fuse=fuse)
    session = start(config)
    before = bytes_of(session.base)
    dpo.fit(session, config)
    assert bytes_of(session.base) == before and not session.base.adapters


def test_a_fit_that_fails_leaves_the_session_usable(dpo_config, tmp_path, monkeypatch, metrics_of):
    config = dpo_config(max_steps=2)
    session = start(config)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Objective, "update", lambda *given: 1 / 0)
        dpo.fit(session, replace(config, output=str(tmp_path / "failed")))
    assert metrics_of(dpo.fit(session, config)) == metrics_of(dpo.train(replace(config, output=str(tmp_path / "new"))))


def test_a_policy_that_cannot_be_made_leaves_the_base_as_it_was(dpo_config, make_phi, tmp_path):
    config = dpo_config(model=str(make_phi(qk_layernorm=True)), max_steps=1)
    session = start(config)
    with pytest.raises(ValueError, match="fused blocks cannot have qk_layernorm"):
        dpo.fit(session, replace(config, fuse=True, output=str(tmp_path / "fused")))
    assert not session.base.adapters
    assert (dpo.fit(session, config) / "adapter").is_dir()


def test_a_reference_that_was_read_from_a_cache_is_none_of_the_sessions(dpo_config, tmp_path):
    config = dpo_config(precompute_ref_log_probs=True, max_steps=1)
    shared = {"reference_cache": str(tmp_path / "cache")}
    dpo.train(replace(config, **shared, per_device_train_batch_size=3, output=str(tmp_path / "filled")))
    session = start(config)
    dpo.fit(session, replace(config, **shared, output=str(tmp_path / "reads")))
    assert session.reference_logps == {}
    dpo.fit(session, replace(config, output=str(tmp_path / "scores")))
    assert len(session.reference_logps) == 1


def test_an_adapter_that_was_put_on_half_leaves_nothing_behind(dpo_config, tmp_path, monkeypatch):
    session, count = start(dpo_config()), iter(range(100))
    add = LoraLinear.add
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(LoraLinear, "add", lambda *given: add(*given) if next(count) < 3 else out_of_memory())
        dpo.fit(session, dpo_config())
    assert not any(isinstance(module, LoraLinear) for module in session.base.modules())


def out_of_memory() -> None:
    raise MemoryError


def test_everything_is_loaded_once(dpo_config, tmp_path, monkeypatch, make_phi):
    loaded = []
    for name in ("load_model", "load_records", "encode_records", "load_tokenizer"):
        function = getattr(session, name)
        monkeypatch.setattr(session, name, lambda *given, f=function, n=name: loaded.append(n) or f(*given))
    config = dpo_config(max_steps=1, reference=str(make_phi(seed=3)))
    opened = start(config)
    for loss in ("sigmoid", "ipo", "hinge"):
        dpo.fit(opened, replace(config, loss=loss, output=str(tmp_path / loss)))
    assert sorted(loaded) == ["encode_records", "load_model", "load_model", "load_records", "load_tokenizer"]


def test_every_run_folder_has_its_own_audit(dpo_config, tmp_path):
    config = dpo_config(max_steps=1, test_fraction=0.2)
    opened = start(config)
    for name in ("a", "b"):
        run = dpo.fit(opened, replace(config, output=str(tmp_path / name)))
        assert {"data_audit.json", "eval_audit.json"} <= {path.name for path in run.path.iterdir()}


def test_a_run_that_starts_from_something_else_is_refused(dpo_config, tmp_path):
    opened = start(dpo_config())
    with pytest.raises(ValueError, match="^the session was started with other settings, start another one: max_length"):
        dpo.fit(opened, replace(dpo_config(), max_length=12))
    assert not Path(dpo_config().output).exists()


def test_a_run_of_another_kind_is_refused(dpo_config, sft_config):
    with pytest.raises(ValueError, match="^the session holds preference rows, and this run needs supervised rows$"):
        sft.fit(start(dpo_config()), sft_config())
    with pytest.raises(ValueError, match="^the session holds supervised rows, and this run needs preference rows$"):
        phi2.dpo(start(sft_config()), loss="ipo")


def test_flags_are_keyword_arguments(sft_config, tmp_path):
    data = sft_config().data
    run = phi2.sft(model=sft_config().model, data=data, output=str(tmp_path / "run"), max_steps=1, device="cpu")
    assert (run / "adapter").is_dir()


def test_a_session_and_a_model_are_not_given_together(dpo_config, tmp_path):
    with pytest.raises(ValueError, match="^the session was started with other settings, start another one: model"):
        phi2.dpo(start(dpo_config()), model="nano", output=str(tmp_path / "run"))
