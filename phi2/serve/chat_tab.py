"""The chat of the page: one conversation with a policy; any message can be edited and any reply made again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from textwrap import shorten
from typing import Any

import gradio as gr

from phi2.serve.policies import Policy
from phi2.serve.settings import READING, Settings, facts, read, status
from phi2.serve.side_by_side import ask, stream

EXAMPLES = (  # of the chat demo of phi-2-instruct
    "Hi",
    "hello",
    "Translate the word 'cat' to German.",
    "Recommend me three animated movies.",
    "Solve this quadratic equation.\n\nx^2 + 3x + 2 = 0\nwhat is the value of x?",
    "Implement Euclid's GCD Algorithm in python",
    "Write a python program that computes the least common multiple (lcm) of two positive integers. Format the code in"
    " markdown.",
    "Molly and Abigail want to attend a beauty and modeling contest. They both want to buy new pairs of shoes and"
    " dresses. Molly buys a pair of shoes which costs $40 and a dress which costs $160. How much should Abigail budget"
    " if she wants to spend half of what Molly spent on the pair of shoes and dress?",
)

EXAMPLE_SHOWN = 72  # characters

CODE = re.compile(r"(```.*?(?:```|$)|`[^`\n]+`)", re.DOTALL)  # of Markdown

Messages = list[dict[str, str]]


class Chat:
    """What the events of the tab do: each gives the values of box, chatbot, messages and status, again and again."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = {policy.name: policy for policy in policies}

    def typed(self, text: str, messages: Messages, name: str, *settings: Any) -> Iterator[tuple]:
        if text.strip():
            yield from self._reply(text, messages, name, settings)
        else:
            yield _ready(text, messages, status("", "write a message first"))

    def example(self, event: gr.SelectData, messages: Messages, name: str, *settings: Any) -> Iterator[tuple]:
        yield from self._reply(event.value["text"], messages, name, settings)

    def again(self, event: gr.RetryData, messages: Messages, name: str, *settings: Any) -> Iterator[tuple]:
        """Another reply to a message; what followed it is forgotten."""
        yield from self._reply(messages[event.index]["content"], messages[: event.index], name, settings)

    def edited(self, event: gr.EditData, messages: Messages, name: str, *settings: Any) -> Iterator[tuple]:
        """A reply to what a message says now; what followed it is forgotten."""
        yield from self._reply(typed(event.value), messages[: event.index], name, settings)

    def _reply(self, text: str, messages: Messages, name: str, settings: tuple) -> Iterator[tuple]:
        """Streams; a text that cannot be sent stays in the box, and the conversation as it was."""
        turn = {"role": "user", "content": text}
        try:
            system, params = read(*settings)
            answer = ask(self._policies[name], [*system, *messages, turn], params)
        except ValueError as error:
            yield _ready(text, messages, status("", str(error)))
            return
        box = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        yield _now(box, [*messages, turn], status(facts(answer)))
        with closing(stream([answer])) as arrivals:
            for _ in arrivals:
                said = [{"role": "assistant", "content": answer.text}] if answer.text else []
                yield _now(gr.skip(), [*messages, turn, *said], status(facts(answer), answer.error))
        if not answer.chunks:
            yield _ready(text, messages, status("", answer.error))
        else:
            replied = [*messages, turn, {"role": "assistant", "content": answer.text}]
            yield _ready("", replied, status(facts(answer), answer.error))


def _now(box: Any, messages: Messages, told: str) -> tuple:
    return box, shown(messages), messages, told


def _ready(text: str, messages: Messages, told: str) -> tuple:
    return _now(gr.Textbox(value=text, submit_btn=True, stop_btn=False), messages, told)


def _stopped(told: str) -> tuple:
    """What was told of an answer stays, if it had begun."""
    return gr.Textbox(submit_btn=True, stop_btn=False), status("stopped") if READING in told else told


def shown(messages: Messages) -> Messages:
    """As the chatbot takes them: Markdown, in which a tag stays text."""
    return [{**message, "content": _outside_code(message["content"], "<", "\\<")} for message in messages]


def typed(text: str) -> str:
    """What was typed, of what is `shown` of it."""
    return _outside_code(text, "\\<", "<")


def _outside_code(text: str, old: str, new: str) -> str:
    return "".join(part if CODE.fullmatch(part) else part.replace(old, new) for part in CODE.split(text))


def build(policies: Sequence[Policy], settings: Settings) -> None:
    """Puts the chat where it is called, and wires its events."""
    names = [policy.name for policy in policies]
    name = gr.Radio(names, value=names[-1], label="Who answers", visible=len(names) > 1)
    chatbot = gr.Chatbot(
        show_label=False,
        height="54vh",
        min_height=300,
        editable="user",
        buttons=["copy"],
        allow_tags=False,
        placeholder="Say something, or take an example.",
        examples=[{"text": text, "display_text": shorten(text, EXAMPLE_SHOWN, placeholder=" …")} for text in EXAMPLES],
    )
    told = gr.HTML(status(""), padding=False, elem_classes="bare")
    box = gr.Textbox(show_label=False, placeholder="Message", submit_btn=True, max_lines=8)
    messages = gr.State([])
    chat, inputs = Chat(policies), [messages, name, *settings.inputs]
    wiring = {"outputs": [box, chatbot, messages, told], "show_progress": "hidden"}
    events = [
        box.submit(chat.typed, [box, *inputs], **wiring),
        chatbot.example_select(chat.example, inputs, **wiring),
        chatbot.retry(chat.again, inputs, **wiring),
        chatbot.edit(chat.edited, inputs, **wiring),
    ]
    box.stop(_stopped, told, [box, told], cancels=events)
    chatbot.clear(lambda: _ready("", [], status("")), None, **wiring, cancels=events)
