"""Which rows to take, and how they become token ids: settings, which the command line reads without loading numpy.

Annotations are types, not texts: the parser checks nothing of an inherited field whose annotation it cannot read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from phi2.text.template_choice import require_template_choice

Boundary = Literal["joint", "split"]
TruncationMode = Literal["keep_start", "keep_end", "drop"]
TrainOn = Literal["completion", "assistant", "all"]
SpecialTokens = Literal["token", "text", "refuse"]


@dataclass(frozen=True)
class EncodeConfig:
    """How records become token ids.

    Raises:
        ValueError: for a value that is not allowed, and for one that another setting would leave without effect.
    """

    max_length: int | None = 1024
    """Longest sequence in tokens, prompt and answer together; null for no limit."""
    train_on: TrainOn = "completion"
    """What a supervised row teaches: its last answer, all assistant turns or all tokens; never a turn of weight 0."""
    boundary: Boundary = "joint"
    """Tokenise prompt and answer as one text, where a token that spans both counts as answer, or split them first."""
    truncation_mode: TruncationMode = "keep_start"
    """What a row over max_length loses: its end, its prompt's beginning (keep_end, only pairs) or everything (drop)."""
    max_prompt_length: int | None = None
    """Prompt tokens that keep_end keeps in a row that is too long; null for half of max_length."""
    append_eos: bool = True
    """Put the end token behind text that does not end in one."""
    special_tokens_in_text: SpecialTokens = "token"
    """What text that spells a special token, such as <|im_end|>, becomes: that token, the text it is, or no row."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns of the rows, and keys of their messages, that are left out, so that they do not refuse a row."""

    def __post_init__(self) -> None:
        choices_of = {"train_on": TrainOn, "boundary": Boundary, "truncation_mode": TruncationMode}
        for name, choices in {**choices_of, "special_tokens_in_text": SpecialTokens}.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, one token to read and one to predict, got {self.max_length}"
            )
        if self.max_length is None and self.truncation_mode != "keep_start":
            raise ValueError(f"truncation_mode {self.truncation_mode} needs a max_length, got none")
        if self.max_prompt_length is not None:
            if self.truncation_mode != "keep_end":
                raise ValueError(f"max_prompt_length needs truncation_mode keep_end, got {self.truncation_mode}")
            assert self.max_length is not None  # else truncation_mode was refused above
            if not 0 < self.max_prompt_length < self.max_length:
                raise ValueError(
                    f"max_prompt_length must be in [1, {self.max_length - 1}], got {self.max_prompt_length}"
                )


@dataclass(frozen=True, kw_only=True)
class RowsConfig(EncodeConfig):
    """What the rows of a data set are for, and, inherited, how they become token ids."""

    kind: Literal["auto", "supervised", "preference"] = "auto"
    """What the rows are for; auto takes pairs for preference data."""
    chat_template: str = "auto"
    """As in `phi2 sft`, for supervised rows: auto, chatml, none or a FILE.jinja."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_template_choice(self.chat_template)


@dataclass(frozen=True)
class Subsample:
    """Keep a random part of the rows."""

    fraction: float
    """Part of the rows to keep, above 0 and up to 1. For each matching row that reaches this step, in file order, one
    number is drawn from `random.Random(seed)`, and the row stays if it is not above the fraction. Others draw none."""
    source_dataset: str | None = None
    """Only rows with this value in their column source_dataset are thinned out; unset, all rows are."""
    seed: int = 42
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"subsample.fraction must be above 0 and at most 1, got {self.fraction}")
        if self.fraction == 1 and self.seed != 42:
            raise ValueError(f"subsample.seed {self.seed} needs a fraction below 1, got 1")


@dataclass(frozen=True)
class DataSpec:
    """One part of a mixture: a source, and which of its rows to take."""

    source: str | Iterable[dict]
    """File, folder, named source, or hub data set (owner/name or owner/name/configuration); in Python also rows."""
    split: str | None = None
    """Split of a folder or data set; unset, its train split, or all its files if they are not named after splits."""
    max_tokens: int | None = None
    """Keep rows below this many tokens by the data set's own count: phi_token_count, or for pairs prompt_length plus
    chosen_length and plus rejected_length."""
    subsample: Subsample | None = None
    """Keep a random part of the rows."""
    shuffle_seed: int | None = None
    """Shuffle with this seed; unset, rows stay in file order."""
    rows: int | None = None
    """Take this many rows, the first ones after the shuffle; unset, all of them."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns, and keys of messages, of this source that are left out."""

    def __post_init__(self) -> None:
        if self.source == "":
            raise ValueError("a data source must have a name, got ''")
        for name in ("max_tokens", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        return self.source if isinstance(self.source, str) else "data"
