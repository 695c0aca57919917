"""phi2: Microsoft's Phi-2 from scratch, with its own SFT and preference optimisation.

model, tokenizer = phi2.load("rasyosef/phi-2-instruct-v0.1")
print(phi2.generate(model, tokenizer, [{"role": "user", "content": "Solve 2x + 3 = 7."}]))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi2.answers.pairs import sample_pairs
    from phi2.checkpoints.peft_files import save_adapter
    from phi2.checkpoints.weights import load, save_pretrained
    from phi2.data.load import load_data
    from phi2.evaluation.api import evaluate
    from phi2.inference.chat import ChatSession
    from phi2.inference.generate import generate, stream
    from phi2.inference.logprobs import logprobs
    from phi2.lab.compare import compare
    from phi2.lab.comparison import Comparison
    from phi2.lab.replay import replay
    from phi2.lab.verify import verify
    from phi2.lora import attach
    from phi2.lora_config import LoraConfig
    from phi2.losses.batch import AnswerBatch, PairBatch
    from phi2.losses.bound import bind_loss
    from phi2.losses.registry import preference_loss
    from phi2.runs.ledger import Ledger
    from phi2.runs.run import Run
    from phi2.training.api import dpo, sft
    from phi2.training.config import DPOConfig, SFTConfig
    from phi2.training.one_pass import score_rows
    from phi2.training.session import start

__version__ = "0.1.0"
__all__ = [
    "AnswerBatch",
    "ChatSession",
    "Comparison",
    "DPOConfig",
    "Ledger",
    "LoraConfig",
    "PairBatch",
    "Run",
    "SFTConfig",
    "attach",
    "bind_loss",
    "compare",
    "dpo",
    "evaluate",
    "generate",
    "load",
    "load_data",
    "logprobs",
    "preference_loss",
    "replay",
    "sample_pairs",
    "save_adapter",
    "save_pretrained",
    "score_rows",
    "sft",
    "start",
    "stream",
    "verify",
]

_HOMES = {  # where each name lives: it is imported when it is first asked for, and torch with it
    "AnswerBatch": "phi2.losses.batch",
    "ChatSession": "phi2.inference.chat",
    "Comparison": "phi2.lab.comparison",
    "DPOConfig": "phi2.training.config",
    "Ledger": "phi2.runs.ledger",
    "LoraConfig": "phi2.lora_config",
    "PairBatch": "phi2.losses.batch",
    "Run": "phi2.runs.run",
    "SFTConfig": "phi2.training.config",
    "attach": "phi2.lora",
    "bind_loss": "phi2.losses.bound",
    "compare": "phi2.lab.compare",
    "dpo": "phi2.training.api",
    "evaluate": "phi2.evaluation.api",
    "generate": "phi2.inference.generate",
    "load": "phi2.checkpoints.weights",
    "load_data": "phi2.data.load",
    "logprobs": "phi2.inference.logprobs",
    "preference_loss": "phi2.losses.registry",
    "replay": "phi2.lab.replay",
    "sample_pairs": "phi2.answers.pairs",
    "save_adapter": "phi2.checkpoints.peft_files",
    "save_pretrained": "phi2.checkpoints.weights",
    "score_rows": "phi2.training.one_pass",
    "sft": "phi2.training.api",
    "start": "phi2.training.session",
    "stream": "phi2.inference.generate",
    "verify": "phi2.lab.verify",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
