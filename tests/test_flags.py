"""Lists as a user writes them, and the parser's messages as a user can read them."""

from __future__ import annotations

import pytest

from phi2.cli.flags import UsageError, parse
from phi2.lab.compare_config import CompareConfig
from phi2.training.dpo import DPOConfig
from phi2.training.sft import SFTConfig

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def answer(prompt: str, stop: list[str] | None = None, top_k: int = 0, whole: bool = False) -> None:
    """A command.

    Args:
        prompt: Text.
        stop: Strings.
        top_k: A number.
        whole: A switch.
    """


def given(*arguments: str) -> dict:
    return parse("phi2 answer", "", answer, None, ["--prompt", "x", *arguments]).keywords


@pytest.mark.parametrize(
    ("arguments", "stop"),
    [
        ([], None),
        (["--stop", "A"], ["A"]),
        (["--stop=A"], ["A"]),
        (["--stop", "A", "--top_k", "2", "--stop", "B"], ["A", "B"]),
        (["--stop", '["A", "B"]'], ["A", "B"]),
        (["--stop", '["A", "B"]', "--stop", "C"], ["A", "B", "C"]),
        (["--stop", "[A, B]"], ["A", "B"]),
        (["--stop", "]["], ["]["]),
        (["--stop", "[A"], ["[A"]),
        (["--stop", "5"], ["5"]),
        (["--stop", "\nUser:"], ["\nUser:"]),
        (["--stop", "a=b, c"], ["a=b, c"]),
        (["--stop", "--"], ["--"]),
    ],
    ids=str,
)
def test_a_list_is_given_by_one_flag_for_each_element_or_as_a_whole(arguments, stop):
    assert given(*arguments)["stop"] == stop


def test_a_list_of_the_command_line_takes_the_place_of_the_config_files(tmp_path):
    (tmp_path / "a.yaml").write_text("stop: [X, Y]\n")
    assert given("--stop", "A", "--config", str(tmp_path / "a.yaml"))["stop"] == ["A"]


def test_lists_of_a_config_class_are_given_likewise():
    call = parse("phi2 sft", "", print, SFTConfig, [*NEEDED, "--sample_prompts", "Hi, you", "--sample_prompts", "Bye"])
    assert call.args[0].sample_prompts == ["Hi, you", "Bye"]


def test_what_may_be_a_text_stays_a_text():
    assert parse("phi2 sft", "", print, SFTConfig, NEEDED).args[0].data == "d"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "big"], "beta: expected float, got big"),
        (["--max_steps", "three"], "max_steps: expected int, got three"),
        (["--dtype", "half"], "dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got half"),
        (["--append_eos", "maybe"], "append_eos: expected bool, got maybe"),
        (["--max_length", "10.5"], "max_length: expected int, got 10.5"),
        (["--boundary", "none"], "boundary: expected one of 'joint', 'split', got none"),
        (["--lora.r", "big"], "lora.r: expected int, got big"),
        (["--lora.r", "0"], "r must be a positive whole number, got 0"),
        (["--lora.rank", "3"], "lora: Option 'rank' is not accepted"),
        (["--lora", "3"], "lora: expected null or a mapping of settings, got 3"),
        (["--loss_args.shift", "[1]"], "loss_args: expected float; expected bool; expected str, got [1]"),
        (["--sample_prompts", "[1]"], "sample_prompts: expected str, got 1"),
        (["--sample_prompts"], "argument --sample_prompts: expected one argument"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--config", "/nowhere.yaml"], "config: File does not exist: '/nowhere.yaml'"),
        (["--nll_weight", "-1"], "nll_weight must not be negative, got -1.0"),
    ],
    ids=str,
)
def test_a_mistake_is_told_by_flag_by_what_it_takes_and_by_what_it_got(arguments, message):
    with pytest.raises(UsageError) as caught:
        parse("phi2 dpo", "", print, DPOConfig, [*NEEDED, *arguments])
    assert " ".join(str(caught.value).split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {r: big}", "lora.r: expected int, got big"),
        ("lora: {rank: 3}", "lora: Option 'rank' is not accepted, got {'rank': 3}"),
        ("max_steps: three", "max_steps: expected int, got three"),
        ("xyz: red", "FILE: Option 'xyz' is not accepted"),
        ("max_step: 3", "FILE: Option 'max_step' is not accepted; did you mean max_steps?"),
        ("beta: 1\nseed: 3\nbeta: 2", "FILE: not valid YAML (line 3 gives 'beta' again)"),
        ("lora: {r: 8, lora_alpha: 8, r: 16}", "FILE: not valid YAML (line 1 gives 'r' again)"),
        ("- beta", "FILE: must hold a mapping, got list"),
        ("", "FILE: must hold a mapping, got nothing"),
    ],
)
def test_a_mistake_in_a_config_file_is_told_likewise(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse("phi2 dpo", "", print, DPOConfig, [*NEEDED, "--config", str(tmp_path / "a.yaml")])
    assert str(caught.value) == message.replace("FILE", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--whole"], True),
        (["--whole", "--top_k", "3"], True),
        (["--whole", "true"], True),
        (["--whole=false"], False),
        (["--whole", "false", "--top_k", "3"], False),
        ([], False),
    ],
    ids=str,
)
def test_a_switch_needs_no_value_and_may_have_one(arguments, expected):
    assert given(*arguments)["whole"] is expected


def test_so_does_a_switch_of_a_group():
    asked = ["--evaluation.apply_chat_template", "--evaluation.tasks", "gsm8k"]
    config = parse(
        "phi2 compare", "", print, CompareConfig, [*NEEDED, "--test_fraction", "0.1", "--losses", "ipo", *asked]
    )
    assert config.args[0].evaluation.apply_chat_template is True
