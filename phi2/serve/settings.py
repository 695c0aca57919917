"""What both tabs of the page ask with: the system message and how to sample; and how an answer came about, in words."""

from __future__ import annotations

from html import escape

import gradio as gr

from phi2.inference.config import SamplingParams
from phi2.serve.side_by_side import Answer

NEW_TOKENS = (8, 256, 64)  # least, most and default of the seed's slider
READING = "reading the prompt …"
ENDS = {"stop": "ended by itself", "length": "cut at the maximum", None: ""}


class Settings:
    """Inputs that are made before the tabs that read them, and shown below."""

    def __init__(self) -> None:
        least, most, default = NEW_TOKENS
        self.system = gr.Textbox("", label="System message", placeholder="none", lines=2, max_lines=6, render=False)
        self.max_new_tokens = gr.Slider(
            least, most, default, step=1, label="Maximum new tokens", info="more take longer", render=False
        )
        self.temperature = gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token", render=False
        )
        self.seed = gr.Number(
            0, precision=0, minimum=0, label="Seed", info="above temperature 0; empty: a new one", render=False
        )

    @property
    def inputs(self) -> list[gr.Component]:
        """In the order that `read` takes their values."""
        return [self.system, self.max_new_tokens, self.temperature, self.seed]

    def render(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.system.render()
            with gr.Row():
                for component in self.inputs[1:]:
                    component.render()


def read(
    system: str, max_new_tokens: int, temperature: float, seed: int | None
) -> tuple[list[dict[str, str]], SamplingParams]:
    """The system turn, if any, and how to sample.

    Raises:
        ValueError: for a value out of range.
    """
    seed = seed if temperature else 0  # which says nothing where the likeliest token is taken
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return [{"role": "system", "content": system}] if system.strip() else [], params


def facts(answer: Answer) -> str:
    """How an answer came about."""
    if not answer.chunks:
        return "" if answer.error else READING
    last = answer.chunks[-1]
    told = [f"{last.generation_tokens} tokens", f"{last.generation_tps:.0f} tok/s" if last.generation_tps else ""]
    told += [ENDS[last.finish_reason], "" if last.seed is None else f"seed {last.seed}", answer.notice or ""]
    return " · ".join(filter(None, told))


def status(text: str, error: str | None = None) -> str:
    """One line as HTML."""
    wrong = f'<span class="wrong">{escape(error)}</span>' if error else ""
    return f'<div class="status" role="status">{" · ".join(filter(None, (wrong, escape(text))))}</div>'
