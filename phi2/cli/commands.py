"""The command line: one table of commands, each a function whose arguments are its flags.

Flags, their help and their checks come from the fields of a command's config, or from the signature and docstring of
its function, and what a registry holds from the registry, so nothing is said twice (`flags.py`). `--config FILE.yaml`
sets flags from a file, flags given beside it win, `--print_config` shows the result.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phi2 import __version__
from phi2.cli.flags import UsageError, parse

if TYPE_CHECKING:
    from phi2.answers.config import SamplePairsConfig
    from phi2.cli.configs import GenerateConfig
    from phi2.data.inspect import InspectConfig
    from phi2.evaluation.config import EvaluateConfig
    from phi2.inference.config import ReplyConfig
    from phi2.lab.compare_config import CompareConfig
    from phi2.lab.verify_config import VerifyConfig
    from phi2.runs.run import Run
    from phi2.serve.config import DemoConfig, ServeConfig
    from phi2.training.config import DPOConfig, SFTConfig

DONE, FAILED, BAD_USAGE = 0, 1, 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell counts them: 128 and the number of SIGINT, of SIGPIPE


def generate(config: GenerateConfig) -> None:
    """Answer a prompt, streaming, or a file of prompts."""
    import phi2

    if config.prompts is not None:
        from phi2.answers.answer import answer_file

        return print(answer_file(config.ask_config()))
    loaded, tokenizer = config.load()
    text: Any = sys.stdin.read() if config.prompt == "-" else config.prompt
    own_style = "raw" if tokenizer.chat_template is None else "chat"
    style: str | None = own_style if config.prompt_style == "auto" else config.prompt_style
    if config.system is not None:
        text, style = [{"role": "system", "content": config.system}, {"role": "user", "content": text}], None
    chunk = None
    for chunk in phi2.stream(loaded, tokenizer, text, prompt_style=style, **config.sampling):
        print(chunk.text, end="", flush=True)
    print()
    if chunk is not None:
        print(
            f"{chunk.prompt_tokens} prompt tokens at {chunk.prompt_tps:.0f} tok/s,"
            f" {chunk.generation_tokens} generated at {chunk.generation_tps:.1f} tok/s, {chunk.finish_reason}"
            + ("" if chunk.seed is None else f", seed {chunk.seed}"),
            file=sys.stderr,
        )


def chat(config: ReplyConfig) -> None:
    """Talk with a model in the terminal; /help lists what can be typed."""
    import phi2
    from phi2.inference.chat import run_chat, told_if_untaught

    loaded, tokenizer = config.load()
    session = phi2.ChatSession(loaded, tokenizer, config.system, **config.sampling)
    seed = f"seed {session.params.seed}" if config.seed is None else None
    told = [told_if_untaught(loaded, tokenizer), seed]
    print("".join(f"{line}\n" for line in told if line), end="", file=sys.stderr)
    run_chat(session)


def sample_pairs(config: SamplePairsConfig) -> None:
    """Make a preference set of a model's own answers, scored by a function of yours."""
    from phi2.answers.pairs import sample

    print(sample(config))


def sft(config: SFTConfig) -> None:
    """Supervised fine-tuning, with LoRA or in full."""
    from phi2.lab.report import write_report
    from phi2.training.sft import train

    _announce(run := train(config), write_report(run))


def dpo(config: DPOConfig) -> None:
    """Preference optimisation: DPO and its family, with LoRA or in full."""
    from phi2.lab.report import write_report
    from phi2.training.dpo import train

    _announce(run := train(config), write_report(run))


def compare(config: CompareConfig) -> None:
    """Compare loss variants over several seeds: one session, a table with intervals, a report."""
    from phi2.lab.compare import run

    comparison = run(config)
    print(f"\n{comparison}\nwrote {comparison / 'report.html'}, results.jsonl and cells/ beside it")


def verify(config: VerifyConfig) -> None:
    """Hold a model's numbers to what this project promises of them: green or red, line by line."""
    from phi2.lab.verify import run

    verification = run(config)
    print(verification.shown(color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if verification.red:
        raise ValueError(f"{len(verification.red)} of {len(verification.lines)} lines are red")


def replay(
    run: str,
    losses: str | list[str | dict[str, Any]] | None = None,
    loss_file: str | None = None,
    evaluation: str = "last",
    output: str | None = None,
) -> None:
    """Any loss on the log-probs that a run kept: values, weights, dominant pairs, disagreements; no model needed.

    Args:
        run: Folder of a preference run or of its ledger; it may also stand first, without the flag.
        losses: As in phi2 compare, with commas between: sigmoid,ipo(beta=0.3),simpo(gamma=1.0); unset, the run's own.
        loss_file: Python file of yours that registers losses.
        evaluation: Step of one of the run's evaluations, last, or all.
        output: File for a line of JSON for each evaluation, loss and pair.
    """
    from phi2.lab.replay_table import replay_run, report_of, write_lines

    evaluations = replay_run(run, losses, loss_file, evaluation)
    print(report_of(evaluations))
    if output is not None:
        write_lines(output, evaluations)
        print(f"\nwrote {output}")


def _announce(run: Run, *files: Path) -> None:
    result = next(run / name for name in ("adapter", "model") if (run / name).exists())
    print("\n".join(f"wrote {path}" for path in (result, *files)))


def losses(name: str | None = None, loss_file: str | None = None, markdown: bool = False) -> None:
    """List the preference losses; `phi2 losses NAME` explains one and draws it.

    Args:
        name: A loss, a preset or a mixture; it may also stand first, without the flag.
        loss_file: Python file of yours that registers losses, run before the name is looked up.
        markdown: Print docs/losses.md.
    """
    from phi2.losses import table
    from phi2.losses.registry import load_loss_file

    if markdown and (name or loss_file):
        raise ValueError("markdown prints the losses of this package; it goes without name and loss_file")
    if name is not None:
        return print(table.page(name, loss_file))
    if loss_file is not None:
        load_loss_file(loss_file)
    print(table.document() if markdown else table.overview(), end="" if markdown else "\n")


def merge(model: str, adapter: str, output: str, dtype: str | None = None) -> None:
    """Add a LoRA adapter to the weights it was trained on.

    Args:
        model: Folder or hub id of the base the adapter was trained on.
        adapter: Folder or hub id of the adapter.
        output: Folder to write; it must be empty or new.
        dtype: float32, bfloat16 or float16; unset, that of the base.
    """
    from phi2.checkpoints.convert import merge_adapter

    print(f"wrote {merge_adapter(model, adapter, output, dtype)}")


def convert(
    model: str, output: str, dtype: str | None = None, vocab_size: int | None = None, add_chatml: bool = False
) -> None:
    """Write a checkpoint in another dtype, with another vocabulary, or with ChatML tokens.

    Args:
        model: Folder or hub id.
        output: Folder to write; it must be empty or new.
        dtype: float32, bfloat16 or float16; unset, as it is.
        vocab_size: Rows of the embedding and the head; unset, as it is.
        add_chatml: Give the tokenizer <|im_start|>, <|im_end|> and the ChatML template.
    """
    from phi2.checkpoints.convert import convert

    print(f"wrote {convert(model, output, dtype, vocab_size, add_chatml)}")


def evaluate(config: EvaluateConfig) -> None:
    """Grade models: the five toy skills, or tasks of lm-evaluation-harness beside the model card of phi-2-instruct."""
    from phi2.evaluation.api import run

    evaluation = run(config)
    print(evaluation)
    if evaluation.output is not None:
        print(f"wrote {evaluation.output / 'report.html'}, results.json and samples/ beside it")


def demo(config: DemoConfig) -> None:
    """Chat in the browser, and compare models token by token."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the page needs gradio: pip install -c constraints.txt -e ".[demo]"')
    from phi2.serve.web import demo

    demo(config.model, config.adapters, config.device, config.dtype, config.host, config.port)


def inspect(config: InspectConfig) -> None:
    """Show rows as a run would see them: every token, which ones are learnt, and the audit of all rows."""
    from phi2.data.inspect import inspect_data

    print(inspect_data(config))


def serve(config: ServeConfig) -> None:
    """Answer OpenAI's API: chats, completions and log-probs, for many clients at once."""
    from phi2.serve.server import serve

    serve(config, config.load_served)


def quickstart(output: str = "runs/quickstart", seed: int = 0) -> None:
    """Base, SFT, DPO, merge, grades, a chat and a report on the tiny embedded model, in minutes on a CPU.

    Args:
        output: Folder for the runs and the report.
        seed: Of everything that is drawn.
    """
    from phi2.demo.quickstart import quickstart

    quickstart(output, seed)


def named_sources() -> str:
    """What `--data` takes beside files and hub data sets."""
    from phi2.data.sources import SOURCES, TOYS

    return f"Named sources: {', '.join([*SOURCES, *TOYS])}."


def named_prompts() -> str:
    """What `--prompts` takes beside files and hub data sets."""
    from phi2.data.prompts import TOY
    from phi2.data.sources import SOURCES

    return f"Named sources: {', '.join([*SOURCES, TOY])}."


def named_scores() -> str:
    """What `--score` takes beside a function of one's own."""
    from phi2.answers.score import SCORES

    return f"Named scores: {', '.join(SCORES)}."


def registered_losses() -> str:
    """What `--loss` takes, with the knobs of each."""
    from phi2.losses.registry import PREFERENCE_LOSSES

    knobs = {name: ", ".join(f"{k}={v}" for k, v in loss.knobs.items()) for name, loss in PREFERENCE_LOSSES.items()}
    return f"One of {'; '.join(f'{name}({text})' for name, text in knobs.items())}; or one of loss_file."


def registered_modifiers() -> str:
    """What `--loss_args` takes with any loss."""
    from phi2.losses.modifiers import MODIFIERS

    knobs = [f"{k}={v}" for each in MODIFIERS.values() for k, v in each.knobs.defaults.items()]
    return f"With any loss: {', '.join(knobs)}."


class Command(NamedTuple):
    """A function, where its config class is if it takes one, flags whose help a registry completes, and the flag whose
    value may stand first without it."""

    run: Callable[..., None]
    config: str = ""
    choices: Mapping[str, Callable[[], str]] = {}
    first: str | None = None


COMMANDS = {
    "generate": Command(generate, "phi2.cli.configs:GenerateConfig", {"prompts": named_prompts}),
    "chat": Command(chat, "phi2.inference.config:ReplyConfig"),
    "sft": Command(sft, "phi2.training.config:SFTConfig", {"data": named_sources}),
    "dpo": Command(
        dpo,
        "phi2.training.config:DPOConfig",
        {"data": named_sources, "loss": registered_losses, "loss_args": registered_modifiers},
    ),
    "compare": Command(
        compare,
        "phi2.lab.compare_config:CompareConfig",
        {"data": named_sources, "losses": registered_losses, "loss_args": registered_modifiers},
    ),
    "verify": Command(verify, "phi2.lab.verify_config:VerifyConfig", {"data": named_sources}),
    "replay": Command(replay, choices={"losses": registered_losses}, first="run"),
    "losses": Command(losses, first="name"),
    "sample_pairs": Command(
        sample_pairs, "phi2.answers.config:SamplePairsConfig", {"prompts": named_prompts, "score": named_scores}
    ),
    "merge": Command(merge),
    "convert": Command(convert),
    "evaluate": Command(evaluate, "phi2.evaluation.config:EvaluateConfig"),
    "demo": Command(demo, "phi2.serve.config:DemoConfig"),
    "inspect": Command(inspect, "phi2.data.inspect:InspectConfig", {"data": named_sources}),
    "serve": Command(serve, "phi2.serve.config:ServeConfig"),
    "quickstart": Command(quickstart),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0 done, 1 failed, 2 bad usage, 130 interrupted, 141 when whoever read the output has gone.
    """
    try:
        try:
            return _command(*((sys.argv[1:] if argv is None else argv) or ["--help"]))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return PIPE_CLOSED


def _command(name: str, *arguments: str) -> int:
    if name in ("-h", "--help"):
        print(overview())
        return DONE
    if name in ("-V", "--version"):
        print(f"phi2 {__version__}")
        return DONE
    if name not in COMMANDS:
        return _fail("phi2", f"command must be one of {', '.join(COMMANDS)}, got {name!r}", BAD_USAGE)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"phi2 {name}: warning: {message}", file=sys.stderr)
        return _run(f"phi2 {name}", COMMANDS[name], list(arguments))


def _run(title: str, command: Command, arguments: list[str]) -> int:
    try:
        if command.first is not None and arguments and not arguments[0].startswith("-"):
            arguments = [f"--{command.first}", *arguments]
        asked = not {"-h", "--help"}.isdisjoint(arguments)
        choices = {flag: read() for flag, read in command.choices.items()} if asked else {}
        parse(title, _summary(command), command.run, _config_class(command), arguments, choices)()
    except UsageError as error:
        return _fail(title, str(error), BAD_USAGE)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(title, str(error), FAILED)
    except RuntimeError as error:  # torch's, which is not imported here: `phi2 --help` does without it
        _, is_memory, reason = str(error).partition("DefaultCPUAllocator: ")
        if type(error).__name__ == "OutOfMemoryError":  # of a GPU
            return _fail(title, str(error), FAILED)
        if not is_memory:
            raise
        return _fail(title, f"out of memory: {reason}", FAILED)
    except KeyboardInterrupt as interrupt:
        return _fail(title, str(interrupt) or "interrupted", INTERRUPTED)
    return DONE


def _fail(command: str, message: str, code: int) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return code


def overview() -> str:
    """What `phi2 --help` prints."""
    lines = [f"  {name:<13}{_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: phi2 COMMAND [flags]; phi2 COMMAND --help lists the flags; phi2 --version", "", *lines])


def _summary(command: Command) -> str:
    """First line of its docstring."""
    return (command.run.__doc__ or "").partition("\n")[0]


def _config_class(command: Command) -> type | None:
    module, _, name = command.config.partition(":")
    return getattr(importlib.import_module(module), name) if module else None
