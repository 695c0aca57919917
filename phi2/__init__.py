"""phi2: Microsoft's Phi-2 from scratch, with its own SFT and preference optimisation.

model, tokenizer = phi2.load("rasyosef/phi-2-instruct-v0.1")
print(phi2.generate(model, tokenizer, [{"role": "user", "content": "Solve 2x + 3 = 7."}]))
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi2.chat import ChatSession
    from phi2.generate import generate, stream
    from phi2.lora_config import LoraConfig
    from phi2.losses.preference import PairBatch, preference_loss
    from phi2.weights import load, save_pretrained

__version__ = "0.1.0"
__all__ = ["ChatSession", "LoraConfig", "PairBatch", "generate", "load", "preference_loss", "save_pretrained", "stream"]

_HOMES = {  # where each name lives: it is imported when it is first asked for, and torch with it
    "ChatSession": "phi2.chat",
    "LoraConfig": "phi2.lora_config",
    "PairBatch": "phi2.losses.preference",
    "generate": "phi2.generate",
    "load": "phi2.weights",
    "preference_loss": "phi2.losses.preference",
    "save_pretrained": "phi2.weights",
    "stream": "phi2.generate",
}


class _Package(ModuleType):
    """This module. Python hangs every module on its package: the one called `generate` must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
