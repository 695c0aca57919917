"""Which request is in which slot of the key-value cache, and what each slot has read.

A slot that becomes free keeps what it has read. A request whose prompt begins like what any slot holds copies that much
and reads only the rest; so the next turn of a chat reads only what is new, and the common beginning of many prompts is
read once. This takes no memory beside the slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from phi2.cache import KVCache
from phi2.inference.config import SamplingParams
from phi2.inference.rows import Rows

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


@dataclass
class Slot:
    """What a slot of the cache is used for.

    Attributes:
        count: tokens that it holds or is about to read.
        adapter: what it has read them with.
        request: who uses it; None when it is free.
        freed: how many were freed before it.
    """

    count: int = 0
    adapter: str | None = None
    request: Request | None = None
    freed: int = 0


class Slots:
    """Every slot of a cache.

    Args:
        choices: as in `Rows`.

    Attributes:
        rows: how each slot goes on.
        ids: (slots, S), the tokens of each slot, `count` of them.
    """

    def __init__(self, cache: KVCache, choices: int) -> None:
        number, length = len(cache.lengths), cache.max_length
        self.cache, self.rows = cache, Rows(number, length, choices, cache.keys.device)
        self.ids = np.zeros((number, length), dtype=np.int64)
        self._slots = [Slot() for _ in range(number)]
        self._freed = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def active(self) -> list[int]:
        """Those that are in use."""
        return [number for number, slot in enumerate(self._slots) if slot.request is not None]

    def requests(self, numbers: Iterable[int]) -> dict[int, Request]:
        """Who uses each of some slots."""
        return {number: request for number in numbers if (request := self._slots[number].request) is not None}

    def admit(self, waiting: deque[Request]) -> None:
        """Gives free slots to those who have waited longest.

        The longest beginning that any slot holds is taken over; one that is just being read is waited for.
        """
        free = sorted(set(range(len(self))) - set(self.active()), key=lambda number: self._slots[number].freed)
        while waiting and free:
            request = waiting[0]
            shared = self._shared(np.asarray(request.ids[:-1]), request.adapter)
            held = np.minimum(shared, self.cache.lengths)
            source = int(held.argmax())
            if shared.max() - held[source] >= WORTH_WAITING:
                return
            number = source if source in free else free[0]
            free.remove(number)
            self._occupy(number, waiting.popleft(), source, int(held[source]))

    def _shared(self, ids: np.ndarray, adapter: str | None) -> np.ndarray:
        """(slots,), with how many of these tokens each slot's own begin; none if another adapter has read them."""
        counts = np.array([slot.count if slot.adapter == adapter else 0 for slot in self._slots])
        equal = (self.ids[:, : len(ids)] == ids) & (np.arange(len(ids)) < counts[:, None])
        return np.where(equal.all(axis=1), len(ids), (~equal).argmax(axis=1) if len(ids) else 0)

    def _occupy(self, number: int, request: Request, source: int, held: int) -> None:
        if number == source:
            self.cache.truncate(number, held)
        else:
            self.cache.copy(source, number, held)
        slot = self._slots[number]
        slot.request, slot.count, slot.adapter = request, len(request.ids), request.adapter
        self.ids[number, : slot.count] = request.ids
        self.rows.occupy(number, request.params, request.ids)
        request.cached_tokens, request.started = held, perf_counter()

    def free(self, number: int) -> None:
        """Its request has ended; it keeps what it has read."""
        slot = self._slots[number]
        self._freed += 1
        slot.request, slot.freed = None, self._freed
        slot.count = self.cache.lengths[number]

    def forget(self) -> None:
        """Empties those that nobody uses, as if they were new."""
        for number, slot in enumerate(self._slots):
            if slot.request is None:
                self.cache.truncate(number, 0)
                slot.count = slot.freed = 0

    def compact(self) -> None:
        """Brings the slots in use to the front where too many others lie between them."""
        active = self.active()
        if not is_sparse(active):
            return
        for front, number in enumerate(active):
            if front != number:
                self.cache.swap(front, number)
                self.rows.swap(front, number)
                self.ids[[front, number]] = self.ids[[number, front]]
                self._slots[front], self._slots[number] = self._slots[number], self._slots[front]


def is_sparse(slots: list[int]) -> bool:
    """Whether a step, which computes all slots up to the last, has at least as many others to compute as these."""
    return bool(slots) and 2 * len(slots) <= slots[-1] + 1
