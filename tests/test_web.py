"""The page of `phi2 demo`: what its events do, and the page itself in a browser where there is one."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from time import sleep
from types import SimpleNamespace

import pytest
import torch

from phi2.checkpoints.weights import load, save_pretrained
from phi2.cli.commands import main
from phi2.inference.config import SamplingParams
from phi2.serve.policies import loaded_policies

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = ("", 8, 0, 0)  # system message, new tokens, temperature, seed


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--model", "nano-instruct"]) == 1
    assert capsys.readouterr().err == 'phi2 demo: the page needs gradio: pip install -c constraints.txt -e ".[demo]"\n'


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio", reason="the extra `demo` is not installed")


@pytest.fixture(scope="module")
def policies(gradio, make_phi, tmp_path_factory):
    """Two models that never end by themselves."""
    folders = []
    for seed in (1, 2):
        model, tokenizer = load(make_phi(seed), "cpu")
        with torch.no_grad():
            model.lm_head.bias.fill_(-1e4)[tokenizer.encode("abcdefgh")] = 0.0
        folders.append(tmp_path_factory.mktemp("endless") / "model")
        save_pretrained(model, tokenizer, folders[-1])
    with loaded_policies([f"sft={folders[0]}", f"dpo={folders[1]}"], device="cpu") as policies:
        yield policies


def test_a_port_in_use_is_one_line(gradio, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--model", "nano-instruct", "--port", str(port)]) == 1
    told = f"phi2 demo: cannot listen at 127.0.0.1 port {port}: Address already in use\n"
    assert capsys.readouterr().err == told


# What the events of the chat do: (box, chatbot, messages, status), again and again


@pytest.fixture
def chat(policies):
    from phi2.serve.chat_tab import Chat

    return Chat(policies)


PAST = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_reply_streams_into_the_conversation(chat):
    *shown, last = chat.typed("Why?", PAST, "dpo", "", 128, 0, 0)
    lengths = [len(messages[-1]["content"]) for _, _, messages, _ in shown if messages[-1]["role"] == "assistant"]
    assert len(lengths) > 1 and lengths == sorted(lengths)
    assert [message["content"] for message in last[2][:3]] == ["Hi", "Hello", "Why?"]
    assert "128 tokens · " in last[3] and " tok/s · cut at the maximum" in last[3]


def test_a_reply_is_made_again_from_what_came_before(chat):
    event = SimpleNamespace(index=0)
    *_, last = chat.again(event, PAST, "dpo", *SETTINGS)
    assert [message["role"] for message in last[2]] == ["user", "assistant"] and last[2][0]["content"] == "Hi"


def test_an_edited_message_is_answered_and_what_followed_is_forgotten(chat):
    event = SimpleNamespace(index=0, value="Say \\<b>")
    *_, last = chat.edited(event, [*PAST, *PAST], "dpo", *SETTINGS)
    assert [message["role"] for message in last[2]] == ["user", "assistant"] and last[2][0]["content"] == "Say <b>"


@pytest.mark.parametrize(
    ("text", "settings", "told"),
    [
        ("x" * 10_000_000, SETTINGS, "a message has 10,000,000 characters, at most 100,000 are read"),
        ("x" * 300, SETTINGS, "at most 255 leave room for a reply"),
        (" ", SETTINGS, "write a message first"),
        ("Hi", ("", 8, 1e-9, 0), "temperature must be 0 (greedy) or at least 0.0001"),
        ("Hi", ("", None, 0, 0), "max_new_tokens must be a whole number"),
    ],
)
def test_what_cannot_be_sent_stays_in_the_box_and_the_page_says_why(chat, text, settings, told):
    ((box, _, messages, status),) = chat.typed(text, PAST, "dpo", *settings)
    assert (box["value"] if isinstance(box, dict) else box.value) == text and messages == PAST and told in status


def test_logits_that_are_not_finite_are_told_and_the_next_reply_comes(chat, policies):
    bias = policies[1].model.lm_head.bias
    whole = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    *_, broken = chat.typed("Hi", [], "dpo", *SETTINGS)
    with torch.no_grad():
        bias.copy_(whole)
    *_, whole_again = chat.typed("Hi", [], "dpo", *SETTINGS)
    assert "non-finite logits; first in lm_head" in broken[3] and broken[2] == []
    assert "8 tokens" in whole_again[3]


def test_a_seed_is_read_above_temperature_0_only():
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    from phi2.serve.settings import read

    assert read("Be brief.", 8, 0, 5) == ([{"role": "system", "content": "Be brief."}], SamplingParams(8))
    assert read("", 8, 0.5, 5) == ([], SamplingParams(8, temperature=0.5, seed=5))


@pytest.mark.parametrize("text", ["a < b", "<b>", "`<b>` <i>", "```\n<b>\n``` <i>", "```\n<b>"])
def test_a_tag_stays_text_and_comes_back_as_it_was_typed(gradio, text):
    from phi2.serve.chat_tab import shown, typed

    (message,) = shown([{"role": "user", "content": text}])
    assert typed(message["content"]) == text
    assert all(tag not in message["content"].replace("\\<", "") for tag in ("<i>", "< b"))


# The comparison


def test_who_is_asked_must_be_few(policies):
    from phi2.serve.compare_tab import Comparison

    (told,) = Comparison(policies).asked("Hi", [], "log-probability", "dpo", "sft", *SETTINGS)
    assert "choose one to 3 who answer, got 0" in told[-1]


def test_answers_are_shaded_by_their_ratio_once_they_are_scored(policies):
    from phi2.serve.compare_tab import BY_RATIO, Comparison

    *_, last = Comparison(policies).asked("Hi", ["sft", "dpo"], BY_RATIO, "dpo", "sft", *SETTINGS)
    assert [sorted(told.logprobs) for told in last[3]] == [["dpo", "sft"]] * 2
    assert "log p(dpo) − log p(sft)" in last[2] and last[2].count("log-ratio <b>") == 2


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(policies):
    from phi2.serve.web import build, launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build(policies)
    launch(page, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def page(browser, address):
    """The page on a phone, on which nothing is fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page, elsewhere = context.new_page(), []
    page.on("request", lambda request: elsewhere.append(request))
    page.goto(address)
    yield page
    context.close()
    fetched = [request for request in elsewhere if request.failure != "csp"]
    assert [request.url for request in fetched if not request.url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def thoughtful(policies):
    """The model that answers takes its time, so that it is still at it when it is told to stop."""
    hook = policies[1].model.model.embed_tokens.register_forward_pre_hook(lambda *_: sleep(0.1))
    yield
    hook.remove()


def test_one_types_reads_and_stops(thoughtful, page):
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Maximum new tokens").fill("200")
    page.get_by_placeholder("Message").fill("Tell me <b>all</b> ![](http://localhost:1/x.png)")
    page.keyboard.press("Enter")
    page.get_by_test_id("bot").wait_for()
    page.get_by_test_id("stop-button").click()
    page.get_by_test_id("submit-button").wait_for()
    assert "<b>all</b>" in page.get_by_test_id("user").first.inner_text()
    said = page.locator(".status:visible").inner_text()
    assert "tok/s" in said and "cut" not in said
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_stop_says_so_where_nothing_was_said_yet(gradio):
    from phi2.serve.chat_tab import _stopped
    from phi2.serve.settings import READING, status

    assert "stopped" in _stopped(status(READING))[1] and "stopped" not in _stopped(status("3 tokens"))[1]


def test_the_engine_is_idle_once_a_page_is_closed(thoughtful, page, policies):
    page.get_by_placeholder("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_test_id("bot").wait_for()
    page.close()
    worker = policies[1].worker
    waited = (sleep(0.1) for _ in range(20))  # an answer of 64 tokens takes longer
    assert any(worker.run(lambda _: worker._engine.is_idle).result() for _ in waited)


def test_one_compares(page):
    page.get_by_role("tab", name="Side by side").click()
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator("details").nth(1).wait_for()
    page.get_by_label("log-ratio of two").click()
    page.get_by_text("log p(dpo) − log p(sft)").wait_for()
    assert page.locator("article span[title$=nats]").count() == 2 * 64
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
