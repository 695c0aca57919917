"""From records to token ids, and which of them are learnt.

The text of a record (`pieces.py`) is tokenised in batches, and its pieces, context or target, become a mask over
tokens. Everything goes by position: no token id is ever compared with the padding id, which is often the end token too.
Two rules differ between libraries:

Boundary. A token may span the end of a prompt and the beginning of its answer. `joint` tokenises the whole text, and
the target begins at the first token that the prompt alone would not have given (trl's rule); in a conversation that is
trained in several places, a token belongs to where its last character lies. `split` tokenises context and target apart,
as generation meets them.

Truncation. `keep_start` cuts the end off, as trl does since 1.0; a row without any target left is dropped. `keep_end`,
for preferences, is trl's rule before that: when the prompt with the longest answer exceeds `max_length`, the prompt
keeps its last `max_prompt_length` tokens; if that is still too long, the answers keep their first
`max_length - max_prompt_length`. `drop` leaves long rows out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Generic, Literal, NamedTuple, ParamSpec, TypeVar, overload

import numpy as np
from tokenizers import Encoding
from tqdm import tqdm

from phi2.data.audit import Audit
from phi2.data.config import Boundary, EncodeConfig
from phi2.data.encoded import EncodedPreference, EncodedSequence
from phi2.data.flat import Builder, FlatPreferences, FlatRows, FlatSequences, PreferenceBuilder, SequenceBuilder
from phi2.data.pieces import Piece, preference_texts, supervised_pieces
from phi2.data.processes import map_in_processes
from phi2.data.records import Origin, Preference, Record, RowError
from phi2.text.special_text import MarkedEncoding
from phi2.tokenizer import Tokenizer

BATCH_ROWS = 1000
PARALLEL_BATCHES = 8  # of fewer, a process would not have begun before they are done


Row = TypeVar("Row", EncodedSequence, EncodedPreference)
Encodings = Sequence[np.ndarray | Encoding | MarkedEncoding]  # ids, or ids with the characters they stand for
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class RenderedRecord(NamedTuple, Generic[Row]):
    """A record written out.

    Attributes:
        texts: to be tokenised.
        marked: whether the special tokens that stay text are marked in them, as by `SpecialText.mark`.
        offsets: whether the characters of each token are asked for.
        encode: makes arrays of the encodings of the texts.
    """

    origin: Origin
    texts: list[str]
    marked: bool
    offsets: bool
    encode: Callable[[Encodings], Row]


@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: Literal["supervised"]
) -> tuple[FlatSequences, Audit]: ...
@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: Literal["preference"]
) -> tuple[FlatPreferences, Audit]: ...
@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: str
) -> tuple[FlatRows, Audit]: ...
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: str
) -> tuple[FlatRows, Audit]:
    """Encodes a data set; rows that cannot be used are dropped and counted.

    Args:
        records: all of one kind.
        kind: "supervised" gives `EncodedSequence`s, "preference" gives `EncodedPreference`s.

    Returns:
        The rows, as flat arrays that are a sequence of them, and what became of which.

    Raises:
        ValueError: for options that do not fit the kind, and when no row is left.
    """
    if kind not in ("supervised", "preference"):
        raise ValueError(f"kind must be supervised or preference, got {kind!r}")
    if kind == "supervised" and options.truncation_mode == "keep_end":
        raise ValueError("truncation_mode must be keep_start or drop for supervised rows, got keep_end")
    if kind == "preference" and options.train_on != "completion":
        raise ValueError(
            f"train_on must be completion for preference rows, whose answers are learnt, got {options.train_on}"
        )
    if kind == "supervised":
        return _encode_records(records, tokenizer, options, SequenceBuilder(), _render_supervised)
    return _encode_records(records, tokenizer, options, PreferenceBuilder(), _render_preference)


def _encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    options: EncodeConfig,
    rows: Builder[Row],
    render: Callable[[Record, Tokenizer, EncodeConfig], RenderedRecord[Row]],
) -> tuple[FlatRows[Row], Audit]:
    audit = Audit()
    starts = range(0, len(records), BATCH_ROWS)
    encode = partial(_encode_batch, records, tokenizer, options, render)
    batches = map_in_processes(encode, starts) if len(starts) >= PARALLEL_BATCHES else map(encode, starts)
    with tqdm(total=len(records), desc="encode", unit=" rows", delay=2, disable=None) as progress:
        for encoded, of_batch in batches:
            rows.add(encoded)
            audit.merge(of_batch)
            progress.update(of_batch.rows)
    if not audit.kept:
        reasons = "; ".join(
            f"{rule} {dropped.rows}x, first {dropped.reason}" for rule, dropped in audit.dropped.items()
        )
        raise ValueError(f"no usable row among {audit.rows}: {reasons or 'the data set is empty'}")
    return rows.build(), audit


def _encode_batch(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    options: EncodeConfig,
    render: Callable[[Record, Tokenizer, EncodeConfig], RenderedRecord[Row]],
    start: int,
) -> tuple[list[Row], Audit]:
    """The rows of the batch that begins there."""
    audit = Audit()
    batch = records[start : start + BATCH_ROWS]
    rendered = [_or_drop(audit, render, record, tokenizer, options) for record in batch]
    tokenized = _tokenize([one for one in rendered if one], tokenizer)
    encoded = (_or_drop(audit, _encode, one, tokenizer, encodings) for one, encodings in tokenized)
    rows = [row for row in encoded if row]
    for row in rows:
        audit.keep(row.length, row.tokens, row.target_tokens, row.flags)
    return rows, audit


def _or_drop(
    audit: Audit, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | None:
    try:
        return function(*args, **kwargs)
    except RowError as error:
        audit.drop(error)
        return None


def _tokenize(rendered: list[RenderedRecord[Row]], tokenizer: Tokenizer) -> list[tuple[RenderedRecord[Row], Encodings]]:
    """The records with the encodings of their texts, made in one batch; marked texts wait for `_encode`."""
    plain = [one for one in rendered if not one.marked]
    ids = iter(tokenizer.words.encode([one.texts for one in plain if not one.offsets]))
    texts = [text for one in plain if one.offsets for text in one.texts]
    slow: Iterator[Encoding] = iter(tokenizer.backend.encode_batch(texts, add_special_tokens=False))

    def found(one: RenderedRecord[Row]) -> Encodings:
        return [*islice(slow, len(one.texts))] if one.offsets else next(ids)

    return [(one, [] if one.marked else found(one)) for one in rendered]


def _encode(rendered: RenderedRecord[Row], tokenizer: Tokenizer, encodings: Encodings) -> Row:
    if not rendered.marked:
        return rendered.encode(encodings)
    try:
        return rendered.encode([tokenizer.special_text.encode(text) for text in rendered.texts])
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError(rendered.origin, "special-token", str(error)) from error


def _array(encoding: np.ndarray | Encoding | MarkedEncoding) -> np.ndarray:
    return encoding if isinstance(encoding, np.ndarray) else np.array(encoding.ids, dtype=np.int32)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


# ---- supervised rows ----


def _render_supervised(record: Record, tokenizer: Tokenizer, options: EncodeConfig) -> RenderedRecord[EncodedSequence]:
    special = options.special_tokens_in_text
    pieces, flags = supervised_pieces(record, tokenizer, options.train_on, options.append_eos, special)
    texts = [piece.text for piece in pieces]
    is_simple = len(pieces) == 1 or _is_prompt_and_answer(pieces)
    if options.boundary == "joint":  # the prompt alone is needed too where there is one
        texts = [*texts[:1], "".join(texts)] if _is_prompt_and_answer(pieces) else ["".join(texts)]
    encode = partial(_encode_sequence, record.origin, pieces, flags, tokenizer, options)
    offsets = options.boundary == "joint" and not is_simple
    return RenderedRecord(record.origin, texts, "special_text_kept" in flags, offsets, encode)


def _is_prompt_and_answer(pieces: list[Piece]) -> bool:
    return [piece.target for piece in pieces] == [False, True]


def _encode_sequence(
    origin: Origin,
    pieces: list[Piece],
    flags: set[str],
    tokenizer: Tokenizer,
    options: EncodeConfig,
    encodings: Encodings,
) -> EncodedSequence:
    ids, mask, merged = _ids_and_mask(pieces, encodings, options.boundary)
    flags = flags | ({"boundary_merged"} if merged else set())
    too_long = options.max_length is not None and len(ids) > options.max_length
    if too_long and options.truncation_mode == "drop":
        raise RowError(origin, "too-long", f"{len(ids)} tokens exceed max_length {options.max_length}")
    if too_long:
        flags = flags | _truncation_flags(ids[options.max_length :], tokenizer)
        ids, mask = ids[: options.max_length], mask[: options.max_length]
    if not mask[1:].any():
        rule = "prompt-too-long" if too_long else "nothing-to-train"
        raise RowError(origin, rule, f"no target among its {len(ids)} tokens (train_on {options.train_on})")
    return EncodedSequence(ids, mask, origin, frozenset(flags))


def _ids_and_mask(pieces: list[Piece], encodings: Encodings, boundary: Boundary) -> tuple[np.ndarray, np.ndarray, bool]:
    """(T,) ids, (T,) mask, and whether a token spans a boundary between context and target."""
    arrays = [_array(encoding) for encoding in encodings]
    if boundary == "split" or len(pieces) == 1:
        return np.concatenate(arrays), np.repeat([p.target for p in pieces], [len(a) for a in arrays]), False
    ids = arrays[-1]
    if _is_prompt_and_answer(pieces):
        start = _common_prefix(*arrays)
        return ids, np.arange(len(ids)) >= start, start < len(arrays[0])
    assert not isinstance(encodings[0], np.ndarray)  # offsets were asked for
    ends = np.array([end for _, end in encodings[0].offsets])  # characters up to and with each token
    edges = np.cumsum([len(piece.text) for piece in pieces])
    mask = np.array([piece.target for piece in pieces])[np.searchsorted(edges, ends)]
    return ids, mask, not np.isin(edges, ends).all()


def _truncation_flags(tail: np.ndarray, tokenizer: Tokenizer) -> set[str]:
    """What it means to lose `tail`: a text's last stop token is in the tail when any is."""
    return {"truncated", "eos_lost"} if np.isin(tail, list(tokenizer.stop_ids)).any() else {"truncated"}


# ---- preference rows ----


def _render_preference(
    record: Record, tokenizer: Tokenizer, options: EncodeConfig
) -> RenderedRecord[EncodedPreference]:
    special = options.special_tokens_in_text
    (prompt, *answers), flags = preference_texts(record, tokenizer, options.append_eos, special)
    assert isinstance(record, Preference)  # preference_texts refuses the others
    if options.boundary == "joint":
        answers = [prompt + answer for answer in answers]
    encode = partial(_encode_preference, record, flags, tokenizer, options)
    return RenderedRecord(record.origin, [prompt, *answers], "special_text_kept" in flags, False, encode)


def _encode_preference(
    record: Preference, flags: set[str], tokenizer: Tokenizer, options: EncodeConfig, encodings: Encodings
) -> EncodedPreference:
    prompt, *answers = map(_array, encodings)
    if options.boundary == "joint":
        start = min(_common_prefix(prompt, answer) for answer in answers)
        flags = flags | ({"boundary_merged"} if start < len(prompt) else set())
        prompt, answers = prompt[:start], [answer[start:] for answer in answers]
    if not len(prompt):
        raise RowError(record.origin, "no-prompt", "no token of the prompt stands before the answers")
    compared = len(answers) - record.has_gold  # a gold answer may be one of the others
    if _any_equal(answers[:compared]):
        raise RowError(record.origin, "same-answers", f"{_told(compared)} are the same tokens")
    longest, limit = max(map(len, answers)), options.max_length
    if limit is not None and len(prompt) + longest > limit:
        prompt, room = _truncated(prompt, longest, limit, record.origin, options)
        flags = flags.union(*(_truncation_flags(answer[room:], tokenizer) for answer in answers))
        answers = [answer[:room] for answer in answers]
        if _any_equal(answers[:compared]):
            reason = f"{_told(compared)} differ only after {limit} tokens"
            raise RowError(record.origin, "same-answers-cut", reason)
    return EncodedPreference(
        prompt, tuple(answers), record.scores, record.origin, record.columns, frozenset(flags), record.has_gold
    )


def _any_equal(answers: Sequence[np.ndarray]) -> bool:
    return len({answer.tobytes() for answer in answers}) < len(answers)


def _told(answers: int) -> str:
    return "chosen and rejected" if answers == 2 else "two of the answers"


def _truncated(
    prompt: np.ndarray, longest: int, limit: int, origin: Origin, options: EncodeConfig
) -> tuple[np.ndarray, int]:
    """What stays of a prompt, and how many tokens of each answer; the longest answer has `longest`."""
    if options.truncation_mode == "drop":
        raise RowError(origin, "too-long", f"{len(prompt) + longest} tokens exceed max_length {limit}")
    if options.truncation_mode == "keep_start":
        if len(prompt) >= limit:
            raise RowError(origin, "prompt-too-long", f"the prompt's {len(prompt)} tokens fill max_length {limit}")
        return prompt, limit - len(prompt)
    prompt_limit = options.max_prompt_length or limit // 2
    prompt = prompt[-prompt_limit:]
    return prompt, longest if len(prompt) + longest <= limit else limit - prompt_limit
