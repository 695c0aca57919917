"""An evaluation, whole: every model answers the same tasks, and what it says is kept, graded, tabled and compared."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phi2.evaluation import toy
from phi2.evaluation.config import TOY, EvaluateConfig, TasksConfig
from phi2.evaluation.models import load_named, require_chat_template, tokenizer_of
from phi2.evaluation.ranks import Ranks
from phi2.evaluation.report import write_report
from phi2.evaluation.results import Evaluation, ModelResult, scores_of
from phi2.evaluation.samples import Sample, samples_of, samples_of_toy
from phi2.files import require_folder, write_whole
from phi2.inference.config import LoadConfig
from phi2.keywords import config_of, explained
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phi2.evaluation.tasks import Loaded

Asked = tuple[Phi2ForCausalLM, Tokenizer]

OUTPUT = Path("runs/evaluate")
SEED = 1234  # the harness's own, of numpy, torch and the choice of shots; Python's begins at 0


@explained(EvaluateConfig)
def evaluate(model: Sequence[str] | str | Mapping[str, Asked], **settings: Any) -> Evaluation:
    """Scores of one model, or of several side by side.

    Args:
        model: name of a model, or several; or, by names of your own, models that are loaded, with their tokenizers.
        settings: the other fields of `EvaluateConfig`, which are the flags of `phi2 evaluate`.
    Raises:
        FileNotFoundError, ValueError: one line for settings, tasks, data or a model that cannot be used.
        KeyboardInterrupt: saying where the answers are, from which the same call goes on.
    """
    if not isinstance(model, Mapping):
        return run(config_of(EvaluateConfig, {"model": model, **settings}))
    if given := [field.name for field in fields(LoadConfig) if field.name in settings]:
        raise ValueError(f"{', '.join(given)} cannot change a model that is loaded already")
    return run(config_of(EvaluateConfig, {"model": [*model], **settings}), model)


def run(config: EvaluateConfig, loaded: Mapping[str, Asked] | None = None) -> Evaluation:
    """`evaluate` for settings in one object; models that are not in `loaded` are loaded one after the other."""
    ranks, loaded = Ranks.start(), loaded or {}
    _require_usable(config, loaded, ranks)
    tasks = tasks_of(config)
    output = Path(config.output or OUTPUT) if config.output is not None or tasks is not None else None
    if output is not None:
        require_folder(output)
    models: dict[str, ModelResult] = {}
    for name in config.model:
        asked = loaded.get(name) or load_named(name, replace(config, device=ranks.device(config.device)))
        models[name] = result_of(config, asked, tasks, output)
        del asked  # one at a time in memory
    evaluation = evaluation_of(config, models, tasks, output)
    if output is not None and ranks.rank == 0:
        write(evaluation, output)
    return evaluation


def _require_usable(config: EvaluateConfig, loaded: Mapping[str, Asked], ranks: Ranks) -> None:
    """What can be known before a task or a weight is read."""
    if ranks.count > 1 and TOY in config.tasks:
        raise ValueError(f"the toy skills are for one process, got {ranks.count}")
    if config.apply_chat_template:
        for name in config.model:
            require_chat_template(name, loaded[name][1] if name in loaded else tokenizer_of(name, config))


def tasks_of(config: TasksConfig) -> Loaded | None:
    """The tasks of the harness, with their data; None where only the toy skills are asked.

    Raises:
        FileNotFoundError, ValueError: without the harness, for an unknown task, and for data that cannot be had.
    """
    if not config.harness_tasks:
        return None
    try:
        from phi2.evaluation.tasks import load_tasks
    except ModuleNotFoundError as error:
        raise ValueError(f"tasks other than toy need the extra eval: pip install -e '.[eval]' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = load_tasks(config.harness_tasks, config.data_dir, config.num_fewshot)
    for task in loaded.tasks["tasks"].values():
        if config.max_gen_toks is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": config.max_gen_toks}, update=True)
    return loaded


def result_of(config: TasksConfig, asked: Asked, tasks: Loaded | None, output: Path | None) -> ModelResult:
    """Scores in the order in which the tasks were named.

    Args:
        output: folder of the answers to tasks of the harness, which are not asked again.
    """
    result = ModelResult([], [])
    reported, logged = ({}, {}) if tasks is None else _answer(config, asked, tasks, output)
    for name in config.tasks:
        if name == TOY:
            samples = samples_of_toy(toy.evaluate(*asked, config.questions, config.seed))
            result.samples.extend(samples)
            for skill in dict.fromkeys(sample.task for sample in samples):
                result.scores.extend(scores_of(skill, [sample for sample in samples if sample.task == skill]))
        elif tasks is not None:
            of_task = {part: samples_of(part, logged.get(part, [])) for part in tasks.samples_of[name]}
            result.samples.extend(sample for samples in of_task.values() for sample in samples)
            for part in [name] if name in reported else [*of_task]:  # a tag has no score of its own
                samples = of_task.get(part) or [sample for some in of_task.values() for sample in some]
                result.scores.extend(scores_of(part, samples, reported.get(part, {})))
    return result


def _answer(
    config: TasksConfig, asked: Asked, tasks: Loaded, output: Path | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the harness reports, and what it logs of every sample; nothing except on the first rank."""
    from lm_eval import evaluate

    from phi2.evaluation.answers import Answers, fingerprint
    from phi2.evaluation.harness import Phi2LM

    assert output is not None
    _seed(tasks)
    answers = Answers(output / "answers", fingerprint(*asked), Ranks().rank)
    settings = {name: getattr(config, name) for name in ("limit", "apply_chat_template", "fewshot_as_multiturn")}
    lm = Phi2LM(*asked, answers=answers)
    try:
        for task in tasks.tasks["tasks"].values():  # all of them, before the first answer
            if task.OUTPUT_TYPE == "generate_until":
                lm.sampling(task.config.generation_kwargs)
        found = evaluate(lm, tasks.tasks, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the answers so far are in {output}, the same command goes on") from None
    finally:
        answers.close()
    return (found["results"], found["samples"]) if found is not None else ({}, {})


def _seed(tasks: Loaded) -> None:
    """Every model sees the same shots: those that the harness draws by default."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in tasks.tasks["tasks"].values():
        task.set_fewshot_seed(SEED)


def evaluation_of(
    config: TasksConfig, models: dict[str, ModelResult], tasks: Loaded | None, output: Path | None
) -> Evaluation:
    """The results of models, with what a reader must know of the tasks."""
    return Evaluation(models, _notes(config, tasks), {} if tasks is None else tasks.files, output)


def _notes(config: TasksConfig, tasks: Loaded | None) -> list[str]:
    if tasks is None:
        return []
    from lm_eval import __version__

    turns = "a turn for each shot" if config.fewshot_as_multiturn else "all shots in one turn"
    shown = f"chat template, {turns}" if config.apply_chat_template else "no chat template"
    limit = "" if config.limit is None else f", the first {config.limit} samples of a task"
    shots = ", ".join(f"{name} {tasks.shots[name]}" for name in config.harness_tasks)
    notes = [f"lm-evaluation-harness {__version__}, {shown}{limit}; shots: {shots}"]
    if tasks.card:
        notes.append(
            "Published: the model card of phi-2-instruct-v0.1, with the chat template and a harness of August 2024,"
            " whose delimiter before an option under a template was another one; means over a task's metrics."
        )
    return notes + tasks.notes


def write(evaluation: Evaluation, output: Path) -> None:
    """results.json, report.html and the samples of each model."""
    (output / "samples").mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json.dumps(evaluation.to_dict(), indent=1))
    for name, model in evaluation.models.items():
        write_whole(output / "samples" / f"{slug(name)}.jsonl", "".join(map(_line, model.samples)))
    write_report(output / "report.html", evaluation)


def _line(sample: Sample) -> str:
    return json.dumps(vars(sample), ensure_ascii=False) + "\n"


def slug(name: str) -> str:
    """A model's name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")
