"""What a single token is called: its text, its bytes, and a name that no other token has."""

from __future__ import annotations

from phi2.tokenizer import Tokenizer


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Bytes that can be seen stand for themselves, the others are moved behind 255 in their order.
    Source: openai/gpt-2, encoder.py.
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(moved)}


class TokenNames:
    """The names of a vocabulary's tokens, and of the ids beyond it that a model can rank but not say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend, self._alphabet = tokenizer.backend, byte_alphabet()
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}

    def bytes(self, token_id: int) -> bytes | None:
        """What the token adds to a text; None for an id without a token."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return None if token is None else bytes(self._alphabet[character] for character in token)

    def text(self, token_id: int) -> str:
        """Its text; that of a part of a character is U+FFFD."""
        content = self.bytes(token_id)
        return _nameless(token_id) if content is None else content.decode(errors="replace")

    def unique(self, token_id: int) -> str:
        """Its text; a part of a character is told by its bytes, as OpenAI does: `bytes:\\xe2\\x80`."""
        content = self.bytes(token_id)
        if content is None:
            return _nameless(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _nameless(token_id: int) -> str:
    return f"token_id:{token_id}"
