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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Generic, Literal, NamedTuple, ParamSpec, TypeVar, overload

import numpy as np
from tokenizers import Encoding
from tqdm import tqdm

from phi2.data.audit import Audit
from phi2.data.config import Boundary, EncodeConfig
from phi2.data.pieces import Piece, preference_texts, supervised_pieces
from phi2.data.records import Origin, Preference, Record, RowError
from phi2.text.special_text import MarkedEncoding
from phi2.tokenizer import Tokenizer

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSequence:
    """One supervised row.

    Attributes:
        ids: (T,) int32 token ids.
        mask: (T,) bool, True where the token is a target. Nothing predicts the first token, whatever its mask says.
        flags: names in `audit.FLAGS`.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: Origin
    flags: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        return int(self.mask[1:].sum())


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPreference:
    """One preference row: a prompt and k >= 1 answers, every token of which is a target.

    Attributes:
        prompt: (prompt tokens,) int32 ids, at least one, up to and with the tokens that open the assistant's turn.
        answers: of each, best first, (answer tokens,) int32 ids that follow the prompt.
        scores: of each a number: 1 and 0 for chosen and rejected, 1 or 0 for one answer with a label.
        columns: the row's other numbers and labels.
        flags: names in `audit.FLAGS`.
        has_gold: the last answer, behind a chosen and a rejected one, is to be imitated and not compared.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    origin: Origin
    columns: dict[str, float | str]
    flags: frozenset[str] = frozenset()
    has_gold: bool = False

    @property
    def chosen(self) -> np.ndarray:
        """The best answer."""
        return self.answers[0]

    @property
    def rejected(self) -> np.ndarray:
        """The second answer of a pair."""
        return self.answers[1]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.answers))

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + self.target_tokens

    @property
    def target_tokens(self) -> int:
        return sum(map(len, self.answers))


Encoded = EncodedSequence | EncodedPreference


Row = TypeVar("Row", EncodedSequence, EncodedPreference)
Encodings = Sequence[Encoding | MarkedEncoding]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class RenderedRecord(NamedTuple, Generic[Row]):
    """A record written out: the texts to tokenise, and the function that makes arrays of their encodings.

    In `marked` texts the special tokens that stay text are marked, as by `SpecialText.mark`.
    """

    origin: Origin
    texts: list[str]
    marked: bool
    encode: Callable[[Encodings], Row]


@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: Literal["supervised"]
) -> tuple[list[EncodedSequence], Audit]: ...
@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: Literal["preference"]
) -> tuple[list[EncodedPreference], Audit]: ...
@overload
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: str
) -> tuple[list[EncodedSequence] | list[EncodedPreference], Audit]: ...
def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, options: EncodeConfig, kind: str
) -> tuple[list[EncodedSequence] | list[EncodedPreference], Audit]:
    """Encodes a data set; rows that cannot be used are dropped and counted.

    Args:
        records: all of one kind.
        kind: "supervised" gives `EncodedSequence`s, "preference" gives `EncodedPreference`s.

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
        return _encode_records(records, tokenizer, options, _render_supervised)
    return _encode_records(records, tokenizer, options, _render_preference)


def _encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    options: EncodeConfig,
    render: Callable[[Record, Tokenizer, EncodeConfig], RenderedRecord[Row]],
) -> tuple[list[Row], Audit]:
    encoded: list[Row] = []
    audit = Audit()
    with tqdm(total=len(records), desc="encode", unit=" rows", delay=2, disable=None) as progress:
        for start in range(0, len(records), BATCH_ROWS):
            batch = records[start : start + BATCH_ROWS]
            rendered = [_or_drop(audit, render, record, tokenizer, options) for record in batch]
            tokenized = _tokenize([one for one in rendered if one], tokenizer)
            rows = (_or_drop(audit, _encode, one, tokenizer, encodings) for one, encodings in tokenized)
            encoded += [row for row in rows if row]
            progress.update(len(batch))
    for row in encoded:
        audit.keep(row.length, row.tokens, row.target_tokens, row.flags)
    if not encoded:
        reasons = "; ".join(
            f"{rule} {dropped.rows}x, first {dropped.reason}" for rule, dropped in audit.dropped.items()
        )
        raise ValueError(f"no usable row among {audit.rows}: {reasons or 'the data set is empty'}")
    return encoded, audit


def _or_drop(
    audit: Audit, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | None:
    try:
        return function(*args, **kwargs)
    except RowError as error:
        audit.drop(error)
        return None


def _tokenize(
    rendered: list[RenderedRecord[Row]], tokenizer: Tokenizer
) -> Iterator[tuple[RenderedRecord[Row], list[Encoding]]]:
    """The records with the encodings of their texts, made in one batch; marked texts wait for `_encode`."""
    texts = [text for one in rendered if not one.marked for text in one.texts]
    encodings = iter(tokenizer.backend.encode_batch(texts, add_special_tokens=False))
    for one in rendered:
        yield one, [] if one.marked else list(islice(encodings, len(one.texts)))


def _encode(rendered: RenderedRecord[Row], tokenizer: Tokenizer, encodings: list[Encoding]) -> Row:
    if not rendered.marked:
        return rendered.encode(encodings)
    try:
        return rendered.encode([tokenizer.special_text.encode(text) for text in rendered.texts])
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError(rendered.origin, "special-token", str(error)) from error


def _array(encoding: Encoding | MarkedEncoding) -> np.ndarray:
    return np.array(encoding.ids, dtype=np.int32)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


# ---- supervised rows ----


def _render_supervised(record: Record, tokenizer: Tokenizer, options: EncodeConfig) -> RenderedRecord[EncodedSequence]:
    special = options.special_tokens_in_text
    pieces, flags = supervised_pieces(record, tokenizer, options.train_on, options.append_eos, special)
    texts = [piece.text for piece in pieces]
    if options.boundary == "joint":  # the prompt alone is needed too where there is one
        texts = [*texts[:1], "".join(texts)] if _is_prompt_and_answer(pieces) else ["".join(texts)]
    encode = partial(_encode_sequence, record.origin, pieces, flags, tokenizer, options)
    return RenderedRecord(record.origin, texts, "special_text_kept" in flags, encode)


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
    return RenderedRecord(record.origin, [prompt, *answers], "special_text_kept" in flags, encode)


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
