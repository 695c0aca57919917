"""The canonical rows: whatever columns a data set uses, a row becomes one of three shapes.

`Chat` is a conversation, `Plain` is text after an optional prompt, `Preference` is a prompt with answers that were
compared or judged. `formats.py` makes them of rows. A `Prompt` has no answer yet (`prompts.py`).

A row that cannot be trained on is refused with a `RowError`. Its `rule` is a short slug, so that a loader can drop the
row and count it: one bad row in a million is a line of the audit, not the end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeIs

KINDS = ("supervised", "preference")
PAIR = (1.0, 0.0)  # the scores of a chosen and a rejected answer


class Message(NamedTuple):
    """One turn.

    `role` is system, user, assistant or tool; with `train` False the turn is never in the loss. `extra` is what else
    the chat template may read, such as `tool_calls`; a `content` of None there stands for no words at all.
    """

    role: str
    content: str
    train: bool = True
    extra: dict[str, Any] | None = None


class Origin(NamedTuple):
    """Where a row came from, for error messages: the file and the 1-based row (the line, in a file of JSON lines)."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


class RowError(ValueError):
    """A row that cannot be used: `origin` says which one, `rule` is the slug of the rule it breaks."""

    def __init__(self, origin: Origin, rule: str, reason: str):
        super().__init__(f"{origin}: {reason} [{rule}]")
        self.origin = origin
        self.rule = rule


Messages = tuple[Message, ...]
Text = TypeVar("Text", str, Messages)  # as it stands, or for the chat template


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with the assistant; the assistant turns to train on are not empty.

    `variables` goes to the chat template beside the messages: tools, documents.
    """

    messages: Messages
    origin: Origin
    variables: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Text as it stands, no template: `completion` is learnt after `prompt`, which is "" in rows of running text."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Preference(Generic[Text]):
    """Answers to one prompt, best first, all of them texts or all messages. They hold only what follows the prompt.

    `scores` has a number for each answer: `PAIR` for a chosen and a rejected one, 1 or 0 for a single answer with a
    thumb up or down, else what the data set gives. With `has_gold` a third answer stands behind a pair, to be imitated
    and not compared. `columns` has the row's other numbers as floats (ratings, weights, margins) and its short strings
    (such as `source_dataset`), for losses and reports. `variables` goes to the chat template beside messages.
    """

    prompt: Text
    answers: tuple[Text, ...]
    scores: tuple[float, ...]
    origin: Origin
    columns: dict[str, float | str]
    variables: dict[str, Any] | None = None
    has_gold: bool = False


@dataclass(frozen=True, slots=True)
class Prompt(Generic[Text]):
    """What is to be answered, as text or messages. `variables` goes to the chat template beside messages."""

    prompt: Text
    origin: Origin
    variables: dict[str, Any] | None = None


Conversational = Chat | Preference[Messages]
Record = Conversational | Plain | Preference[str]
Row = Mapping[str, Any]


def is_conversational(record: Record) -> TypeIs[Conversational]:
    """Whether the chat template writes this record out."""
    return isinstance(record, Chat) or not (isinstance(record, Plain) or isinstance(record.prompt, str))
