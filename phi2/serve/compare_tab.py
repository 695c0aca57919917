"""The comparison of the page: two or three policies answer one prompt at once, and every token is shaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr

from phi2.serve.policies import Policy
from phi2.serve.settings import Settings, facts, read, status
from phi2.serve.shading import Told, answers_html
from phi2.serve.side_by_side import Answer, ask, scored, spans, stream

MOST = 3  # that are readable side by side
BY_LOGPROB, BY_RATIO = "log-probability", "log-ratio of two"
EMPTY = '<div class="answers"></div>'


class Comparison:
    """What the events of the tab do: each gives the values of buttons, answers, what is told, and status."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = {policy.name: policy for policy in policies}

    def asked(
        self, text: str, names: list[str], shade: str, first: str, second: str, *settings: Any
    ) -> Iterator[tuple]:
        """Streams all answers, then scores each under every policy."""
        try:
            answers = self._ask(text, names, settings)
        except ValueError as error:
            yield *_buttons(False), gr.skip(), gr.skip(), status("", str(error))
            return
        with closing(stream(answers)) as arrivals:
            yield *_buttons(True), *_shown(answers, None, shade, first, second), status("")
            for _ in arrivals:
                yield gr.skip(), gr.skip(), *_shown(answers, None, shade, first, second), status("")
        yield *_buttons(False), *self._scored(answers, shade, first, second)

    def _ask(self, text: str, names: list[str], settings: tuple) -> list[Answer]:
        if not text.strip():
            raise ValueError("write a prompt first")
        if not 1 <= len(names) <= MOST:
            raise ValueError(f"choose one to {MOST} who answer, got {len(names)}")
        system, params = read(*settings)
        turn = {"role": "user", "content": text}
        return [ask(policy, [*system, turn], params) for name, policy in self._policies.items() if name in names]

    def _scored(self, answers: list[Answer], shade: str, first: str, second: str) -> tuple:
        try:
            logprobs = scored(answers, [*self._policies.values()])
        except ValueError as error:
            return *_shown(answers, None, shade, first, second), status("", str(error))
        return *_shown(answers, logprobs, shade, first, second), status("")


def _shown(
    answers: Sequence[Answer], logprobs: list[dict[str, list[float]]] | None, shade: str, first: str, second: str
) -> tuple[str, list[Told]]:
    """HTML and what it was made from; until answers are scored, each has the log-probabilities it was drawn with."""
    drawn = [{answer.policy.name: [chunk.logprob for chunk in answer.chunks]} for answer in answers]
    told = [
        Told(answer.policy.name, spans(answer), known, facts(answer), answer.error)
        for answer, known in zip(answers, logprobs or drawn, strict=True)
    ]
    return shaded(told, shade, first, second), told


def shaded(told: list[Told], shade: str, first: str, second: str) -> str:
    """The answers in the shades that are asked for."""
    return answers_html(told, (first, second) if shade == BY_RATIO else None) if told else EMPTY


def _buttons(busy: bool) -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=not busy), gr.Button(visible=busy)


def build(policies: Sequence[Policy], settings: Settings) -> None:
    """Puts the comparison where it is called, and wires its events."""
    names = [policy.name for policy in policies]
    chosen = gr.CheckboxGroup(names, value=names[-MOST:], label=f"Who answers ({MOST} at most)")
    text = gr.Textbox(label="Prompt", placeholder="Each of them answers this.", lines=2, max_lines=8)
    with gr.Row():
        go, halt = gr.Button("Answer", variant="primary"), gr.Button("Stop", variant="stop", visible=False)
    shade = gr.Radio([BY_LOGPROB, BY_RATIO], value=BY_LOGPROB, label="Shade tokens by")
    with gr.Row(visible=False) as pair:
        first = gr.Dropdown(names, value=names[-1], label="log-ratio of")
        second = gr.Dropdown(names, value=names[-2], label="to")
    message = gr.HTML(status(""), padding=False, elem_classes="bare")
    html, told = gr.HTML(EMPTY, padding=False, elem_classes="bare"), gr.State([])
    outputs, look = [go, halt, html, told, message], [shade, first, second]
    comparison = Comparison(policies)
    events = [
        trigger(comparison.asked, [text, chosen, *look, *settings.inputs], outputs)
        for trigger in (go.click, text.submit)
    ]
    halt.click(lambda: _buttons(False), None, [go, halt], cancels=events)
    shade.change(lambda by: gr.Row(visible=by == BY_RATIO), shade, pair)
    gr.on([component.change for component in look], shaded, [told, *look], html, show_progress="hidden")
