"""The files of a tokenizer: its vocabulary, its special tokens, its chat template, and what ends a text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import tokenizers

from phi2.files import one_line, read_json, write_whole

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Reads `tokenizer.json`.

    Raises:
        FileNotFoundError: without one.
        ValueError: when it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder}; transformers' save_pretrained of a tokenizer writes one"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more precise, whatever is wrong with the file
        raise ValueError(f"{path}: not a readable tokenizer ({one_line(error)})") from error


def read_config(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json`, with what the `special_tokens_map.json` of an older checkpoint says.

    As in transformers, the map wins over a config that does not describe its added tokens, and gives way to one that
    does; there it still tells what the config leaves out. Added tokens that the config describes and `tokenizer.json`
    lacks join the vocabulary.

    Raises:
        ValueError: naming the file that is damaged.
    """
    path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(path) if path.exists() else {}
    _add_missing_tokens(backend, config.get("added_tokens_decoder") or {}, path)
    if not map_path.exists():
        return config
    told = {name: value for name, value in read_json(map_path).items() if value is not None}
    for name, text in special_tokens(told, str(map_path)).items():
        if name in SPECIAL_TOKENS and backend.token_to_id(text) is None:
            raise ValueError(f"{map_path}: {name} {text!r} is not in the vocabulary")
    given = {name: value for name, value in config.items() if value is not None}
    return {**told, **given} if "added_tokens_decoder" in config else {**config, **told}


def _add_missing_tokens(backend: tokenizers.Tokenizer, described: Any, path: Path) -> None:
    known = backend.get_added_tokens_decoder()
    for token_id, token in _described_tokens(described, path):
        if token_id not in known:
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ValueError(f"{path}: {token.content!r} has id {token_id} here, and {found} in tokenizer.json")


def _described_tokens(described: Any, path: Path) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        for token_id, fields in described.items():
            known = {name: fields[name] for name in names if name in fields}
            yield int(token_id), tokenizers.AddedToken(fields["content"], **known)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        rule = "added_tokens_decoder must hold the fields of an added token for each id"
        raise ValueError(f"{path}: {rule}, got {short_repr(described)}") from error


def special_tokens(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The special tokens that have a name; transformers writes each as plain text or as the fields of an added token.

    Raises:
        ValueError: for one of `SPECIAL_TOKENS` that is neither.
    """
    special = {}
    extra = config.get("extra_special_tokens")
    for name, value in [*config.items(), *(extra.items() if isinstance(extra, dict) else ())]:
        text = _text_of(value)
        if name in SPECIAL_TOKENS and value is not None and text is None:
            raise ValueError(f"{where}: {name} must be text or hold it under 'content', got {short_repr(value)}")
        if text is not None and name.endswith("_token"):
            special[name] = text
    return special


def unnamed_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Those under `additional_special_tokens`, which transformers 5 calls `extra_special_tokens`."""
    lists = (config.get(name) for name in ("additional_special_tokens", "extra_special_tokens"))
    texts = (_text_of(value) for values in lists if isinstance(values, list) for value in values)
    return list(dict.fromkeys(text for text in texts if text is not None))


def _text_of(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the config's template, which is one string or a list of named ones.

    Raises:
        ValueError: naming the file that is damaged.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.pop("default", template)
        if named and isinstance(template, str):
            others = ", ".join(map(str, named))
            warnings.warn(f"{folder}: of its chat templates only 'default' is used, not {others}", stacklevel=3)
    if template is not None and not isinstance(template, str):
        rule = "chat_template must be text or a list with one named 'default'"
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {rule}, got {short_repr(template)}")
    return template


def read_text(path: Path) -> str:
    """A file of UTF-8 text.

    Raises:
        FileNotFoundError: without it.
        ValueError: when it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({one_line(error)})") from error


def read_stop_ids(folder: Path, size: int) -> set[int]:
    """The ids that end a text by `generation_config.json` and by `config.json`; no file, no ids.

    Args:
        size: ids of the tokenizer. The model may have more, if `config.json` says so.

    Raises:
        ValueError: naming the file, for an id that is no whole number in the vocabulary; what begins and what pads a
            text is held to the same.
    """
    files = {path: read_json(path) for path in _existing(folder, "generation_config.json", "config.json")}
    rows = files.get(folder / "config.json", {}).get("vocab_size")
    limit = max(size, rows) if isinstance(rows, int) else size
    stop_ids = set()
    for path, content in files.items():
        for name in ("bos_token_id", "pad_token_id"):
            value = content.get(name)
            if value is not None and not _is_id(value, limit):
                raise ValueError(f"{path}: {name} must be an id from 0 to {limit - 1}, got {short_repr(value)}")
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_id(token_id, limit) for token_id in ids):
            rule = f"eos_token_id must be an id from 0 to {limit - 1}, or a list of them"
            raise ValueError(f"{path}: {rule}, got {short_repr(value)}")
        stop_ids.update(ids)
    return stop_ids


def _is_id(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit  # not isinstance: true is no id


def _existing(folder: Path, *names: str) -> Iterator[Path]:
    return (folder / name for name in names if (folder / name).is_file())


def write_tokenizer(
    folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None
) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = ("chat_template", "added_tokens_decoder")  # the second repeats what tokenizer.json says
    config = {name: value for name, value in config.items() if name not in stale}
    if chat_template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    else:
        config["chat_template"] = chat_template
        write_whole(folder / "chat_template.jinja", chat_template)
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "tokenizer.json", backend.to_str(pretty=True))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)  # an older one would win over the config


def write_stop_ids(folder: Path, stop_ids: list[int]) -> None:
    """Writes them into `generation_config.json`, whose other keys stay."""
    path = folder / "generation_config.json"
    content = (read_json(path) if path.exists() else {}) | {"eos_token_id": stop_ids}
    write_whole(path, json.dumps(content, indent=2) + "\n")
