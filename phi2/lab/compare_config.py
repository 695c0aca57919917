"""The settings of a comparison: those of its runs, which variants of them there are, and how these are compared.

The command line reads its flags from here, so torch is not imported, and annotations are types, not texts.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from phi2.data.config import DataSpec
from phi2.evaluation.config import TOY, TasksConfig
from phi2.runs.config import require_at_least
from phi2.training.config import PreferenceConfig

TOY_DATA = "toy-dpo"  # its skills are graded too, and it has held-out pairs of its own
TOY_PAIRS, TOY_QUESTIONS = 200, 20


@dataclass(frozen=True, kw_only=True)
class CompareConfig(PreferenceConfig):
    """Settings of a comparison. What is a run's own setting is the same in all of them, unless a variant changes it."""

    losses: str | list[str | dict[str, Any]] | None = None
    """Variants by their loss, with commas between: names, presets (paper:ipo), or either with knobs and other settings
    of a run, simpo(beta=2.0, learning_rate=1e-5). A list may hold mixtures: ["sigmoid:0.8,sft:0.2", "ipo"]."""
    variants: list[str | dict[str, Any]] | None = None
    """More variants, for a YAML file: texts as in `losses`, where a mixture (sigmoid:0.8,sft:0.2) is one too, or
    mappings with `loss`, its knobs, and other settings of a run."""
    grid: dict[str, list[Any]] | None = None
    """Settings or knobs with a list of values each: every variant is run with every combination. With `loss` among them
    it needs no other variants."""
    seeds: int = 3
    """Runs of each variant, with as many seeds from `seed` on."""
    seed: int = 42
    """First of the seeds; each is that of the data order, the adapter and dropout of one run of every variant."""
    baseline: str | None = None
    """Variant that the others are compared with; unset, the first."""
    match: Literal["steps", "kl"] = "steps"
    """steps compares the ends of the runs; kl compares them where they are equally far from the reference, between two
    of their evaluations."""
    match_kl: float | None = None
    """The distance of match: kl, nats; unset, the largest that all runs reach. A run that never gets there has no
    value."""
    jobs: int = 1
    """Processes that share the runs; on a CPU each computes with its share of the cores."""
    output: str
    """Folder of the comparison; it must not hold another one."""
    resume: bool = False
    """Go on with the comparison in the output folder: finished runs stay, and one that was broken off is resumed."""
    evaluation: TasksConfig | None = None
    """What every run is asked behind its last update, by the settings of `phi2 evaluate`; with match: kl behind each of
    its evaluations. Unset, 20 questions of each toy skill where the data are toy-dpo."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates four times."""
    precompute_ref_log_probs: bool = True
    """Score the pairs that the runs will see with the reference once, before the first run."""
    reference_cache: str | None = None
    """Folder of precomputed reference log-probabilities; unset, inside the output folder."""

    def __post_init__(self) -> None:
        if self.eval_data is None and not self.test_fraction:
            if not self.is_toy:
                raise ValueError("a comparison needs held-out pairs: give eval_data or test_fraction")
            object.__setattr__(self, "eval_data", [DataSpec(TOY_DATA, split="test", rows=TOY_PAIRS)])
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference of all runs: it needs precompute_ref_log_probs false, which is true"
                " in a comparison; or give it to a variant, sigmoid(sync_ref_model=True)"
            )
        super().__post_init__()
        for name in ("seeds", "jobs"):
            require_at_least(self, name, 1)
        self._require_match()
        if not self.losses and not self.variants and not (self.grid or {}).get("loss"):
            raise ValueError("losses must name one loss at least (or variants, or a grid with loss), got none")

    def _require_match(self) -> None:
        if self.match_kl is None:
            return
        if self.match != "kl":
            raise ValueError(f"match_kl {self.match_kl:g} is for match: kl, got match: {self.match}")
        if not 0 < self.match_kl < math.inf:
            raise ValueError(f"match_kl must be above 0, got {self.match_kl:g}")

    @property
    def asked(self) -> TasksConfig | None:
        """The tasks of every run."""
        toy = TasksConfig(tasks=(TOY,), questions=TOY_QUESTIONS) if self.is_toy else None
        return self.evaluation or toy

    @property
    def is_toy(self) -> bool:
        """Whether the pairs are the toy skills' alone."""
        parts = [self.data] if isinstance(self.data, str) else self.data
        return [getattr(part, "source", part) for part in parts] == [TOY_DATA]
