"""The reference in whole preference runs: live or from a cache, an adapter, a copy or another checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import phi2
from phi2.checkpoints.weights import load_model, save_pretrained
from phi2.data.encode import EncodedPreference
from phi2.lora import merge
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training import reference, reference_cache
from phi2.training.dpo import DPOConfig, train
from phi2.training.session import Session, start
from phi2.training.window import windows_of

LORA = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))


def pairs_of(config: DPOConfig) -> list[EncodedPreference]:
    return start(config).rows.train


def mean_logp(model: Phi2ForCausalLM, pairs: list[EncodedPreference], answer: str) -> float:
    """Mean over the pairs of an answer's log-probability: each sequence alone, whole logits."""
    total = 0.0
    for pair in pairs:
        ids = torch.from_numpy(np.concatenate((pair.prompt, getattr(pair, answer))).astype(np.int64))
        logps = model(ids[None]).log_softmax(-1)[0, len(pair.prompt) - 1 : -1]
        total += logps.gather(1, ids[len(pair.prompt) :, None]).sum().item()
    return total / len(pairs)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Fills up with the target tokens of every pass of a reference; a cache is not checked by some of its rows."""
    passes, score = [], reference.score

    def count(model: Phi2ForCausalLM, row) -> Tensor:
        passes.append(len(row.targets))
        return score(model, row)

    monkeypatch.setattr(reference, "score", count)
    monkeypatch.setattr(reference_cache, "require_agreement", lambda *given: None)
    return passes


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_precomputed_reference_gives_the_run_of_a_live_one(dpo_config, tmp_path, lora, metrics_of):
    settings = dict(lora=lora, eval_steps=2, test_fraction=0.2, learning_rate=1e-3)
    live = metrics_of(train(dpo_config(**settings, output=str(tmp_path / "live"))))
    cached = metrics_of(train(dpo_config(**settings, output=str(tmp_path / "c"), precompute_ref_log_probs=True)))
    for ours, theirs in zip(cached, live, strict=True):
        names = ours.keys() - {"type", "tokens_per_second", "rewards/accuracies", "eval_rewards/accuracies"}
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-4)


def test_a_reference_cache_serves_runs_of_other_losses_rates_and_batch_sizes(dpo_config, tmp_path, counted):
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), max_steps=3)  # all pairs
    train(dpo_config(**cache, output=str(tmp_path / "first")))
    assert sum(counted) == sum(pair.target_tokens for pair in pairs_of(dpo_config()))
    counted.clear()
    others = dict(loss="ipo", beta=0.3, learning_rate=1e-4, per_device_train_batch_size=3, seed=1, nll_weight=0.1)
    train(dpo_config(**cache, **others, output=str(tmp_path / "second")))
    assert counted == [] and len(list((tmp_path / "cache").iterdir())) == 1


def test_only_pairs_that_the_run_will_see_are_scored_and_a_longer_run_adds_the_others(
    dpo_config, write_rows, tmp_path, counted
):
    held_out = write_rows([{"prompt": "Q", "chosen": " never", "rejected": " once"}])
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), eval_data=held_out)
    config = dpo_config(**cache, max_steps=1)
    pairs = pairs_of(dpo_config(output=str(tmp_path / "rows")))
    seen = set(windows_of(config, len(pairs)).at(0))
    train(config)
    evaluated = pairs_of(dpo_config(data=held_out, output=str(tmp_path / "rows")))[0].target_tokens
    assert len(seen) == 4 and sum(counted) == sum(pairs[i].target_tokens for i in seen) + evaluated
    counted.clear()
    train(dpo_config(**cache, output=str(tmp_path / "long")))
    assert sum(counted) == sum(pair.target_tokens for i, pair in enumerate(pairs) if i not in seen)


def test_full_training_uses_the_cache_of_lora_over_the_same_weights(dpo_config, tmp_path, counted):
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), max_steps=1)
    train(dpo_config(**cache, output=str(tmp_path / "first")))
    counted.clear()
    train(dpo_config(**cache, lora=None, output=str(tmp_path / "second")))
    assert counted == []


@pytest.mark.parametrize("change", ["weights", "dtype", "autocast", "max_length"])
def test_a_reference_cache_is_not_used_for_another_reference_or_other_tokens(
    dpo_config, make_phi, tmp_path, counted, change
):
    lora = None if change == "autocast" else LORA
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), max_steps=1, lora=lora)
    train(dpo_config(**cache, output=str(tmp_path / "first")))
    before = sum(counted)
    counted.clear()
    changes = {
        "weights": {"model": str(make_phi(seed=5))},
        "dtype": {"dtype": "bfloat16"},
        "autocast": {"dtype": "bfloat16"},
        "max_length": {"max_length": 14},
    }[change]
    config = dpo_config(**cache, **changes, output=str(tmp_path / "second"))
    train(config)
    if change == "max_length":  # rows that are not cut are known already
        assert 0 < sum(counted) < before and len(list((tmp_path / "cache").iterdir())) == 1
    else:
        assert sum(counted) == before and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_cache_stops_the_run_in_one_line(dpo_config, tmp_path):
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), max_steps=1)
    train(dpo_config(**cache, output=str(tmp_path / "first")))
    next((tmp_path / "cache").glob("*/*.safetensors")).write_bytes(b"not a cache")
    with pytest.raises(ValueError, match="not a shard of a reference cache .*; delete it to score its answers again"):
        train(dpo_config(**cache, output=str(tmp_path / "second")))


def test_a_cache_that_its_reference_contradicts_is_noticed_before_the_first_update(dpo_config, tmp_path, shift_logps):
    cache = dict(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache"), max_steps=1)
    train(dpo_config(**cache, output=str(tmp_path / "first")))
    shift_logps(next((tmp_path / "cache").glob("*/*.safetensors")), 0.1)
    with pytest.raises(ValueError, match="not what the reference says now, by up to 0.1 nats") as caught:
        train(dpo_config(**cache, output=str(tmp_path / "second")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second" / "adapter").exists() and not (tmp_path / "second" / "checkpoints").exists()


def test_the_reference_of_an_adapter_that_is_trained_further_is_that_adapter(dpo_config, tmp_path, metrics_of):
    first = train(dpo_config(output=str(tmp_path / "first")))
    second = metrics_of(
        train(dpo_config(adapter=str(first / "adapter"), lora=LoraConfig(), output=str(tmp_path / "second")))
    )
    assert second[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and second[-1]["kl"] != 0
    model, _ = phi2.load(dpo_config().model, device="cpu", adapter=first / "adapter")
    pairs = pairs_of(dpo_config(shuffle=False))
    third = dpo_config(
        adapter=str(first / "adapter"), lora=LoraConfig(), output=str(tmp_path / "third"), shuffle=False, max_steps=4
    )
    expected = mean_logp(model, pairs[:4], "chosen")
    lines = metrics_of(train(third))
    assert lines[0]["ref_logps/chosen"] == pytest.approx(expected, rel=1e-4)
    assert lines[3]["ref_logps/chosen"] == pytest.approx(expected, rel=1e-4)  # the same pairs, three updates later


def test_another_checkpoint_can_be_the_reference(dpo_config, make_phi, metrics_of):
    other = make_phi(seed=9)
    line = metrics_of(train(dpo_config(reference=str(other), shuffle=False, max_steps=1)))[0]
    model, pairs = load_model(other), pairs_of(dpo_config())[:4]
    expected = mean_logp(model, pairs, "rejected")
    assert line["ref_logps/rejected"] == pytest.approx(expected, rel=1e-4)
    assert line["logps/rejected"] != pytest.approx(expected, rel=1e-2)


def test_the_merged_model_as_reference_is_the_reference_of_its_adapter(dpo_config, tmp_path, metrics_of):
    first = train(dpo_config(output=str(tmp_path / "first")))
    model, tokenizer = phi2.load(dpo_config().model, device="cpu", adapter=first / "adapter")
    merge(model)
    save_pretrained(model, tokenizer, tmp_path / "merged")
    runs = [
        train(
            dpo_config(
                adapter=str(first / "adapter"),
                lora=LoraConfig(),
                reference=kind,
                output=str(tmp_path / name),
                max_steps=2,
            )
        )
        for name, kind in (("copy", "frozen_copy"), ("other", str(tmp_path / "merged")))
    ]
    for copy, other in zip(*map(metrics_of, runs), strict=True):
        assert copy["ref_logps/chosen"] == pytest.approx(other["ref_logps/chosen"], rel=1e-4)


@pytest.mark.parametrize("setting", [{"reference": "frozen_copy"}, {"precompute_ref_log_probs": True}])
def test_a_reference_is_refused_where_the_loss_has_none(dpo_config, setting):
    with pytest.raises(ValueError, match="loss simpo needs no reference"):
        train(dpo_config(loss="simpo", **setting))


# ---- another checkpoint that does not fit ----


def test_a_reference_with_fewer_vocabulary_rows_than_the_rows_need_is_refused(dpo_config, make_phi, tmp_path):
    pairs = pairs_of(dpo_config(output=str(tmp_path / "rows")))
    tokens = max(int(part.max()) for pair in pairs for part in (pair.prompt, pair.chosen))
    folder = make_phi(vocab_size=tokens)
    with pytest.raises(ValueError) as caught:
        train(dpo_config(reference=str(folder)))
    assert f"reference {folder} has {tokens} vocabulary rows, but" in str(caught.value)
    assert f"holds the token id {tokens}:" in str(caught.value) and "\n" not in str(caught.value)


def test_a_reference_with_a_shorter_context_than_the_rows_need_is_refused(dpo_config, make_phi, monkeypatch):
    folder = make_phi(max_position_embeddings=19)
    with monkeypatch.context() as patched:
        patched.setattr(Session, "other", None)  # headers are enough
        with pytest.raises(ValueError, match="context of 19, but .* row .* has 20 tokens: give a max_length of 19"):
            train(dpo_config(reference=str(folder)))
    assert (train(dpo_config(reference=str(folder), max_length=19, max_steps=1)) / "adapter").exists()


def test_a_reference_with_more_vocabulary_rows_is_fine(dpo_config, make_phi):
    assert (train(dpo_config(reference=str(make_phi(vocab_size=300)), max_steps=1)) / "adapter").exists()


def test_a_reference_whose_tokenizer_has_another_vocabulary_is_told(dpo_config, make_phi):
    folder = make_phi()
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.backend.add_special_tokens(["<|other|>"])
    tokenizer.save(folder)
    told = (
        r"its tokenizer has another vocabulary than the policy's \(261 tokens and 260; '<\|other\|>' is 260 and None\)"
    )
    with pytest.warns(UserWarning, match=told):
        train(dpo_config(reference=str(folder), max_steps=1))


def test_a_reference_that_is_none_is_told_with_what_it_may_be(dpo_config):
    with pytest.raises(
        FileNotFoundError, match="^reference adapter_off: no such folder, .* did you mean adapters_off?"
    ):
        train(dpo_config(reference="adapter_off"))
