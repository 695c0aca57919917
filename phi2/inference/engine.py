"""The engine under everything that generates: a batch whose rows come and go. Token ids in, token ids out.

A request waits for a free slot of the key-value cache and keeps it until it ends. Each `step` first reads prompts, or
parts of them, packed into one row without pads, and then adds a token to every reply that is under way. What a row says
does not depend on who stands beside it, and neither does what it draws: the seed belongs to the request.

A slot that becomes free keeps what it has read. A request whose prompt begins like what any slot holds copies that much
and reads only the rest; so the next turn of a chat reads only what is new, and the common beginning of many prompts is
read once. This takes no memory beside the slots, whose number and length are fixed when the engine is made.

Dims: V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from phi2.cache import KVCache, PackedPass, StepPass
from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.sampling import Sampler, choose
from phi2.inference.step import RecordedStep, can_record
from phi2.lora import computing
from phi2.model import Phi2ForCausalLM

CACHE_BYTES = 4 * 2**30  # of keys and values, in an engine that is not told how many slots to have
MAX_SLOTS = 64  # likewise
PASS_TOKENS = 2048  # of prompts, read in one pass
WORTH_WAITING = 32  # tokens that another row is about to read, and that a request had better copy than read itself


@dataclass(eq=False)
class Request:
    """A prompt that is to be answered.

    Attributes:
        ids: the prompt; `check_prompt` has passed it.
        params: how to sample, and how many tokens at most; `stop` is for whoever makes text of them.
        stop_ids: a token that ends the reply.
        top_logprobs: how many of the likeliest tokens to report at each place.
        adapter: name of the model's adapter that answers; None: the base alone.
        cached_tokens: of the prompt, those that were not read for this request; known once it has a slot.
        started: when it got its slot, by `perf_counter`.
    """

    ids: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    adapter: str | None = None
    cached_tokens: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)


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


@dataclass
class _Slot:
    """What a slot of the cache is used for.

    Attributes:
        count: tokens that it holds or is about to read.
        adapter: what it has read them with.
        request: who uses it; None when it is free.
        freed: when it became free, counted in steps.
    """

    count: int = 0
    adapter: str | None = None
    request: Request | None = None
    sampler: Sampler | None = None
    freed: int = 0


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

    def __init__(
        self, model: Phi2ForCausalLM, choices: int, slots: int | None = None, max_length: int | None = None
    ) -> None:
        length = max_length or model.config.max_position_embeddings
        slots = slots or default_slots(model, length)
        self._model, self.choices = ref(model), choices
        self.cache = KVCache(model.config, slots, length, model.dtype, model.device)
        self.waiting: deque[Request] = deque()
        self._slots = [_Slot() for _ in range(slots)]
        self._ids = np.zeros((slots, length), dtype=np.int64)  # the tokens of each slot, `count` of them
        self._steps: dict[tuple[int, str | None], RecordedStep] = {}
        self._now = 0

    @property
    def model(self) -> Phi2ForCausalLM:
        model = self._model()
        assert model is not None, "whoever asks an engine holds its model"
        return model

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self._active()

    def add(self, request: Request) -> None:
        """Queues a request."""
        assert 0 < len(request.ids) < self.cache.max_length
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is; of one that has ended already, nothing happens."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot in self._active():
            if self._slots[slot].request is request:
                self._free(slot)

    def forget(self) -> None:
        """Empties the slots that nobody uses, as if the engine were new: their tokens were read with other weights."""
        for number, slot in enumerate(self._slots):
            if slot.request is None:
                self.cache.truncate(number, 0)
                slot.count = slot.freed = 0

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Gives free slots to waiting requests, reads a pass of prompts, and adds a token to every other reply.

        Raises:
            ValueError: when logits are not finite, naming the module where they first are so.
        """
        self._now += 1
        self._admit()
        self._compact()
        unread = {slot: self._slots[slot].count - self.cache.lengths[slot] for slot in self._active()}
        tokens: list[Token] = []
        for adapter in sorted({self._slots[slot].adapter for slot in unread}, key=str):
            own = {slot: n for slot, n in unread.items() if self._slots[slot].adapter == adapter}
            reading = {slot: n for slot, n in own.items() if n > 1}
            replying = [slot for slot, n in own.items() if n == 1]
            with computing(self.model, adapter):
                tokens += self._read(reading) if reading else []
                tokens += self._decode(replying) if replying else []
        return tokens

    def _active(self) -> list[int]:
        return [number for number, slot in enumerate(self._slots) if slot.request is not None]

    # ---- who is in which slot ----

    def _admit(self) -> None:
        """The longest beginning that any slot holds is taken over; one that is just being read is waited for."""
        free = sorted(set(range(len(self._slots))) - set(self._active()), key=lambda n: self._slots[n].freed)
        while self.waiting and free:
            request = self.waiting[0]
            shared = self._shared(np.asarray(request.ids[:-1]), request.adapter)
            held = np.minimum(shared, self.cache.lengths)
            source = int(held.argmax())
            if shared.max() - held[source] >= WORTH_WAITING:
                return
            slot = source if source in free else free[0]
            free.remove(slot)
            self._occupy(slot, self.waiting.popleft(), source, int(held[source]))

    def _shared(self, ids: np.ndarray, adapter: str | None) -> np.ndarray:
        """(slots,), with how many of these tokens each slot's own begin; none if another adapter has read them."""
        counts = np.array([slot.count if slot.adapter == adapter else 0 for slot in self._slots])
        equal = (self._ids[:, : len(ids)] == ids) & (np.arange(len(ids)) < counts[:, None])
        return np.where(equal.all(axis=1), len(ids), (~equal).argmax(axis=1) if len(ids) else 0)

    def _occupy(self, number: int, request: Request, source: int, held: int) -> None:
        if number == source:
            self.cache.truncate(number, held)
        else:
            self.cache.copy(source, number, held)
        slot = self._slots[number]
        slot.request, slot.count, slot.adapter = request, len(request.ids), request.adapter
        self._ids[number, : slot.count] = request.ids
        slot.sampler = Sampler(request.params, request.ids, self.choices, self.model.device)
        request.cached_tokens, request.started = held, perf_counter()

    def _free(self, number: int) -> None:
        slot = self._slots[number]
        slot.request, slot.sampler, slot.freed = None, None, self._now
        slot.count = self.cache.lengths[number]

    def _compact(self) -> None:
        """Brings the slots in use to the front once they are fewer than half of those that a step computes."""
        active = self._active()
        if not active or 2 * len(active) > active[-1] + 1:
            return
        for front, number in enumerate(active):
            if front != number:
                self.cache.swap(front, number)
                self._ids[[front, number]] = self._ids[[number, front]]
                self._slots[front], self._slots[number] = self._slots[number], self._slots[front]

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
        return self._tokens([slots[place] for place in done], logits, counts)

    def _packed(self, counts: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Hidden states (N, C) of the next tokens of some slots, and the place of each slot's last."""
        starts = self.cache.lengths
        ids = np.concatenate([self._ids[slot, starts[slot] : starts[slot] + n] for slot, n in counts.items()])
        cached = PackedPass(self.cache, counts)
        return self.model.model(torch.from_numpy(ids)[None].to(self.model.device), cached=cached)[0], cached.last

    def _decode(self, slots: list[int]) -> list[Token]:
        """One more token of these slots, in a step over all slots up to the last of them."""
        ids = torch.zeros((slots[-1] + 1, 1), dtype=torch.int64)
        ids[slots, 0] = torch.from_numpy(self._ids[slots, [self.cache.lengths[slot] for slot in slots]])
        logits = self._stepped(ids.to(self.model.device), slots)
        return self._tokens(slots, logits if len(slots) == len(logits) else logits[slots], dict.fromkeys(slots, 1))

    def _stepped(self, ids: Tensor, slots: list[int]) -> Tensor:
        """(B, V) float32 logits."""
        if can_record(self.model.device):
            rows = min(len(self._slots), 1 << (len(ids) - 1).bit_length())  # few recordings serve all sizes
            key = rows, self.model.computed_adapter
            if key not in self._steps:
                self._steps[key] = RecordedStep(self.model, self.cache, rows)
            return self._steps[key](self.model, ids, slots)[: len(ids)]
        cached = StepPass(self.cache, len(ids), 1 + max(self.cache.lengths[slot] for slot in slots))
        cached.start(slots)
        return self.model.lm_head(self.model.model(ids, cached=cached)[:, 0]).float()

    # ---- from logits to tokens ----

    def _tokens(self, slots: list[int], logits: Tensor, counts: dict[int, int]) -> list[Token]:
        """Chooses the next token of every slot; `counts` are the tokens of the pass that made the logits."""
        samplers = [sampler for slot in slots if (sampler := self._slots[slot].sampler) is not None]
        chosen = choose(logits, samplers)
        lse, finite = logits.logsumexp(dim=-1), logits.isfinite().all(dim=-1)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - lse
        numbers = torch.stack((chosen, logprobs, finite), dim=1).tolist()  # float32 holds ids; one wait for the device
        if not all(finite for _, _, finite in numbers):
            raise ValueError(f"non-finite logits; first in {self._nonfinite_module(counts)} ({self.model.dtype})")
        tops = self._tops(slots, logits, lse)
        return [self._said(slot, int(n[0]), n[1], top) for slot, n, top in zip(slots, numbers, tops, strict=True)]

    def _tops(self, slots: list[int], logits: Tensor, lse: Tensor) -> list[tuple[tuple[int, float], ...]]:
        wanted = [request.top_logprobs for slot in slots if (request := self._slots[slot].request) is not None]
        if not any(wanted):
            return [()] * len(slots)
        values, ids = logits.topk(max(wanted))  # (B, k) twice
        rows = zip(ids.tolist(), (values - lse[:, None]).tolist(), wanted, strict=True)
        return [tuple(zip(ids[:n], values[:n], strict=True)) for ids, values, n in rows]

    def _said(self, number: int, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Token:
        slot = self._slots[number]
        request = slot.request
        assert request is not None
        self._ids[number, slot.count] = token_id
        slot.count += 1
        if token_id in request.stop_ids:
            finish_reason: str | None = "stop"
        elif slot.count - len(request.ids) == request.params.max_new_tokens or slot.count == self.cache.max_length:
            finish_reason = "length"
        else:
            finish_reason = None
        if finish_reason:
            self._free(number)
        return Token(request, token_id, logprob, finish_reason, top)

    def _nonfinite_module(self, counts: dict[int, int]) -> str:
        """Repeats the last pass and names the first module whose output is not finite."""
        for slot, n in counts.items():
            self.cache.truncate(slot, self.cache.lengths[slot] - n)
        return first_nonfinite_module(self.model, lambda: self.model.lm_head(self._packed(counts)[0]))


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
