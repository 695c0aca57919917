"""The command line as it is typed: exit codes, one-line errors, config files, the way from SFT to a merged model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import yaml

import phi2
from phi2.checkpoints import convert
from phi2.cli.commands import COMMANDS, _config_class, main
from phi2.data.sources import SOURCES, TOYS
from phi2.demo.quickstart import quickstart
from phi2.evaluation.toy import evaluate
from phi2.inference.config import SamplingParams
from phi2.losses.modifiers import MODIFIERS
from phi2.losses.registry import PREFERENCE_LOSSES

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--device", "cpu", "--lora.r", "4"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(list(arguments))
    except SystemExit as exit:  # --help and --print_config
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence_of_help(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    flags = out.partition("options:")[2].split("\n  --")[1:]
    assert code == 0 and flags
    own = [flag for flag in flags if not flag.split()[0].endswith(".help")]
    assert [flag.split()[0] for flag in own if len(flag.split()) < 4] == []


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("merge", convert.merge_adapter),
        ("convert", convert.convert),
        ("quickstart", quickstart),
        ("evaluate", evaluate),
    ],
)
def test_the_defaults_of_a_command_are_those_of_its_function(command, function):
    told = COMMANDS[command]
    own = signature(_config_class(told) or told.run).parameters
    for name, parameter in signature(function).parameters.items():
        if name in own:
            assert own[name].default == parameter.default, name


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_setting_of_sampling_is_a_flag_with_its_own_default(command):
    flags = {field.name: field.default for field in fields(_config_class(COMMANDS[command]))}
    assert {field.name: field.default for field in fields(SamplingParams)}.items() <= flags.items()


def test_a_bad_setting_of_sampling_is_told_before_a_model_is_looked_for(capsys):
    code, _, err = run(capsys, "chat", "--model", "/nowhere", "--top_k", "5")
    assert (code, err) == (2, "phi2 chat: top_k 5 needs a temperature above 0, got 0 (greedy)\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parser_knows_the_type_of_every_flag(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "Unvalidated" not in out


def test_the_help_of_a_loss_and_of_data_names_all_there_are(capsys):
    _, out, _ = run(capsys, "dpo", "--help")
    text = re.sub(r"-?\n +", "", out.partition("options:")[2]).replace(" ", "")
    for name in (*SOURCES, *TOYS):
        assert name.replace("-", "") in text.replace("-", "")
    for name, loss in PREFERENCE_LOSSES.items():
        assert f"{name}({','.join(f'{knob}={value}' for knob, value in loss.knobs.items())})" in text
    assert all(f"{knob}={value}" in text for each in MODIFIERS.values() for knob, value in each.knobs.defaults.items())


def test_the_readme_names_every_source():
    (line,) = (
        line for line in (Path(__file__).parents[1] / "README.md").read_text().splitlines() if "(`--data`)" in line
    )
    named = re.search(r"named sources \((.*?)\)", line)[1]
    assert named.split(", ") == [*SOURCES, *TOYS]


def test_a_config_file_may_say_that_nothing_stops_a_reply(capsys, tmp_path):
    (tmp_path / "old.yaml").write_text("model: nano\nprompt: hi\nmax_new_tokens: 2\nstop: null\n")
    assert run(capsys, "generate", "--config", str(tmp_path / "old.yaml"))[0] == 0


def test_the_overview_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS)


BAD_USAGE = {
    "unknown command": (["train"], "command must be one of generate, chat, sft"),
    "unknown flag": (["chat", "--model", "nano", "--colour", "red"], "colour"),
    "missing flags": (["sft", "--model", "nano"], "data, output"),
    "a word for a number": (["dpo", "--model", "m", "--data", "d", "--output", "o", "--beta", "big"], "beta"),
    "a choice that is none": (
        ["sft", "--model", "m", "--data", "d", "--output", "o", "--packing", "tight"],
        "best_fit",
    ),
    "a rank below one": (["dpo", "--model", "m", "--data", "d", "--output", "o", "--lora.r", "0"], "r must be"),
    "a negative count": (["inspect", "--model", "m", "--data", "d", "--rows", "-1"], "rows must not be"),
    "settings at odds": (["sft", "--model", "m", "--data", "d", "--output", "o", "--from_scratch", "true"], "lora"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_one_line_and_code_2(case, capsys):
    arguments, expected = BAD_USAGE[case]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and expected in err


def test_failures_are_one_line_and_code_1(tiny_phi, sft_data, pair_data, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for arguments, expected in (
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        (["--data", str(broken)], "broken.jsonl row 2: invalid JSON"),
        (["--data", str(empty)], "empty.jsonl: no usable row"),
        (["--data", pair_data, "--model", str(tmp_path / "no-model")], "no-model: no such folder"),
    ):
        where = ["--model", str(tiny_phi), "--output", str(tmp_path / "run")]
        code, _, err = run(capsys, "sft", *where, *SHORT, *arguments)
        last = err.splitlines()[-1]
        assert code == 1 and expected in last and "Traceback" not in err


def test_the_folder_of_a_run_is_not_its_model_or_adapter_and_that_is_told(tiny_phi, tmp_path, capsys):
    base, asked = str(tiny_phi), ["--prompt", "x"]
    for name in ("adapter", "model"):
        (tmp_path / name / name).mkdir(parents=True)
    for arguments, expected in (
        (["--model", base, "--adapter", str(tmp_path / "adapter")], "adapter/adapter_config.json: no such file"),
        (["--model", str(tmp_path / "model")], f"no config.json in {tmp_path}/model"),
    ):
        code, _, err = run(capsys, "generate", *arguments, *asked)
        name = arguments[-1]
        assert code == 1 and f"{expected}; did you mean {name}/{name.rpartition('/')[2]}?" in err


def test_an_unknown_loss_lists_those_there_are(tiny_phi, pair_data, tmp_path, capsys):
    where = ["--model", str(tiny_phi), "--data", pair_data, "--output", str(tmp_path / "run")]
    code, _, err = run(capsys, "dpo", *where, *SHORT, "--loss", "ippo")
    assert code == 1 and "loss must be one of" in err and "sigmoid_norm" in err


def test_flags_win_over_the_config_file(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": "d", "output": "o", "beta": 0.3, "max_steps": 7}))
    code, out, _ = run(capsys, "dpo", "--config", str(path), "--beta", "0.5", "--print_config")
    shown = yaml.safe_load(out)
    assert code == 0 and shown["beta"] == 0.5 and shown["max_steps"] == 7 and shown["model"] == "m"


def test_sft_dpo_merge_generate_in_a_row(tiny_phi, sft_data, pair_data, tmp_path, capsys):
    base, runs = str(tiny_phi), tmp_path
    loss = runs / "mine.py"
    loss.write_text(
        "import phi2, torch\n"
        "@phi2.preference_loss('twice_hinge')\n"
        "def twice_hinge(pairs: phi2.PairBatch, *, beta: float = 0.1) -> torch.Tensor:\n"
        "    return 2 * torch.relu(1 - beta * pairs.margin)\n"
    )
    steps = (
        ["sft", "--model", base, "--data", sft_data, "--output", str(runs / "sft"), *SHORT],
        ["dpo", "--model", base, "--adapter", str(runs / "sft/adapter"), "--data", pair_data, *SHORT[:-2]]
        + ["--loss_file", str(loss), "--loss", "twice_hinge", "--output", str(runs / "dpo")],
        ["merge", "--model", base, "--adapter", str(runs / "dpo/adapter"), "--output", str(runs / "merged")],
        ["generate", "--model", str(runs / "merged"), "--prompt", "hi", "--max_new_tokens", "4"],
    )
    for step in steps:
        code, _, err = run(capsys, *step)
        assert code == 0, err
    first = json.loads((runs / "dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(2.0)
    assert {"report.html", "README.md", "config.yaml", "environment.json", "data_audit.json"} <= {
        path.name for path in (runs / "dpo").iterdir()
    }
    assert (runs / "merged" / "model.safetensors").exists()


def test_a_folder_with_a_run_is_not_run_over(tiny_phi, sft_data, tmp_path, capsys):
    command = ["sft", "--model", str(tiny_phi), "--data", sft_data, "--output", str(tmp_path / "run"), *SHORT]
    assert run(capsys, *command)[0] == 0
    code, _, err = run(capsys, *command)
    assert code == 1 and "holds a run already" in err


def test_inspect_shows_rows_and_the_audit(tiny_phi, pair_data, capsys):
    code, out, _ = run(capsys, "inspect", "--model", str(tiny_phi), "--data", pair_data, "--rows", "1")
    assert code == 0 and "chosen (" in out and "target_tokens" in out


def test_a_model_is_graded(capsys):
    code, out, err = run(capsys, "evaluate", "--model", "nano", "--questions", "2", "--device", "cpu")
    assert code == 0 and err.count("Traceback") == 0
    assert [line.split()[0] for line in out.splitlines()] == ["follow", "arithmetic", "quiz", "truthful", "coreference"]


def test_a_prompt_is_shown_in_the_models_own_template(make_phi, capsys):
    folder = make_phi()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    arguments = ["--model", str(folder), "--prompt", "abc", "--max_new_tokens", "1", "--device", "cpu"]
    for more, tokens in (([], 5), (["--system", "x"], 8), (["--prompt_style", "raw"], 3)):
        code, _, err = run(capsys, "generate", *arguments, *more)
        assert code == 0 and err.startswith(f"{tokens} prompt tokens")


def test_pairs_take_no_other_template(tiny_phi, pair_data, capsys):
    arguments = ["--model", str(tiny_phi), "--data", pair_data, "--chat_template", "chatml"]
    code, _, err = run(capsys, "inspect", *arguments)
    assert code == 1 and "chat_template is for supervised rows, and these are pairs, got 'chatml'" in err


@pytest.mark.parametrize("command", ["sft", "inspect"])
def test_the_old_name_of_a_setting_says_its_new_one(command, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("model: nano\ndata: toy-sft\nadd_chatml: true\n")
    flags = ["--output", "o"] if command == "sft" else []
    for arguments in (
        ["--config", str(tmp_path / "old.yaml")],
        ["--model", "m", "--data", "d", "--add_chatml", "true"],
    ):
        code, _, err = run(capsys, command, *arguments, *flags)
        assert code == 2 and "add_chatml is now chat_template" in err and err.count("\n") == 1


def test_a_system_message_needs_the_chat_template(capsys):
    code, _, err = run(capsys, "generate", "--model", "nano", "--prompt", "x", "--system", "y", "--prompt_style", "raw")
    assert code == 2 and "system needs prompt_style chatml (or auto), got 'raw'" in err


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_told(flag, capsys):
    code, out, _ = run(capsys, flag)
    assert (code, out) == (0, f"phi2 {phi2.__version__}\n")


def test_an_adapter_merged_onto_another_base_is_one_line_of_warning(tiny_phi, make_phi, sft_data, tmp_path, capsys):
    adapter, output = str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")
    run(capsys, "sft", "--model", str(tiny_phi), "--data", sft_data, "--output", str(tmp_path / "run"), *SHORT)
    code, _, err = run(capsys, "merge", "--model", str(make_phi(seed=1)), "--adapter", adapter, "--output", output)
    assert code == 0 and err.startswith(f"phi2 merge: warning: {adapter}: trained on {tiny_phi}, whose weights differ")
    assert err.count("\n") == 1


def test_memory_that_is_not_there_is_one_line(tiny_phi, tmp_path, capsys):
    rows, output = str(10**13), str(tmp_path / "large")
    code, _, err = run(capsys, "convert", "--model", str(tiny_phi), "--output", output, "--vocab_size", rows)
    assert code == 1 and err.startswith("phi2 convert: out of memory: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--model", "nano", "--prompt", "x"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_the_command_in_silence(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "phi2", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import phi2_command"
    code += "; sys.argv = ['phi2', 'evaluate', '--model', 'nano']; sys.exit(phi2_command.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "phi2 evaluate: interrupted\n")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ([], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["nonsense"], 2),
        (["chat", "--help"], 0),
        (["generate", "--no_such_flag", "1"], 2),
        (["sft", "--help"], 0),
        (["sft", "--no_such_flag", "1"], 2),
        (["dpo", "--no_such_flag", "1"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_does_not_wait_for_torch(tmp_path, line, code):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from phi2.__main__ import main; sys.exit(main({line!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr[-500:]


def test_a_new_seed_is_told_so_that_its_text_can_be_made_again(capsys):
    line = ["generate", "--model", "nano", "--prompt", "a", "--max_new_tokens", "8", "--temperature", "2.0", "--seed"]
    _, first, told = run(capsys, *line, "null")
    seed = told.rpartition("seed ")[2].strip()
    assert run(capsys, *line, seed)[1] == first
