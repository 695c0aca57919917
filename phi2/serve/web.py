"""`phi2 demo`: a page to chat with policies and to compare their answers token by token. Nothing comes from a network.

The page is gradio's; `chat_tab.py` and `compare_tab.py` are its two halves, `settings.py` what both ask with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from threading import Event

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from phi2.inference.chat import told_if_untaught
from phi2.lora import computing
from phi2.model import Phi2ForCausalLM
from phi2.serve import chat_tab, compare_tab, shading
from phi2.serve.policies import Policy, loaded_policies
from phi2.serve.server import listen
from phi2.serve.settings import Settings

CLIENTS = 16  # that may wait for an answer at once; the engine answers them in one batch
SOURCES = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # what a model says fetches nothing elsewhere
OFFLINE = f'<meta http-equiv="Content-Security-Policy" content="{SOURCES}">'
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
STYLE = """
.gradio-container { width: 100% !important; max-width: 68rem !important; margin: 0 auto !important;
  --body-text-color-subdued: #5f6268; --block-info-text-color: #5f6268; --input-placeholder-color: #767980; }
.dark .gradio-container, .dark.gradio-container { --body-text-color-subdued: #a2a6ae;
  --block-info-text-color: #a2a6ae; --input-placeholder-color: #8d929a; }
.bare, .bare > * { padding: 0 !important; }
.message textarea { min-width: min(30rem, 60vw); }
.status { min-height: 1.3rem; padding: 0 .2rem; font-size: .85rem; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.status .wrong { color: #a5301c; } .dark .status .wrong { color: #f29a88; }
#title h1 { font-size: 1.35rem; margin: .2rem 0 0; }
#title p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
#untaught { font-size: .85rem; color: var(--body-text-color-subdued); }
@media (max-width: 40rem) { .examples { gap: .4rem !important; }
  .examples .example { min-height: 0 !important; padding: .45rem .7rem !important; } }
footer { display: none !important; }
"""


def demo(models: Sequence[str], adapters: Sequence[str], device: str, dtype: str, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        ValueError: when the port is taken, or for what `loaded_policies` refuses.
    """
    listen(host, port).close()  # gradio opens it anew, and is slow to say that it cannot
    with loaded_policies(models, adapters, device, dtype) as policies:
        page = build(policies)
        try:
            launch(page, host, port)
            print(f"phi2 demo: http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            Event().wait()
        finally:
            page.close(verbose=False)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serves a page from a thread of gradio's."""
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="zinc", font=FONT, font_mono=("ui-monospace", "monospace"))
    page.queue(default_concurrency_limit=CLIENTS)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        head=OFFLINE,
        theme=theme,
        css=STYLE + shading.STYLE,
    )


def build(policies: Sequence[Policy]) -> gr.Blocks:
    """The page; with one policy, it is the chat alone."""
    names = ", ".join(policy.name for policy in policies)
    with gr.Blocks(title=f"phi2: {names}", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(f"# phi2\n{names}", elem_id="title")
        if told := _told_if_untaught(policies):
            gr.Markdown(told, elem_id="untaught")
        settings = Settings()
        if len(policies) == 1:
            chat_tab.build(policies, settings)
        else:
            with gr.Tab("Chat"):
                chat_tab.build(policies, settings)
            with gr.Tab("Side by side"):
                compare_tab.build(policies, settings)
        settings.render()
    return page


def _told_if_untaught(policies: Sequence[Policy]) -> str:
    """Which policies were hardly taught to chat: a line for all of which the same is to be told."""

    def tell(model: Phi2ForCausalLM) -> str | None:
        with computing(model, policy.adapter):
            return told_if_untaught(model, policy.tokenizer)

    names: dict[str, list[str]] = {}
    for policy in policies:
        if told := policy.worker.run(tell).result():
            names.setdefault(told, []).append(policy.name)
    return "\n\n".join(f"{', '.join(group)}: {told}" for told, group in names.items())
