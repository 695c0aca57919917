"""Text to token ids and back, and a conversation to the one string the model was trained on.

Byte-pair encoding itself is the `tokenizers` library reading `tokenizer.json`. What is added here is the little that
decides whether a Phi behaves: which id ends a reply, the chat template, and text that streams out in whole characters.
Phi-2's vocabulary is GPT-2's 50257 entries and 38 runs of spaces and tabs; ChatML adds two more at the next free ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from phi2.hub import one_line, read_json

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT_STYLES = ("raw", "instruct", "chatml")


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Args:
        backend: the loaded `tokenizer.json`. Truncation and padding that were saved in it are switched off.
        config: `tokenizer_config.json`; special tokens are strings or `{"content": ...}`. Without an `eos_token`,
            `<|endoftext|>` ends a text; without a `pad_token`, the end token pads.
        chat_template: jinja source; None takes ChatML when the vocabulary has its two tokens.
        where: what error messages call this tokenizer.

    Raises:
        ValueError: when a special token is not in the vocabulary, or nothing ends a text.
    """

    eos_id: int
    bos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]  # any of them ends a reply
    chat_template: str | None
    prompt_style: str  # the style of `render_prompt` this model was trained on: "chatml" or "instruct"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | None = None,
        where: str = "tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._config = dict(config)
        self._length = 1 + max(backend.get_vocab().values(), default=-1)
        self._special = _special_tokens(config, where)
        ids = {}
        for name, token in self._special.items():
            ids[name] = self.token_id(token)
            if ids[name] is None:
                raise ValueError(f"{where}: {name} {token!r} is not in the vocabulary")
        self.eos_id, self.bos_id = ids["eos_token"], ids.get("bos_token")
        self.pad_id = ids.get("pad_token", self.eos_id)
        self.stop_ids = frozenset({self.eos_id, self.token_id(END_OF_TEXT), self.token_id(IM_END)} - {None})
        self.prompt_style = "instruct" if None in (self.token_id(IM_START), self.token_id(IM_END)) else "chatml"
        self.chat_template = chat_template or (CHATML_TEMPLATE if self.prompt_style == "chatml" else None)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they are.

        Raises:
            FileNotFoundError: without a `tokenizer.json`.
            ValueError: when a file is damaged; the message names it.
        """
        folder = Path(folder)
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json in {folder}; transformers' save_pretrained of a tokenizer writes one"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more precise, whatever is wrong with the file
            raise ValueError(f"{path}: not a readable tokenizer ({one_line(error)})") from error
        config = read_json(config_path) if config_path.exists() else {}
        return cls(backend, config, _read_template(folder, config), where=str(config_path))

    def __len__(self) -> int:
        return self._length

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

    def render(self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """The chat template applied to `messages`, each `{"role": ..., "content": ...}`.

        Raises:
            ValueError: without a template, for a malformed message, or when the template itself fails.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template; use prompt style 'raw' or 'instruct', or with_chatml()"
            )
        messages = list(messages)
        for number, message in enumerate(messages, start=1):
            texts = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"message {number} must be a role and a content, both str, got {short_repr(message)}")
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **self._special}
        return _run_template(self.chat_template, messages=messages, **variables)

    def render_prompt(self, prompt: str, style: str) -> str:
        """One prompt as the model expects it: as it is, as Phi-2's "Instruct/Output" form, or as a chat turn.

        Raises:
            ValueError: for a style that is not one of `PROMPT_STYLES`.
        """
        if style not in PROMPT_STYLES:
            raise ValueError(f"prompt style must be one of {', '.join(PROMPT_STYLES)}, got {style!r}")
        if style == "chatml":
            return self.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return prompt if style == "raw" else f"Instruct: {prompt}\nOutput:"

    def with_chatml(self) -> Tokenizer:
        """A copy that speaks ChatML: `<|im_start|>` opens a turn, `<|im_end|>` ends it and pads, at the next free ids.

        No weight is resized: Phi-2's embedding has 51200 rows, of which 50295 are used.
        """
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([IM_START, IM_END])
        config = {**self._config, "bos_token": IM_START, "eos_token": IM_END, "pad_token": IM_END}
        return Tokenizer(backend, config, CHATML_TEMPLATE)

    def save(self, folder: str | Path) -> None:
        """Writes the files `from_folder` and transformers' AutoTokenizer read, each whole or not at all.

        The template is written twice: transformers 5 looks for `chat_template.jinja`, early 4.x in the config.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self._special}
        for stale in ("chat_template", "added_tokens_decoder"):  # the second repeats what tokenizer.json says
            config.pop(stale, None)
        if self.chat_template is None:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        else:
            config["chat_template"] = self.chat_template
            _write_whole(folder / "chat_template.jinja", self.chat_template)
        _write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        _write_whole(folder / "tokenizer.json", self.backend.to_str(pretty=True))


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


def _special_tokens(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The special tokens that are set; transformers writes each as plain text or as the fields of an added token."""
    special = {"eos_token": END_OF_TEXT}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise ValueError(f"{where}: {name} must be text or hold it under 'content', got {short_repr(value)}")
        if text is not None:
            special[name] = text
    return special


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the config's template, which is one string or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({one_line(error)})") from error
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default", template)
    if template is not None and not isinstance(template, str):
        rule = "chat_template must be text or a list with one named 'default'"
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {rule}, got {short_repr(template)}")
    return template


def _run_template(source: str, **variables: Any) -> str:
    from jinja2 import TemplateError

    try:
        return _compile_template(source).render(**variables)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"chat template: {one_line(error)}") from error


@lru_cache(maxsize=8)
def _compile_template(source: str):
    """The template in jinja2's sandbox, with the names and tags transformers gives to chat templates."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for a loss mask; rendering leaves its content as it is."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise TemplateError(message)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
