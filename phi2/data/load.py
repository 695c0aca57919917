"""A data set as rows of token ids, in one call: what a run, `phi2 inspect` and a notebook see of it."""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import repr as short_repr
from typing import Any, NamedTuple

from phi2.data.audit import Audit
from phi2.data.config import DataSpec, RowsConfig
from phi2.data.encode import encode_records
from phi2.data.sources import Loaded, NoUsableRow, OtherKind, load_records, require_ignored
from phi2.keywords import config_of, explained
from phi2.tokenizer import Tokenizer

Data = str | DataSpec | Iterable[Any]  # as `load_records` takes it


class LoadedRows(NamedTuple):
    """What `load_data` gives: encoded rows, and what became of the others, which a notebook shows."""

    rows: list[Any]  # of `Encoded`, of one kind
    audit: Audit

    def __repr__(self) -> str:
        return self.audit.table()


@explained(RowsConfig)
def load_data(tokenizer: Tokenizer, data: Data, **settings: Any) -> LoadedRows:
    """Reads and encodes a data set as `phi2.sft` and `phi2.dpo` do.

    >>> import phi2
    >>> _, tokenizer = phi2.load("nano-instruct", device="cpu")
    >>> rows, audit = phi2.load_data(tokenizer, [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"}])
    >>> tokenizer.decode(rows[0].prompt), tokenizer.decode(rows[0].chosen)
    ('2 + 2 =', ' 4')
    >>> audit.kept, audit.flags["eos_added"]  # and print(audit.table())
    (1, 1)

    Args:
        data: files, hub data sets or named sources, with commas between; a list of them, each also as a dict of the
            fields of a `DataSpec`, {"source": "toy-dpo", "rows": 100}; or rows, as a list of dicts.
        settings: those of the flags of `phi2 sft` and `phi2 dpo` that say how rows become token ids.
    Returns:
        `rows`: of pairs, and other rows of answers that were compared or judged, `EncodedPreference`s, whose prompt and
        answers (of a pair also `chosen` and `rejected`) are (tokens,) int32 ids; of others `EncodedSequence`s, whose
        ids are (T,) int32 and whose mask, (T,) bool, is True at what is learnt. And the `audit`: counts of rows and
        tokens by what became of them.
    Raises:
        FileNotFoundError: for a source that is no file, no folder, no name and no hub id.
        ValueError: for settings or data that cannot be used, and when no row is usable.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer must be one that phi2.load gives, got {short_repr(tokenizer)}")
    config = config_of(RowsConfig, settings)
    (records, dropped), kind = load_kind(data, config)
    rows, audit = encode_records(records, with_template(tokenizer, config, kind), config, kind)
    audit.merge(dropped)
    return LoadedRows(list(rows), audit)


def load_kind(data: Data, config: RowsConfig) -> tuple[Loaded, str]:
    """Records of the kind that is asked for, or found, and that kind."""
    loaded, kind = _load(data, config)
    require_ignored(config.ignore_columns, loaded.dropped)
    return loaded, kind


def _load(data: Data, config: RowsConfig) -> tuple[Loaded, str]:
    kind, ignore = config.kind, config.ignore_columns
    if kind != "auto":
        return load_records(data, kind, ignore), kind
    try:
        return load_records(data, "preference", ignore), "preference"
    except ValueError as error:
        if isinstance(error, NoUsableRow) and error.rules - {"unknown-format"}:  # pairs, with something wrong in all
            raise
        as_pairs = error
    try:
        return load_records(data, "supervised", ignore), "supervised"
    except OtherKind:  # they are pairs, and something else was wrong
        raise as_pairs from None


def with_template(tokenizer: Tokenizer, config: RowsConfig, kind: str) -> Tokenizer:
    """The tokenizer with the chat template that rows of this kind are written with."""
    if kind == "supervised":
        return tokenizer.with_chat_template(config.chat_template)
    if config.chat_template != "auto":
        raise ValueError(f"chat_template is for supervised rows, and these are pairs, got {config.chat_template!r}")
    return tokenizer
