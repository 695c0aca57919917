"""The engine under everything that generates: a batch whose rows come and go. Token ids in, token ids out.

A request waits for a free slot of the key-value cache and keeps it until it ends (`slots.py`). Each `step` first reads
prompts, or parts of them, packed into one row without pads, and then adds a token to every reply that is under way.
What a row says and draws does not depend on who stands beside it: the seed belongs to the request.

A GPU is kept busy: where nothing that the host has yet to see can change who is computed next, the next step is
launched before the last one's tokens are read. What it computes for a reply that those tokens end is thrown away; the
host counts a token, in the cache too, only when it has read it.

Dims: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from phi2.arriving import Arriving
from phi2.cache import KVCache, PackedPass, StepPass
from phi2.called import must_be_called
from phi2.config import Phi2Config
from phi2.inference.sampling import Stages, told
from phi2.inference.slots import Request, Slots, is_sparse
from phi2.inference.step import RecordedStep, can_record
from phi2.lora import computing
from phi2.model import Phi2ForCausalLM

CACHE_BYTES = 4 * 2**30  # of keys and values, in an engine that is not told how many slots to have
MAX_SLOTS = 64  # likewise
PASS_TOKENS = 2048  # of prompts, read in one pass
MAX_STEPS = 32  # recorded, each with the memory of its logits and choices


class Token(NamedTuple):
    """One more token of a reply.

    Attributes:
        logprob: in nats under the model's own distribution over all V ids: float32, before penalties, temperature and
            truncation.
        finish_reason: None until the last, then "stop" or "length".
        top: the likeliest ids with their log-probs, largest first.
    """

    request: Request
    token_id: int
    logprob: float
    finish_reason: str | None
    top: tuple[tuple[int, float], ...]


class _Flight(NamedTuple):
    """A recorded step whose tokens the host has not read.

    Attributes:
        requests: who gets one, by slot.
        told: (B, 3), see `told`.
        logits: (B, V) float32, until the next step.
    """

    requests: dict[int, Request]
    told: Arriving
    logits: Tensor


class Engine:
    """Answers requests on one model, whose weights must stay as they are while slots hold tokens (else `forget`).

    Args:
        model: in evaluation mode. An engine does not keep it alive.
        choices: V, the ids that may be said: a model may have more logits than its tokenizer has tokens.
        slots: requests that are answered side by side; default: what fits into `CACHE_BYTES`, `MAX_SLOTS` at most.
        max_length: tokens that prompt and reply may have together; default: the model's context.

    Attributes:
        waiting: requests that have no slot yet.
    """

    @torch.inference_mode(False)  # what it keeps must serve callers of any mode
    def __init__(
        self, model: Phi2ForCausalLM, choices: int, slots: int | None = None, max_length: int | None = None
    ) -> None:
        length = max_length or model.config.max_position_embeddings
        slots = slots or default_slots(model, length)
        self._model, self.choices = ref(model), choices
        self.cache = KVCache(model.config, slots, length, model.dtype, model.device)
        self.waiting: deque[Request] = deque()
        self._slots = Slots(self.cache, choices)
        self._records = False  # whether decode steps are
        self._steps: dict[tuple[int, str | None, Stages], RecordedStep] = {}
        self._flight: _Flight | None = None
        self._expected: tuple[dict[int, Request], dict[int, int]] | None = None  # who the next step finds, and where

    @property
    def model(self) -> Phi2ForCausalLM:
        model = self._model()
        assert model is not None, "whoever asks an engine holds its model"
        return model

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self._slots.active()

    def add(self, request: Request) -> None:
        """Queues a request."""
        assert 0 < len(request.ids) < self.cache.max_length
        if self.is_idle:  # a replay calls no module
            self._records = can_record(self.model.device) and not must_be_called(self.model.modules())
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is; of one that has ended already, nothing happens."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot in self._slots.active():
            if self._slots[slot].request is request:
                self._slots.free(slot)

    def forget(self) -> None:
        """Empties the slots that nobody uses, as if the engine were new: their tokens were read with other weights."""
        self._slots.forget()

    @torch.inference_mode(False)  # outermost, since it switches gradients on
    @torch.no_grad()
    def step(self) -> list[Token]:
        """Gives free slots to waiting requests, reads a pass of prompts, and adds a token to every other reply.

        While a step is under way that was launched ahead, nobody gets a slot.

        Raises:
            ValueError: when logits are not finite, naming the module where they first are so.
        """
        if self._flight is None or not self._passengers(self._flight):
            self._flight = None
            self._slots.admit(self.waiting)
            self._slots.compact()
        unread = {slot: self._slots[slot].count - self.cache.lengths[slot] for slot in self._slots.active()}
        tokens: list[Token] = []
        for adapter in sorted({self._slots[slot].adapter for slot in unread}, key=str):
            own = {slot: n for slot, n in unread.items() if self._slots[slot].adapter == adapter}
            reading = {slot: n for slot, n in own.items() if n > 1}
            replying = [slot for slot, n in own.items() if n == 1]
            with computing(self.model, adapter):
                tokens += self._read(reading) if reading else []
                tokens += self._decode(replying) if replying else []
        return tokens

    # ---- the two kinds of passes ----

    def _read(self, unread: dict[int, int]) -> list[Token]:
        """One pass over at most `PASS_TOKENS` of what the slots have not read; the first token of those that end."""
        counts, room = {}, PASS_TOKENS
        for slot, n in unread.items():
            if room:
                counts[slot] = min(n, room)
                room -= counts[slot]
        hidden, last = self._packed(counts)
        done = [place for place, (slot, n) in enumerate(counts.items()) if n == unread[slot]]
        if not done:
            return []
        logits = self.model.lm_head(hidden[last[done]]).float()
        slots = list(counts)
        return self._choose([slots[place] for place in done], logits, counts)

    def _packed(self, counts: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Hidden states (N, C) of the next tokens of some slots, and the place of each slot's last."""
        starts = self.cache.lengths
        ids = np.concatenate([self._slots.ids[slot, starts[slot] : starts[slot] + n] for slot, n in counts.items()])
        cached = PackedPass(self.cache, counts)
        return self.model.model(torch.from_numpy(ids)[None].to(self.model.device), cached=cached)[0], cached.last

    def _decode(self, slots: list[int]) -> list[Token]:
        """One more token of these slots, in a step over all slots up to the last of them."""
        if self._records:
            return self._decode_ahead(slots)
        places = [self.cache.lengths[slot] for slot in slots]
        ids = torch.zeros((slots[-1] + 1, 1), dtype=torch.int64)
        ids[slots, 0] = torch.from_numpy(self._slots.ids[slots, places])
        cached = StepPass(self.cache, len(ids), 1 + max(places))
        cached.start(slots)
        logits = self.model.lm_head(self.model.model(ids.to(self.model.device), cached=cached)[:, 0]).float()
        return self._choose(slots, logits if len(slots) == len(logits) else logits[slots], dict.fromkeys(slots, 1))

    def _choose(self, slots: list[int], logits: Tensor, counts: dict[int, int]) -> list[Token]:
        """The next token of each of these slots from its logits; `counts` are the tokens of the pass that made them."""
        places = torch.tensor([self._slots[slot].count for slot in slots]).to(logits.device)
        chosen = self._slots.rows.choose_apart(logits, slots, places)
        return self._tokens(slots, told(logits, chosen).tolist(), logits, counts)

    # ---- recorded steps, one of them ahead of what has been read ----

    def _decode_ahead(self, slots: list[int]) -> list[Token]:
        """The tokens of the step that is under way, or else of a new one; before they are read, the next one starts."""
        self._flight = flight = self._flight or self._launch(slots)
        following = self._following(slots)
        self._flight = self._launch(following, ahead=1) if following else None
        return self._land(flight)

    def _launch(self, slots: list[int], ahead: int = 0) -> _Flight:
        """Starts a step of these slots; one that is ahead (1) reads ids which the device alone knows yet."""
        requests = self._slots.requests(slots)
        places = {slot: self.cache.lengths[slot] + ahead for slot in slots}
        expected, self._expected = self._expected, None
        if expected != (requests, places):
            ids = None if ahead else {slot: self._slots.ids[slot, place] for slot, place in places.items()}
            self._slots.rows.activate(places, ids)
        step = self._recorded(slots[-1] + 1, self._slots.rows.stages(slots))
        numbers = step(self.model)
        self._expected = requests, {slot: place + 1 for slot, place in places.items()}
        return _Flight(requests, numbers, step.logits)

    def _recorded(self, rows: int, stages: Stages) -> RecordedStep:
        """The step of so many rows; of all those that there may be the `MAX_STEPS` that were used last are kept."""
        rows = min(len(self._slots), 1 << (rows - 1).bit_length())  # few recordings serve all sizes
        key = rows, self.model.computed_adapter, stages
        step = self._steps.pop(key, None) or RecordedStep(self.model, self.cache, self._slots.rows, rows, stages)
        self._steps[key] = step  # in the order of use
        if len(self._steps) > MAX_STEPS:
            del self._steps[next(iter(self._steps))]
        return step

    def _following(self, slots: list[int]) -> list[int]:
        """Who says another token after the one under way; nobody where the host has something else to do before."""
        going = [slot for slot in slots if not self._ends(slot, unread=1)]
        others_compute, admits = slots != self._slots.active(), self.waiting and len(going) < len(self._slots)
        if others_compute or admits or is_sparse(going) or self._most_tops(slots):
            return []
        return going

    def _passengers(self, flight: _Flight) -> list[int]:
        """The slots of those requests that have not been cancelled meanwhile."""
        return [slot for slot, request in flight.requests.items() if self._slots[slot].request is request]

    def _land(self, flight: _Flight) -> list[Token]:
        slots, numbers = self._passengers(flight), flight.told.wait()
        for slot in slots:
            self.cache.lengths[slot] += 1
        logits = flight.logits[slots] if self._most_tops(slots) else None
        return self._tokens(slots, [numbers[slot] for slot in slots], logits, dict.fromkeys(slots, 1))

    # ---- from numbers to tokens ----

    def _tokens(
        self, slots: list[int], numbers: list[list[float]], logits: Tensor | None, counts: dict[int, int]
    ) -> list[Token]:
        """What `told` tells of each slot, as tokens; logits are needed where the likeliest are to be reported."""
        if not all(finite for _, _, finite in numbers):
            self._refuse(counts)
        tops = self._tops(slots, logits)
        return [self._said(slot, int(n[0]), n[1], top) for slot, n, top in zip(slots, numbers, tops, strict=True)]

    def _most_tops(self, slots: list[int]) -> int:
        return max(request.top_logprobs for request in self._slots.requests(slots).values())

    def _tops(self, slots: list[int], logits: Tensor | None) -> list[tuple[tuple[int, float], ...]]:
        most = self._most_tops(slots)
        if logits is None or not most:
            return [()] * len(slots)
        values, ids = logits.log_softmax(dim=-1).topk(most)  # (B, k) twice
        wanted = [request.top_logprobs for request in self._slots.requests(slots).values()]
        rows = zip(ids.tolist(), values.tolist(), wanted, strict=True)
        return [tuple(zip(ids[:n], values[:n], strict=True)) for ids, values, n in rows]

    def _said(self, number: int, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Token:
        slot = self._slots[number]
        request = slot.request
        assert request is not None
        self._slots.ids[number, slot.count] = token_id
        slot.count += 1
        stops = token_id in request.stop_ids
        finish_reason = "stop" if stops else "length" if self._ends(number) else None
        if finish_reason:
            self._slots.free(number)
        return Token(request, token_id, logprob, finish_reason, top)

    def _ends(self, number: int, unread: int = 0) -> bool:
        """Whether a reply that has so many more tokens than the host has read has all that it may have."""
        slot = self._slots[number]
        assert slot.request is not None
        count = slot.count + unread
        return count - len(slot.request.ids) == slot.request.params.max_new_tokens or count == self.cache.max_length

    def _refuse(self, counts: dict[int, int]) -> NoReturn:
        """Repeats the last pass to name the module; what that pass did, and a step ahead of it, is forgotten."""
        starts = {slot: self.cache.lengths[slot] - n for slot, n in counts.items()}
        self._flight = None
        self._rewind(starts)
        module = first_nonfinite_module(self.model, lambda: self.model.lm_head(self._packed(counts)[0]))
        self._rewind(starts)
        self.cache.clear_ends()
        raise ValueError(f"non-finite logits; first in {module} ({self.model.dtype})")

    def _rewind(self, lengths: dict[int, int]) -> None:
        for slot, length in lengths.items():
            self.cache.truncate(slot, length)


def default_slots(model: Phi2ForCausalLM, length: int) -> int:
    """As many slots of so many tokens as `CACHE_BYTES` holds, `MAX_SLOTS` at most, one at least."""
    config: Phi2Config = model.config
    token = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * model.dtype.itemsize
    return max(1, min(MAX_SLOTS, CACHE_BYTES // (token * length)))


def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> str:
    """Calls `run` and names the first module of `model` that returned something that is not finite."""
    found = []

    def watch(name: str):
        def hook(module, inputs, output):
            if not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no module when the pass was repeated"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, and afterwards every module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
