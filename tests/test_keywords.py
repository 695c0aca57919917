"""Settings as keyword arguments: every kind of value, mistakes in one line, and what `phi2.dpo?` shows."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

import phi2
from phi2.evaluation.config import EvaluateConfig
from phi2.keywords import checked, config_of, help_of
from phi2.lora_config import LoraConfig
from phi2.training.config import DPOConfig, SFTConfig

WHERE = {"model": "nano", "data": "toy-dpo", "output": "runs/dpo"}


def test_settings_make_the_config_that_they_name():
    assert config_of(DPOConfig, {**WHERE, "beta": 0.3}) == DPOConfig(**WHERE, beta=0.3)


def test_a_group_of_settings_may_be_a_dict():
    made = config_of(DPOConfig, {**WHERE, "lora": {"r": 4, "target_modules": ["q_proj"]}})
    assert made.lora == LoraConfig(r=4, target_modules=("q_proj",))


def test_a_group_of_settings_may_be_an_object_or_none():
    for lora in (LoraConfig(r=4), None):
        assert config_of(DPOConfig, {**WHERE, "lora": lora}).lora == lora


def test_a_path_may_be_a_path():
    assert config_of(DPOConfig, {**WHERE, "output": Path("runs/dpo")}) == DPOConfig(**WHERE)


def test_several_paths_may_be_paths():
    assert config_of(EvaluateConfig, {"model": [Path("runs/a"), "runs/b"]}).model == ("runs/a", "runs/b")


def test_values_that_are_taken_as_they_are_are_not_copied():
    rows = [{"text": "a"}]
    assert checked(SFTConfig, {"data": rows}, as_given=("data",))["data"] is rows


def test_what_can_be_read_once_is_read_once():
    assert checked(SFTConfig, {"data": ({"text": text} for text in "ab")}, ("data",))["data"] == [
        {"text": "a"},
        {"text": "b"},
    ]


def test_numbers_may_be_those_of_numpy():
    made = config_of(DPOConfig, {**WHERE, "beta": np.float32(0.5), "max_steps": np.int64(3), "lora": {"r": np.int8(4)}})
    assert (made.beta, made.max_steps, made.lora.r) == (0.5, 3, 4)


def test_what_was_given_is_left_as_it_was():
    lora = {"r": 4}
    checked(DPOConfig, {"lora": lora})
    assert lora == {"r": 4}


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"lerning_rate": 1.0}, "there is no setting 'lerning_rate'; did you mean learning_rate?"),
        ({"data": "toy-sft"}, "model, output must be given"),
        ({**WHERE, "max_steps": "many"}, "max_steps: expected int, got many"),
        ({**WHERE, "dtype": "float8"}, "dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got float8"),
        ({**WHERE, "lora": {"rank": 4}}, "lora: Option 'rank' is not accepted"),
        ({**WHERE, "bema": {"lag": 0}}, "lag must be at least 1, got 0.0"),
        ({**WHERE, "max_steps": 0}, "max_steps must be -1 or positive"),
    ],
)
def test_a_mistake_is_told_in_one_line(settings, told):
    with pytest.raises(ValueError) as caught:
        config_of(DPOConfig, settings)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_a_name_like_no_other_is_told_all_there_are():
    with pytest.raises(
        ValueError, match=r"no setting 'zzz'; there are model, data, output, .*disable_dropout, ledger, loss$"
    ):
        checked(DPOConfig, {"zzz": 1})


@pytest.mark.parametrize("function, kind", [(phi2.sft, SFTConfig), (phi2.dpo, DPOConfig)])
def test_a_function_shows_every_setting_with_its_default_and_its_help(function, kind):
    shown = inspect.signature(function).parameters
    assert [*shown] == ["session", *(field.name for field in fields(kind))]
    assert shown["max_steps"].default == -1 and shown["lora"].default == LoraConfig()
    assert shown["model"].default is inspect.Parameter.empty
    assert inspect.getdoc(function).count("\n    learning_rate: Peak learning rate.") == 1


def test_a_setting_that_is_an_argument_of_its_own_is_shown_once():
    assert [*inspect.signature(phi2.evaluate).parameters].count("model") == 1
    assert phi2.evaluate.__doc__.count("\n    model: ") == 1


def test_the_help_of_a_field_is_that_of_the_class_that_defines_it_last():
    @dataclass
    class Base:
        kept: int = 1
        """Of the base,
        in two lines."""
        changed: int = 1
        """Old."""

    @dataclass
    class Derived(Base):
        changed: int = 2
        """New."""

    assert help_of(Derived) == {"kept": "Of the base, in two lines.", "changed": "New."}


def test_every_setting_of_a_run_has_a_help():
    for kind in (SFTConfig, DPOConfig):
        assert {field.name for field in fields(kind)} <= help_of(kind).keys()
