"""What the variants of a comparison are measured by, in the same way whatever their losses call a reward.

The policy's distance from the reference is estimated on its own answers to held-out prompts. On the pairs of the data
the mean of log ref - log policy estimates nothing of the kind: these are no samples of either model.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phi2.checkpoints.peft_files import load_adapter
from phi2.checkpoints.weights import load_model, pick_device
from phi2.data.encoded import EncodedPreference
from phi2.evaluation.api import evaluation_of, result_of, write
from phi2.evaluation.config import TOY, TasksConfig
from phi2.evaluation.results import ModelResult
from phi2.evaluation.samples import RIGHT
from phi2.files import read_json_lines, write_whole
from phi2.hub import resolve
from phi2.inference.config import SamplingParams
from phi2.inference.generate import choices_of, replies_to
from phi2.inference.kept_engine import kept_engine, release_engine
from phi2.inference.scoring import logits_of
from phi2.lora import disabled
from phi2.losses.head import predicting_states
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training.config import DPOConfig
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.passes import passes_of
from phi2.training.precision import autocast
from phi2.training.reference import reference_kind
from phi2.training.reference_cache import Reference
from phi2.training.scoring import score_answers
from phi2.training.session import Session

if TYPE_CHECKING:
    from phi2.evaluation.tasks import Loaded

FILE = "measures.jsonl"  # in the folder of a run, a line for each of its evaluations
PROMPTS, ANSWER_TOKENS = 32, 64  # answers for a distance, and where they are cut
ROWS = 8  # of them in a pass


@dataclass(frozen=True)
class Tasks:
    """What runs are asked.

    Attributes:
        config: which tasks, and how.
        loaded: those of the harness, with their data.
        behind: the updates behind which they are asked.
    """

    config: TasksConfig
    loaded: Loaded | None
    behind: Container[int]


class Measure:
    """Watches a run: behind each evaluation it adds a line to `measures.jsonl`.

    Args:
        reference: log-probabilities that are known, of all held-out pairs.
        start: the reference as a model, None where it is the policy with its adapter off.
        elsewhere: whether the run's own evaluations have no reference, or one that moves.
        tasks: that the run is asked, if any.
    """

    def __init__(
        self,
        session: Session[EncodedPreference],
        config: DPOConfig,
        reference: Reference,
        start: Phi2ForCausalLM | None,
        elsewhere: bool,
        tasks: Tasks | None,
    ) -> None:
        self.session, self.config, self.reference, self.start = session, config, reference, start
        self.tasks = tasks
        self.pairs = session.rows.evaluation
        self.scored = self.pairs if elsewhere else []

    def __call__(self, step: int, model: Phi2ForCausalLM) -> None:
        training = model.training
        model.eval()
        found = {"step": step, **self.distance(model), **self.preference(model)}
        if self.tasks is not None and step in self.tasks.behind:
            found |= self.scores(model, self.tasks)
        release_engine(model)
        model.train(training)
        path = Path(self.config.output) / FILE
        lines = {line["step"]: line for line in (*measures(path.parent), found)}  # one that is made again is the same
        write_whole(path, "".join(f"{json.dumps(line)}\n" for line in lines.values()))

    def distance(self, model: Phi2ForCausalLM) -> dict[str, float]:
        """`kl`, nats per answer, the mean `length` of the answers, tokens, and `entropy`, nats per token of them."""
        prompts = [pair.prompt for pair in self.pairs[:PROMPTS]]
        answers = sample_answers(model, self.session.tokenizer, prompts)
        parts = [slice(i, i + ROWS) for i in range(0, len(prompts), ROWS)]
        of_tokens = [self.kl_and_entropy(model, prompts[part], answers[part]) for part in parts]
        kls, entropies = torch.cat(of_tokens, dim=1)  # (tokens,) each
        lengths = [len(answer) for answer in answers]
        return {
            "kl": kls.sum().item() / len(answers),
            "length": float(np.mean(lengths)),
            "entropy": entropies.mean().item(),
        }

    @torch.no_grad()
    def kl_and_entropy(
        self, model: Phi2ForCausalLM, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Tensor:
        """(2, tokens) at each token of answers y to prompts x: KL(policy to reference), and the policy's entropy.

            KL(policy(. | x, y_<t) to reference(. | x, y_<t)),  y from the policy

        Summed over t it is in expectation the KL of whole answers, by the chain rule; unlike log policy(y|x) - log
        reference(y|x) it is never negative, and its spread is smaller.

        Source: Amini, Vieira and Cotterell 2025, arXiv:2504.10637, the Rao-Blackwellized estimator.
        """
        origin = self.pairs[0].origin
        rows = [EncodedPreference(x, (y,), (1.0,), origin, {}) for x, y in zip(prompts, answers, strict=True)]
        row, choices = row_of_answers(rows).to(model.device), choices_of(model, self.session.tokenizer)
        with autocast(self.config):
            policy = log_probs(model, row, choices)
            with self.at_start(model) as start:
                reference = log_probs(start, row, choices)
        share = policy.exp()
        return torch.stack(((share * (policy - reference)).sum(dim=-1), -(share * policy).sum(dim=-1)))

    def scores(self, model: Phi2ForCausalLM, tasks: Tasks) -> dict[str, float]:
        """Of each task, as `scores_by_task` names them; answers to tasks of the harness stand in the run's folder."""
        run = Path(self.config.output)
        output = run / "evaluation" if tasks.loaded is not None else None
        with torch.random.fork_rng():
            result = result_of(tasks.config, (model, self.session.tokenizer), tasks.loaded, output)
        if output is not None:
            name = "/".join(run.parts[-2:])  # of a comparison's folder of runs: variant and seed
            write(evaluation_of(tasks.config, {name: result}, tasks.loaded, output), output)
        return scores_by_task(result)

    @contextmanager
    def at_start(self, model: Phi2ForCausalLM) -> Iterator[Phi2ForCausalLM]:
        """The reference as a model."""
        if self.start is not None:
            yield self.start
            return
        with disabled(model):
            yield model

    @torch.no_grad()
    def preference(self, model: Phi2ForCausalLM) -> dict[str, float]:
        """What evaluations tell of a run with a reference that stays, for the others: of each pair its log-ratios."""
        if not self.scored:
            return {}
        cut = passes_of(self.config, model, self.scored).cut
        answers = score_answers(model, self.scored, cut, self.reference, partial(autocast, self.config))
        of_chosen, of_rejected = answers.pairs.chosen_logratio, answers.pairs.rejected_logratio  # (pairs,)
        found = {
            "accuracy": (of_chosen > of_rejected).float(),
            "chosen_drift": of_chosen,
            "rejected_drift": of_rejected,
        }
        return {name: answers.of_prompts(values, "pair").mean().item() for name, values in found.items()}


def measures(run: Path) -> list[dict[str, float]]:
    """The lines of a run."""
    return read_json_lines(run / FILE) if (run / FILE).is_file() else []


def scores_by_task(result: ModelResult) -> dict[str, float]:
    """The first metric of a task by its name, all as task/metric; toy skills as toy/skill, and their mean as toy."""
    skills = {f"{TOY}/{score.task}": score.value for score in result.scores if score.metric == RIGHT}
    found = {TOY: float(np.mean([*skills.values()])), **skills} if skills else {}
    for score in result.scores:
        if score.metric != RIGHT:
            found.setdefault(score.task, score.value)
            found[f"{score.task}/{score.metric}"] = score.value
    return found


def start_of(session: Session, config: DPOConfig) -> Phi2ForCausalLM | None:
    """The reference as a model beside the policy; None where it is the policy with its adapter off."""
    kind = reference_kind(config)
    if kind == "adapters_off":
        return None
    dtype = torch.float32 if config.lora is None else session.dtype
    if kind != "frozen_copy":
        return session.other(resolve(kind), dtype)
    model = load_model(resolve(config.model), pick_device(config.device), dtype)
    if config.adapter is not None:
        load_adapter(model, resolve(config.adapter))
    return model.requires_grad_(False)


def sample_answers(model: Phi2ForCausalLM, tokenizer: Tokenizer, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One answer to each prompt from the model's own distribution, the token that ends it included."""
    context, ids = model.config.max_position_embeddings, [prompt.tolist() for prompt in prompts]
    params = SamplingParams(max_new_tokens=ANSWER_TOKENS, temperature=1.0)
    length = min(context, max(map(len, ids)) + ANSWER_TOKENS)
    engine = kept_engine(model, choices_of(model, tokenizer), len(ids), length)
    answers: list[list[int]] = [[] for _ in ids]
    for number, chunk in replies_to(engine, tokenizer, ids, [params.of_row(i) for i in range(len(ids))]):
        answers[number].append(chunk.token_id)
    return [np.array(answer, dtype=np.int32) for answer in answers]


def log_probs(model: Phi2ForCausalLM, row: TokenRow, choices: int) -> Tensor:
    """(N, choices) log-probabilities of all ids that may be said, where each target of the row is predicted."""
    hidden = model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)
    return logits_of(model, predicting_states(hidden, row.logits_indices))[:, :choices].log_softmax(dim=-1)
