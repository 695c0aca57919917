"""Models by name, for an evaluation: besides what `phi2.load` takes, the folder of a run or of an adapter."""

from __future__ import annotations

from phi2.checkpoints.weights import load, load_tokenizer
from phi2.files import read_json
from phi2.hub import resolve
from phi2.inference.config import LoadConfig
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer


def find(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """The model and the adapter that a name stands for: a run is what it trained, an adapter stands on its base.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: for an adapter that does not name its base, and one that is given an adapter itself.
    """
    folder = resolve(name)
    inner = next((folder / part for part in ("adapter", "model") if (folder / part).is_dir()), folder)
    if (folder / "config.json").is_file():
        inner = folder
    config = inner / "adapter_config.json"
    if not config.is_file():
        return (name if inner == folder else str(inner)), adapter
    if adapter is not None:
        raise ValueError(f"{name} is an adapter already: give its base as the model, or no adapter")
    base = read_json(config).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{config}: does not name its base; give that as the model, and {inner} as the adapter")
    return base, str(inner)


def load_named(name: str, config: LoadConfig) -> tuple[Phi2ForCausalLM, Tokenizer]:
    """The model of a name, and its tokenizer."""
    model, adapter = find(name, config.adapter)
    return load(model, config.device, config.dtype, adapter=adapter, quantize=config.quantize)


def tokenizer_of(name: str, config: LoadConfig) -> Tokenizer:
    """The tokenizer of a name, before any weight is read."""
    model, adapter = find(name, config.adapter)
    return load_tokenizer(resolve(model), None if adapter is None else resolve(adapter))


def require_chat_template(name: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the tokenizer has none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: its tokenizer has no chat template, which apply_chat_template and the toy skills need"
        )
