"""A conversation that goes on: `ChatSession` for programs, `run_chat` for the terminal.

The session renders the whole conversation for every turn. Its engine keeps what it has read: the longest common prefix
is taken over and only the rest is computed, so an edited, trimmed or interrupted conversation is right without special
cases: what changed is simply not a prefix any more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from phi2.config import Phi2Config
from phi2.files import write_whole
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine
from phi2.inference.generate import check_prompt, choices_of, replies_to, require_loaded
from phi2.inference.replies import Chunk
from phi2.keywords import made_of
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

HELP = '''/help          this list
/reset         forget the conversation, keep the system message
/system TEXT   set the system message; without TEXT there is none
/save FILE     write the conversation as JSON
/exit          leave, as Ctrl-D does
"""            opens a message of several lines, and closes it; a \\ at the end of a line goes on to the next
Ctrl-C         stops a reply; at the prompt it leaves'''
FENCE = '"""'

GREETING = ({"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help you today?"})
TAUGHT = 0.01  # chat models end such a turn with a hundred times this probability, base models with a millionth of it

ReadLine = Callable[[str], str | None]  # shows a prompt; None at the end of the input


class ChatSession:
    """A conversation with one model, whose weights must stay as they are while it lasts.

    Args:
        system: the system message, if any; it is never trimmed.
        sampling: the fields of `SamplingParams`. Every turn draws from the seed afresh, so a reply depends on nothing
            but the conversation.

    Attributes:
        system: may be set at any time.
        messages: user and assistant turns the model is shown, as dicts of role and content; may be edited.
        trimmed: older messages that no longer fit the context.
        notice: what the last turn has to tell the user (that turns were trimmed), or None.

    Raises:
        ValueError: for a setting out of range, or a tokenizer without a chat template.
    """

    def __init__(self, model: Phi2ForCausalLM, tokenizer: Tokenizer, system: str | None = None, **sampling) -> None:
        require_loaded(model, tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError("a chat needs a tokenizer with a chat template; this one has none")
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.params = made_of(SamplingParams, sampling)
        self.reset()
        self._engine = Engine(model, choices_of(model, tokenizer), slots=1)

    def reset(self) -> None:
        """Forgets the conversation and keeps the system message."""
        self.messages: list[dict[str, str]] = []
        self.trimmed: list[dict[str, str]] = []
        self.notice: str | None = None

    @property
    def transcript(self) -> list[dict[str, str]]:
        """The whole conversation, the trimmed messages included."""
        return [*self._system_turn(), *self.trimmed, *self.messages]

    def reply(self, text: str) -> str:
        """The whole reply to `text`; errors are those of `send`."""
        return "".join(chunk.text for chunk in self.send(text))

    def send(self, text: str) -> Generator[Chunk, None, None]:
        """The reply to `text` as it is made; nothing happens before the iteration starts.

        Turns of the past that leave no room for this one and max_new_tokens (half of the context at most) are trimmed,
        oldest first. A reply that is interrupted after its first token is kept as far as it got; before that, it is as
        if nothing had been sent.

        Raises:
            ValueError: when the message does not fit the context even alone, or logits are not finite.
        """
        turn = {"role": "user", "content": text}
        conversation = [*self._system_turn(), *self.messages, turn]
        ids, dropped = fit_context(self.tokenizer, self.model.config, conversation, self.params.max_new_tokens)
        self._trim(dropped)
        pieces: list[str] = []
        try:
            for _, chunk in replies_to(self._engine, self.tokenizer, [ids], [self.params]):
                pieces.append(chunk.text)
                yield chunk
        finally:
            if pieces:
                self.messages += [turn, {"role": "assistant", "content": "".join(pieces)}]

    def save(self, path: str | Path) -> None:
        """Writes `{"messages": [...]}`, a row that supervised fine-tuning reads, whole or not at all."""
        write_whole(Path(path), json.dumps({"messages": self.transcript}, indent=2, ensure_ascii=False) + "\n")

    def _system_turn(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _trim(self, dropped: int) -> None:
        self.notice = told_if_trimmed(dropped, self.model.config)
        self.trimmed += self.messages[:dropped]
        self.messages = self.messages[dropped:]


def fit_context(
    tokenizer: Tokenizer, config: Phi2Config, conversation: Sequence[Mapping[str, str]], max_new_tokens: int
) -> tuple[list[int], int]:
    """The prompt of a conversation, without its oldest turns where those leave no room for the reply.

    Args:
        conversation: its last message and, at the beginning, a system message always stay.
        max_new_tokens: room for the reply; half of the context at most.

    Returns:
        Token ids, and how many of the oldest messages are not in them.

    Raises:
        ValueError: when the last message does not fit the context even alone.
    """
    context, last = config.max_position_embeddings, len(conversation) - 1
    longest = context - min(max_new_tokens, context // 2)
    start = first = int(conversation[0]["role"] == "system")
    while True:
        ids = tokenizer.encode_chat([*conversation[:first], *conversation[start:]], add_generation_prompt=True)
        if len(ids) <= longest or start == last:
            check_prompt(ids, config)
            return ids, start - first
        start = next((i for i in range(start + 1, last) if conversation[i]["role"] == "user"), last)


def told_if_trimmed(dropped: int, config: Phi2Config) -> str | None:
    """What to tell whose conversation `fit_context` has shortened by so many messages."""
    if not dropped:
        return None
    return f"the {dropped} oldest messages no longer fit the context of {config.max_position_embeddings} tokens"


@torch.no_grad()
def turn_end_probability(model: Phi2ForCausalLM, tokenizer: Tokenizer) -> float | None:
    """How likely the model ends its turn where a greeting is complete: whether it was taught its chat template.

    One pass over some twenty tokens. None where the template has no token that ends a turn, or no room.
    """
    if tokenizer.turn_end_id is None:
        return None
    answer = GREETING[1]["content"]
    before, _, _ = tokenizer.render(GREETING).rpartition(answer)
    ids = tokenizer.encode(before + answer)
    if len(ids) > model.config.max_position_embeddings:
        return None
    logits = model(torch.tensor([ids], device=model.device))[0, -1]  # (V,)
    return logits.float().softmax(dim=-1)[tokenizer.turn_end_id].item()


def told_if_untaught(model: Phi2ForCausalLM, tokenizer: Tokenizer) -> str | None:
    """What to tell who is about to chat with a model that was hardly taught to; None of any other."""
    probability = turn_end_probability(model, tokenizer)
    if probability is None or probability >= TAUGHT:
        return None
    return (
        f"this model was hardly taught to chat: after a reply it ends its turn with probability {probability:.0e};"
        " fine-tune it first (phi2 sft), or take a chat model such as nano-instruct"
    )


def run_chat(session: ChatSession) -> None:
    """Chats on the terminal, or over piped lines, until /exit, the end of the input or Ctrl-C at the prompt.

    Replies go to standard output, everything else to standard error.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        _load_line_editing()
        _say("/help lists the commands")
    read = _line_reader(interactive)
    try:
        while (line := read("> ")) is not None:
            if line.startswith("/"):
                if not _run_command(session, line):
                    return
            elif (message := _whole_message(line, read)).strip():
                _answer(session, message.strip("\n"), interactive)
    except KeyboardInterrupt:
        _say("")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load_line_editing() -> None:
    """Arrow keys and history at the prompt, where Python was built with them."""
    try:
        import readline  # noqa: F401  (importing it is what changes input())
    except ImportError:
        pass


def _line_reader(interactive: bool) -> ReadLine:
    def read(prompt: str) -> str | None:
        try:
            return input(prompt if interactive else "")
        except EOFError:
            if interactive:
                _say("")
            return None

    return read


def _whole_message(line: str, read: ReadLine) -> str:
    """`line` with the lines that belong to it: up to the closing fence, or while a backslash ends them."""
    if line.startswith(FENCE):
        text = line.removeprefix(FENCE)
        while not text.endswith(FENCE) and (more := read("... ")) is not None:
            text += "\n" + more
        return text.removesuffix(FENCE)
    while line.endswith("\\"):
        line = line.removesuffix("\\") + "\n" + (read("... ") or "")
    return line


def _run_command(session: ChatSession, line: str) -> bool:
    """Obeys a line that starts with "/"; False to leave."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    match name:
        case "/exit":
            return False
        case "/help":
            _say(HELP)
        case "/reset":
            session.reset()
            _say("the conversation is forgotten")
        case "/system":
            session.system = argument or None
            _say("the system message is set" if argument else "there is no system message")
        case "/save":
            _save(session, argument)
        case _:
            _say(f"no command {name}; /help lists them, and {FENCE} opens a message that may start with /")
    return True


def _save(session: ChatSession, name: str) -> None:
    if not name:
        _say("/save needs the name of a file")
        return
    try:
        session.save(Path(name).expanduser())
        _say(f"saved to {name}")
    except OSError as error:
        _say(f"cannot save to {name!r}: {error.strerror}")  # all of it would name the unfinished file
    except ValueError as error:
        _say(f"cannot save to {name!r}: {error}")


def _answer(session: ChatSession, message: str, interactive: bool) -> None:
    """Prints the reply as it comes; Ctrl-C ends the reply and nothing else."""
    chunk = None
    with closing(session.send(message)) as chunks:
        try:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ValueError as error:
            _say(f"error: {error}")
    print(flush=True)
    if session.notice:
        _say(session.notice)
    if interactive and chunk and chunk.finish_reason:
        _say(f"\x1b[2m{chunk.generation_tokens} tokens, {chunk.generation_tps:.1f} tok/s, {chunk.finish_reason}\x1b[0m")
