"""Text that streams out of ids in whole characters."""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import DecodeStream


class StreamDecoder:
    """Turns ids that arrive one at a time into text that never ends inside a character.

    The pieces of `step` and the one of `flush`, joined, are what `decode` makes of all the ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self.backend, self._skip = backend, skip_special_tokens
        self._restart()

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        self._held: list[int] = []  # ids since the last text that came out

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is still missing bytes."""
        self._held.append(token_id)
        text = self._stream.step(self.backend, token_id)
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is still held, an unfinished character as U+FFFD; the decoder then starts afresh."""
        text = self.backend.decode(self._held, skip_special_tokens=self._skip)
        self._restart()
        return text
