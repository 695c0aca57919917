"""The model card of a run: `README.md` in the run folder, as the hub shows it when the folder is uploaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phi2.data.sources import SOURCES, names_of
from phi2.files import write_whole
from phi2.hub import HUB_ID

NOT_HYPERPARAMETERS = (  # said elsewhere in the card, or without influence on the result
    "model",
    "data",
    "output",
    "eval_data",
    "sample_prompts",
    "device",
    "resume",
    "logging_steps",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "loss_file",
    "reference_cache",
)


def write_card(
    run_folder: str | Path,
    settings: Mapping[str, Any],
    results: Mapping[str, float],
    chat_template: str = "the model's own",
) -> Path:
    """Writes `README.md` into the folder of a finished run, and returns its path.

    Args:
        run_folder: holds `adapter/` or `model/` already.
        settings: what was run, as config.yaml holds it.
        results: metric -> its last value.
        chat_template: where the chat template comes from, in words.
    """
    run = Path(run_folder)
    parts = [
        _header(settings),
        f"# {run.resolve().name}",
        f"{_about(settings)}\n\nChat template: {chat_template}.",
        "## How to load it\n\n" + _loading(run, settings),
        "## Results\n\n" + _table(("metric", "value"), {name: f"{value:.4g}" for name, value in results.items()}),
        "## Settings\n\n" + _table(("setting", "value"), _hyperparameters(settings)),
    ]
    path = run / "README.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def _header(settings: Mapping[str, Any]) -> str:
    """The YAML block the hub reads; it knows models and data sets by their hub ids only."""
    base = settings["model"]
    header: dict[str, Any] = {"base_model": base} if _is_hub_id(base) else {}
    sources = [SOURCES[name].hub_id if name in SOURCES else name for name in names_of(settings["data"])]
    datasets = list(filter(_is_hub_id, sources))
    header |= {"datasets": datasets} if datasets else {}
    method = "preference-optimization" if settings.get("loss") else "sft"
    tags = ["phi", method, *(["lora"] if settings.get("lora") else [])]
    header |= {"library_name": "phi2", "pipeline_tag": "text-generation", "tags": tags}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _about(settings: Mapping[str, Any]) -> str:
    loss, lora, base = settings.get("loss"), settings.get("lora"), settings["model"]
    if isinstance(loss, list):  # a mixture, its parts as a run writes them
        loss = ",".join(f"{part['loss']}:{part['weight']:g}" for part in loss)
    method = f"Preference optimisation with the loss `{loss}`" if loss else "Supervised fine-tuning"
    what = f"a LoRA adapter of rank {lora['r']}" if lora else "all weights"
    data = ", ".join(f"`{source}`" for source in names_of(settings["data"]))
    return f"{method} of `{base}` on {data}; trained: {what}."


def _loading(run: Path, settings: Mapping[str, Any]) -> str:
    base, adapter, model = (json.dumps(str(name)) for name in (settings["model"], run / "adapter", run / "model"))
    if (run / "adapter").exists():
        ours = f"model, tokenizer = phi2.load({base}, adapter={adapter})"
        theirs = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({adapter})\n"
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {adapter})"
        )
    else:
        ours = f"model, tokenizer = phi2.load({model})"
        theirs = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({model})\n"
            f"model = AutoModelForCausalLM.from_pretrained({model})"
        )
    ask = 'print(phi2.generate(model, tokenizer, [{"role": "user", "content": "Hello!"}]))'
    return f"```python\nimport phi2\n\n{ours}\n{ask}\n```\n\nWith other libraries:\n\n```python\n{theirs}\n```"


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, str]:
    plain = {name: value for name, value in settings.items() if name not in NOT_HYPERPARAMETERS}
    lora = plain.pop("lora", None) or {}
    plain |= {f"lora.{name}": value for name, value in lora.items()}
    return {name: f"`{value}`" for name, value in plain.items() if value is not None and value != {}}


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {_in_cell(name)} | {_in_cell(value)} |" for name, value in lines)


def _in_cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()
