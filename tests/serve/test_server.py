"""The command, and the models it serves by name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import openai
import pytest

from phi2.cli.commands import main
from phi2.serve.models import load_served
from phi2.tokenizer import Tokenizer


def test_a_port_in_use_is_one_line_and_code_1(running, capsys):
    assert main(["serve", "--model", "nano", "--port", str(running.port)]) == 1
    told = f"phi2 serve: cannot listen at 127.0.0.1 port {running.port}: Address already in use\n"
    assert capsys.readouterr().err == told


def test_without_the_extra_it_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "nano", "--port", "0"]) == 1
    assert "needs the extra serve: pip install -e '.[serve]'" in capsys.readouterr().err


def test_a_host_that_others_reach_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("PHI2_API_KEY", raising=False)
    assert main(["serve", "--model", "nano", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "give an api_key" in capsys.readouterr().err


def test_a_server_answers_and_ends_on_ctrl_c(tiny_phi):
    command = [sys.executable, "-m", "phi2", "serve", "--model", str(tiny_phi), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PHI2_API_KEY": "sesame"})
    line = process.stderr.readline()
    url = re.search(r"at (http\S+);", line)[1]
    client = openai.OpenAI(base_url=url, api_key="sesame", timeout=60)
    assert client.completions.create(model=str(tiny_phi), prompt="hi", max_tokens=2).choices
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=60), process.stderr.read()) == (130, "phi2 serve: interrupted\n")


BAD_NAMES = {
    "twice": (["a={left}", "a={left}"], "two models are called a: name them"),
    "that of the base": (["{base}={left}"], "two models are called"),
    "no adapter": (["a={base}"], "adapter_config.json: no such file"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_adapters_are_told_before_anything_is_loaded(case, adapter_folders, base):
    adapters, message = BAD_NAMES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_served(base, [text.format(base=base, **adapter_folders) for text in adapters], device="cpu")


def test_adapters_bring_the_tokenizer_they_were_trained_with(adapter_folders, tiny_phi, tmp_path, served):
    folder = shutil.copytree(adapter_folders["left"], tmp_path / "left")
    own = Tokenizer(served.tokenizer.backend, {}, "{{ messages[0]['content'] }}")
    own.save(folder)
    assert load_served(str(tiny_phi), [f"a={folder}"], device="cpu").tokenizer.chat_template == own.chat_template
    other = shutil.copytree(adapter_folders["right"], tmp_path / "right")
    Tokenizer(served.tokenizer.backend, {}, "{{ messages[-1]['content'] }}").save(other)
    with pytest.raises(ValueError, match="is not that of"):
        load_served(str(tiny_phi), [f"a={folder}", f"b={other}"], device="cpu")
