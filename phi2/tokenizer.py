"""Text to token ids and back, and a conversation to the one string the model was trained on.

Byte-pair encoding itself is the `tokenizers` library reading `tokenizer.json`. What is added here is the little that
decides whether a Phi behaves: which ids end a reply, the chat template, what a person typed against what the template
wrote, and text that streams out in whole characters. Phi-2's vocabulary is GPT-2's 50257 entries and 38 runs of spaces
and tabs; ChatML adds two more at the next free ids.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import tokenizers

from phi2.text.special_text import SpecialText
from phi2.text.stream_decoder import StreamDecoder
from phi2.text.template_choice import TEMPLATE_CHOICES, read_template_file, require_template_choice
from phi2.text.tokenizer_files import (
    read_backend,
    read_config,
    read_stop_ids,
    read_template,
    special_tokens,
    unnamed_special_tokens,
    write_stop_ids,
    write_tokenizer,
)
from phi2.text.words import WordEncoder

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT_STYLES = ("raw", "instruct", "chatml", "chat")


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Args:
        backend: the loaded `tokenizer.json`. Truncation and padding that were saved in it are switched off.
        config: `tokenizer_config.json`; special tokens are strings or `{"content": ...}`. Without an `eos_token`,
            `<|endoftext|>` ends a text; without a `pad_token`, the end token pads.
        chat_template: jinja source; None takes ChatML when the vocabulary has its two tokens.
        where: what error messages call this tokenizer.
        stop_ids: ids that end a text besides the tokenizer's own, such as those a checkpoint's `generation_config.json`
            lists.

    Raises:
        ValueError: when a special token is not in the vocabulary, or nothing ends a text.
    """

    eos_id: int
    bos_id: int | None
    pad_id: int
    chat_template: str | None
    template_origin: str  # where the template comes from, in words

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | None = None,
        where: str = "tokenizer",
        stop_ids: Iterable[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._config = dict(config)
        self._length = 1 + max(backend.get_vocab().values(), default=-1)
        self._special = {"eos_token": END_OF_TEXT, **special_tokens(config, where)}
        self.bos_id = self._special_id("bos_token", where) if "bos_token" in self._special else None
        self.eos_id = self._special_id("eos_token", where)
        self.pad_id = self._special_id("pad_token", where) if "pad_token" in self._special else self.eos_id
        ends = (self.eos_id, self.token_id(END_OF_TEXT), self.token_id(IM_END), *stop_ids)
        self._stop_ids = frozenset(token_id for token_id in ends if token_id is not None)
        has_chatml = None not in (self.token_id(IM_START), self.token_id(IM_END))
        self.chat_template = chat_template or (CHATML_TEMPLATE if has_chatml else None)
        self.template_origin = "the model's own" if chat_template else "ChatML" if has_chatml else "none"

    def _special_id(self, name: str, where: str) -> int:
        token_id = self.token_id(self._special[name])
        if token_id is None:
            raise ValueError(f"{where}: {name} {self._special[name]!r} is not in the vocabulary")
        return token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`, and where they are the files that say more about it.

        These are `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`; and, for the ids that
        end a text, `generation_config.json` and `config.json`.

        Raises:
            FileNotFoundError: without a `tokenizer.json`.
            ValueError: when a file is damaged; the message names it.
        """
        folder = Path(folder)
        backend = read_backend(folder)
        config = read_config(folder, backend)
        chat_template = read_template(folder, config)
        size = 1 + max(backend.get_vocab().values(), default=-1)
        stop_ids = read_stop_ids(folder, size)
        return cls(backend, config, chat_template, where=str(folder / "tokenizer_config.json"), stop_ids=stop_ids)

    def __len__(self) -> int:
        return self._length

    @property
    def stop_ids(self) -> frozenset[int]:
        """Any of these ends a reply: the end tokens, the ids the checkpoint lists, and what ends a turn in a chat."""
        return self._stop_ids if self.turn_end_id is None else self._stop_ids | {self.turn_end_id}

    @property
    def turn_end_id(self) -> int | None:
        """The token that the chat template puts behind the assistant's words, if it is one."""
        return _turn_end(self, self.chat_template)

    @property
    def prompt_style(self) -> str:
        """The style of `render_prompt` that this model knows: "chatml", "chat" (another template) or "instruct"."""
        if self.chat_template is None:
            return "instruct"
        return "chatml" if IM_START in self.chat_template else "chat"

    @property
    def special_text(self) -> SpecialText:
        """What marks and encodes text that spells a special token and is to stay text."""
        return _special_text(self, self.chat_template)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what a text becomes: vocabulary, special tokens, template, what ends a text."""
        told = [self._config, self._special, self.chat_template, sorted(self.stop_ids)]
        return hashlib.sha256(f"{self.backend.to_str()}{json.dumps(told, sort_keys=True)}".encode()).hexdigest()

    @property
    def words(self) -> WordEncoder:
        """What encodes many texts."""
        return _words(self.backend)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else; special tokens written in it become their one id.

        Raises:
            ValueError: when `text` is not a string that UTF-8 can hold (a lone surrogate).
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"text must be a str without lone surrogates, got {short_repr(text)}") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with no clean-up of spaces; ids past the vocabulary are empty, broken UTF-8 is U+FFFD.

        Raises:
            ValueError: for a negative id, such as a label mask.
        """
        ids = [int(token_id) for token_id in ids]
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise ValueError(f"token ids must be in [0, 2**32), got {min(ids)} to {max(ids)}") from error

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        return StreamDecoder(self.backend, skip_special_tokens)

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The chat template applied to `messages`, each `{"role": ..., "content": ...}` and any further keys.

        Args:
            messages: `content` may be None or missing beside `tool_calls`.
            variables: further names for the template; they win over the special tokens.

        Raises:
            ValueError: without a template, for a malformed message, or when the template itself fails.
        """
        return self.render_with_spans(messages, add_generation_prompt, tools=tools, documents=documents, **variables)[0]

    def render_with_spans(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """What `render` gives, and the ranges of its characters that the template marks by `{% generation %}`.

        Raises:
            ValueError: as `render`.
        """
        from phi2.text import template  # here and below: jinja2 is loaded for those who render

        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template; use prompt style 'raw' or 'instruct', or with_chatml()"
            )
        unnamed = unnamed_special_tokens(self._config)
        special = self._special | ({"additional_special_tokens": unnamed} if unnamed else {})
        given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return template.render(self.chat_template, messages, **{**special, **given, **variables})

    def template_uses(self, name: str) -> bool:
        """Whether the chat template reads a variable, a message's key or an attribute of this name.

        Raises:
            ValueError: for a template that is not one.
        """
        from phi2.text import template

        return self.chat_template is not None and template.uses(self.chat_template, name)

    def encode_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of the rendered conversation; a special token that a message spells stays text.

        Raises:
            ValueError: as `render`, and when the template changes a message so that this text cannot be found again.
        """

        def rendered(messages: Any, tools: Any, documents: Any) -> str:
            return self.render(messages, add_generation_prompt, tools=tools, documents=documents, **variables)

        given = [list(messages), tools, documents]
        text, spelled = rendered(*given), self.special_text.find(given)
        if spelled is None:
            return self.encode(text)
        marked = rendered(*self.special_text.mark(given))
        if self.special_text.unmark(marked) != text:
            raise ValueError(f"a message spells {spelled!r}, which the chat template changes: it cannot stay text")
        return self.special_text.encode(marked).ids

    def encode_prompt(self, prompt: str, style: str) -> list[int]:
        """The ids of `render_prompt`; a special token that the prompt spells stays text, unless the style is raw.

        Raises:
            ValueError: as `render_prompt`.
        """
        text = self.render_prompt(prompt, style)
        if style in ("chatml", "chat"):
            return self.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        if style == "raw" or self.special_text.find(text) is None:
            return self.encode(text)
        return self.special_text.encode(self.special_text.mark(text)).ids

    def render_prompt(self, prompt: str, style: str) -> str:
        """One prompt as the model expects it: as it is, as Phi-2's "Instruct/Output" form, or as a chat turn.

        Raises:
            ValueError: for a style that is not one of `PROMPT_STYLES`, or not this tokenizer's.
        """
        if style not in PROMPT_STYLES:
            raise ValueError(f"prompt style must be one of {', '.join(PROMPT_STYLES)}, got {style!r}")
        if style == "chatml" and self.prompt_style == "chat":
            raise ValueError("prompt style 'chatml' is not this tokenizer's: it has a chat template of its own, 'chat'")
        if style in ("chatml", "chat"):
            return self.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return prompt if style == "raw" else f"Instruct: {prompt}\nOutput:"

    def with_chat_template(self, choice: str) -> Tokenizer:
        """The tokenizer that a run's setting `chat_template` asks for.

        Args:
            choice: "auto" keeps the model's own template and gives ChatML to a base model without one; "chatml" puts
                ChatML in its place; "none" leaves a base model without; else the path of a .jinja file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: for another choice, or a file that is no template.
        """
        require_template_choice(choice)
        if choice == "none" and self.chat_template is not None:
            raise ValueError("chat_template none is for a tokenizer without one, and this one brings one: use auto")
        if choice == "none" or (choice == "auto" and self.chat_template is not None):
            return self
        if choice == "chatml" and self.chat_template == CHATML_TEMPLATE:
            return self
        changed = self.with_chatml() if choice in TEMPLATE_CHOICES else self._with_template_file(Path(choice))
        replaced = "given to a base model without one" if self.chat_template is None else "in place of the model's own"
        changed.template_origin = f"{changed.template_origin}, {replaced}"
        return changed

    def _with_template_file(self, path: Path) -> Tokenizer:
        source, spelled = read_template_file(path)
        changed = Tokenizer(self.backend, self._config, source, str(path), self._stop_ids)
        changed.template_origin = str(path)
        for token in spelled:
            if self.token_id(token) is None:
                warnings.warn(
                    f"{path} writes {token!r}, which is no token of this vocabulary: the model reads it as"
                    f" {len(self.encode(token))} tokens of text",
                    stacklevel=3,
                )
        return changed

    def with_stop_ids(self, stop_ids: Iterable[int]) -> Tokenizer:
        """A copy that ends a reply at these ids too."""
        copy = Tokenizer(self.backend, self._config, self.chat_template, stop_ids=self._stop_ids.union(stop_ids))
        copy.template_origin = self.template_origin
        return copy

    def with_chatml(self) -> Tokenizer:
        """A copy that speaks ChatML: `<|im_start|>` opens a turn, `<|im_end|>` ends it and pads, at the next free ids.

        No weight is resized: Phi-2's embedding has 51200 rows, of which 50295 are used.
        """
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([IM_START, IM_END])
        config = {**self._config, "bos_token": IM_START, "eos_token": IM_END, "pad_token": IM_END}
        tokenizer = Tokenizer(backend, config, CHATML_TEMPLATE, stop_ids=self._stop_ids)
        tokenizer.template_origin = "ChatML"
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes the files `from_folder` and transformers' AutoTokenizer read, each whole or not at all.

        The template is written twice: transformers 5 looks for `chat_template.jinja`, early 4.x in the config. Ids that
        end a text and that no file of a tokenizer can tell stand in `generation_config.json`, whose other keys stay.
        """
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self._special}
        write_tokenizer(folder, self.backend, config, self.chat_template)
        told = {self.eos_id, self.token_id(END_OF_TEXT), self.token_id(IM_END)}
        if not self.stop_ids <= told or (folder / "generation_config.json").exists():
            write_stop_ids(folder, sorted(token_id for token_id in self.stop_ids if token_id < len(self)))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: Tokenizer, chat_template: str | None) -> int | None:
    """The token that a template puts behind the assistant's words, if it is one."""
    if chat_template is None:
        return None
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        _, found, rest = tokenizer.render([question, answer]).rpartition("answer")
    except ValueError:  # it wants another conversation; rendering one says what is wrong
        return None
    end = _added_token(tokenizer).match(rest.lstrip()) if found else None
    return tokenizer.token_id(end[0]) if end else None


def _added_token(tokenizer: Tokenizer) -> re.Pattern:
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    visible = sorted((text for text in added if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, visible)) or "(?!)")


@lru_cache(maxsize=2)
def _words(backend: tokenizers.Tokenizer) -> WordEncoder:
    return WordEncoder(backend)


@lru_cache(maxsize=8)
def _special_text(tokenizer: Tokenizer, chat_template: str | None) -> SpecialText:
    """Knows the special tokens, and what else of the added ones ends a text or is written by the template."""
    from phi2.text import template

    written = "" if chat_template is None else template.literals(chat_template)
    added = tokenizer.backend.get_added_tokens_decoder().items()
    tokens = [
        token.content
        for token_id, token in added
        if token.special or (token.content.strip() and (token.content in written or token_id in tokenizer.stop_ids))
    ]
    return SpecialText(tokenizer.backend, tokens)
