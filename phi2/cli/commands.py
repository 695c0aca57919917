"""The command line: one table of commands, each a function whose arguments are its flags.

Flags, their help and their checks come from the functions' signatures and docstrings, and for the training commands
from the fields of their config, so nothing is said twice (`flags.py`). `--config FILE.yaml` sets flags from a file,
flags given beside it win, `--print_config` shows the result.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phi2 import __version__
from phi2.cli.flags import UsageError, parse

DONE, FAILED, BAD_USAGE = 0, 1, 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell counts them: 128 and the number of SIGINT, of SIGPIPE


def answer(  # not `generate`: the parser would look under that name in the package, and load torch for it
    model: str,
    prompt: str,
    adapter: str | None = None,
    system: str | None = None,
    prompt_style: Literal["auto", "raw", "instruct", "chatml", "chat"] = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = 0,
    stop: list[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
) -> None:
    """Answer one prompt, streaming.

    Args:
        model: Folder, hub id, "nano" or "nano-instruct".
        prompt: The text; "-" reads it from standard input.
        adapter: Folder or hub id of a LoRA adapter.
        system: System message; the prompt is then a user's turn.
        prompt_style: How the model sees the prompt; auto is its chat template (chat) if it has one, else raw.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this probability.
        min_p: Keep tokens at least this many times as likely as the likeliest.
        repetition_penalty: Above 1, makes tokens that are there already less likely.
        seed: Of the sampling; null takes a new one and tells it.
        stop: String the answer ends before; give the flag again for another.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, float16, or auto.
        quantize: Keep the weights in 8 or 4 bits; an adapter is merged first, and auto is bfloat16 on a CPU too.
    """
    import phi2

    loaded, tokenizer = phi2.load(model, device, dtype, adapter=adapter, quantize=quantize)
    text = sys.stdin.read() if prompt == "-" else prompt
    style = ("raw" if tokenizer.chat_template is None else "chat") if prompt_style == "auto" else prompt_style
    if system is not None:
        if prompt_style not in ("auto", "chatml", "chat"):
            raise ValueError(f"system needs prompt_style chatml (or auto), got {prompt_style!r}")
        text, style = [{"role": "system", "content": system}, {"role": "user", "content": text}], None
    chunk = None
    for chunk in phi2.stream(
        loaded,
        tokenizer,
        text,
        prompt_style=style,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    ):
        print(chunk.text, end="", flush=True)
    print()
    if chunk is not None:
        print(
            f"{chunk.prompt_tokens} prompt tokens at {chunk.prompt_tps:.0f} tok/s,"
            f" {chunk.generation_tokens} generated at {chunk.generation_tps:.1f} tok/s, {chunk.finish_reason}"
            + ("" if chunk.seed is None else f", seed {chunk.seed}"),
            file=sys.stderr,
        )


def chat(
    model: str,
    adapter: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = 0,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
) -> None:
    """Talk with a model in the terminal; /help lists what can be typed.

    Args:
        model: Folder, hub id, "nano" or "nano-instruct".
        adapter: Folder or hub id of a LoRA adapter.
        system: System message.
        max_new_tokens: Tokens of a reply at most.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens up to this probability.
        repetition_penalty: Above 1, makes tokens that are there already less likely.
        seed: Of the sampling; null takes a new one and tells it.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, float16, or auto.
        quantize: Keep the weights in 8 or 4 bits; an adapter is merged first, and auto is bfloat16 on a CPU too.
    """
    import phi2
    from phi2.inference.chat import run_chat, told_if_untaught

    loaded, tokenizer = phi2.load(model, device, dtype, adapter=adapter, quantize=quantize)
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    session = phi2.ChatSession(loaded, tokenizer, system, repetition_penalty=repetition_penalty, **sampling)
    told = [told_if_untaught(loaded, tokenizer), f"seed {session.params.seed}" if seed is None else None]
    print("".join(f"{line}\n" for line in told if line), end="", file=sys.stderr)
    run_chat(session)


def sft(config: Any) -> None:
    """Supervised fine-tuning, with LoRA or in full."""
    from phi2.lab.report import write_report
    from phi2.training.sft import train

    _announce(run := train(config), write_report(run))


def dpo(config: Any) -> None:
    """Preference optimisation: DPO and its family, with LoRA or in full."""
    from phi2.lab.report import write_report
    from phi2.training.dpo import train

    _announce(run := train(config), write_report(run))


def _announce(run: Path, *files: Path) -> None:
    result = next(run / name for name in ("adapter", "model") if (run / name).exists())
    print("\n".join(f"wrote {path}" for path in (result, *files)))


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


def evaluate(
    model: str,
    adapter: str | None = None,
    questions: int = 100,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
) -> None:
    """Grade a model on the five toy skills, with 95 % intervals.

    Args:
        model: Folder, hub id, "nano" or "nano-instruct".
        adapter: Folder or hub id of a LoRA adapter.
        questions: Held-out questions of each skill.
        seed: Of the choice of questions.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, float16, or auto.
        quantize: Keep the weights in 8 or 4 bits; an adapter is merged first, and auto is bfloat16 on a CPU too.
    """
    import phi2
    from phi2.evaluation.toy import evaluate

    loaded, tokenizer = phi2.load(model, device, dtype, adapter=adapter, quantize=quantize)
    for skill, score in evaluate(loaded, tokenizer, questions, seed).items():
        print(f"{skill:<12} {score}")


def inspect(config: Any) -> None:
    """Show rows as a run would see them: every token, which ones are learnt, and the audit of all rows."""
    from phi2.data.inspect import inspect_data

    print(inspect_data(config))


def quickstart(output: str = "runs/quickstart", seed: int = 0) -> None:
    """Base, SFT, DPO, merge, grades, a chat and a report on the tiny embedded model, in minutes on a CPU.

    Args:
        output: Folder for the runs and the report.
        seed: Of everything that is drawn.
    """
    from phi2.demo.quickstart import quickstart

    quickstart(output, seed)


class Command(NamedTuple):
    """A function, and where its config class is if it takes one."""

    run: Callable[..., None]
    config: str = ""


COMMANDS = {
    "generate": Command(answer),
    "chat": Command(chat),
    "sft": Command(sft, "phi2.training.config:SFTConfig"),
    "dpo": Command(dpo, "phi2.training.config:DPOConfig"),
    "merge": Command(merge),
    "convert": Command(convert),
    "evaluate": Command(evaluate),
    "inspect": Command(inspect, "phi2.data.inspect:InspectConfig"),
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
        about = _about(command, asked=not {"-h", "--help"}.isdisjoint(arguments))
        parse(title, about, command.run, _config_class(command), arguments)()
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
    lines = [f"  {name:<12}{_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: phi2 COMMAND [flags]; phi2 COMMAND --help lists the flags; phi2 --version", "", *lines])


def _summary(command: Command) -> str:
    """First line of its docstring."""
    return (command.run.__doc__ or "").partition("\n")[0]


def _config_class(command: Command) -> type | None:
    module, _, name = command.config.partition(":")
    return getattr(importlib.import_module(module), name) if module else None


def _about(command: Command, asked: bool) -> str:
    """First line of the docstring; for dpo, when help is asked for, also the registered losses with their knobs."""
    about = _summary(command)
    if command.run is not dpo or not asked:
        return about
    from phi2.losses.registry import PREFERENCE_LOSSES

    knobs = {name: ", ".join(f"{k}={v}" for k, v in loss.knobs.items()) for name, loss in PREFERENCE_LOSSES.items()}
    return about + " Losses: " + "; ".join(f"{name}({text})" for name, text in knobs.items()) + "."
