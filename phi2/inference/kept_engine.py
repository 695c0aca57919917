"""The engine of a model's last replies, kept on a GPU for its next ones: its steps are recorded already.

Nothing is kept of what it has read, and nothing of a model whose weights have moved.
"""

from __future__ import annotations

from itertools import chain
from weakref import WeakKeyDictionary

from phi2.inference.engine import Engine, default_slots
from phi2.inference.step import can_record
from phi2.lora import LoraLinear
from phi2.model import Phi2ForCausalLM

LENGTH_STEP = 256  # tokens; engines are made for a multiple, so that the next prompts fit too

_kept: WeakKeyDictionary[Phi2ForCausalLM, tuple[Engine, tuple[int, ...]]] = WeakKeyDictionary()


def kept_engine(model: Phi2ForCausalLM, choices: int, requests: int, length: int) -> Engine:
    """An idle engine for so many requests, each of so many tokens at most, prompt and reply.

    Args:
        choices: as in `Engine`.
    """
    if not can_record(model.device):
        return Engine(model, choices, min(requests, default_slots(model, length)), length)
    length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, model.config.max_position_embeddings)
    slots = min(requests, default_slots(model, length))
    engine, state = _kept.get(model, (None, ()))
    if engine is None or state != _state(model) or not _serves(engine, choices, slots, length):
        engine = Engine(model, choices, slots, length)
        _kept[model] = engine, _state(model)
    engine.forget()  # the weights may have been trained meanwhile
    return engine


def release_engine(model: Phi2ForCausalLM) -> None:
    """Gives its memory back."""
    _kept.pop(model, None)


def _serves(engine: Engine, choices: int, slots: int, length: int) -> bool:
    cache = engine.cache
    return engine.is_idle and engine.choices == choices and len(cache.lengths) >= slots and cache.max_length >= length


def _state(model: Phi2ForCausalLM) -> tuple[int, ...]:
    """Where a recorded step reads: the addresses of all weights, and which adapters are computed."""
    weights = (tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    adapters = (id(module.adapter) for module in model.modules() if isinstance(module, LoraLinear))
    return *weights, *adapters
