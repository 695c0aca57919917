"""A Phi as a model of lm-evaluation-harness, registered there as `phi2`.

It answers as the harness's own `hf` model does: the same prompts and tokens, the same cuts from the left, the same
per-sample log-likelihoods and texts (tests/parity/test_harness_parity.py). It is faster, because requests are scored
in tries of their common prefixes, and it needs no transformers.

    import phi2.evaluation.harness                                  # registers it
    lm_eval.simple_evaluate("phi2", "pretrained=nano", tasks=[...])  # or give it an instance of `Phi2LM`
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from phi2.checkpoints.weights import load
from phi2.evaluation.answers import Answers
from phi2.evaluation.ranks import Ranks
from phi2.evaluation.replies import replies
from phi2.inference.config import SamplingParams
from phi2.inference.scoring import Request, score
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

MAX_GEN_TOKS = 256  # the harness's default for a task that says nothing
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MARK = "\ufdd2 "  # a noncharacter behind an unfinished turn, and a space that a template may trim

Pair = tuple[list[int], list[int]]  # token ids of a context and its continuation
Found = TypeVar("Found")


@register_model("phi2")
class Phi2LM(TemplateLM):
    """The three kinds of requests of the harness, answered by a Phi.

    Args:
        pretrained: a model, with its tokenizer; or what `phi2.load` takes, with any of its settings.
        answers: what was answered before, and the place for what is answered now.
        batch_size: answers that are written together at most; "auto" is what fits in memory.
        settings: of `phi2.load`: adapter, device, dtype, quantize, revision.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        pretrained: str | Phi2ForCausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        answers: Answers | None = None,
        batch_size: int | str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = _loaded(pretrained, tokenizer, settings)
        self.answers = answers
        self.batch_size = batch_size
        self._ranks = Ranks()
        self._encode = lru_cache(maxsize=64)(self.tokenizer.encode)  # options of a question have one context

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.count

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        self._ranks.barrier()

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in the harness's cache of requests."""
        said = f"{self.tokenizer.backend.to_str()}{self.tokenizer.chat_template}"
        return f"phi2-{sha256(said.encode()).hexdigest()[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that a conversation becomes; its last turn stays open if no prompt for another one is added."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except ValueError as error:
            turns = [message for message in chat_history if message["role"] != "system"]
            if len(turns) == len(chat_history):
                raise
            warnings.warn(f"system messages are left out: {error}", stacklevel=2)
            return self._rendered(turns, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.tokenizer.render(messages, add_generation_prompt=True)
        *earlier, last = messages
        text = self.tokenizer.render([*earlier, {**last, "content": last["content"] + MARK}])
        end = text.rindex(MARK.strip())
        return text[:end] if text.startswith(MARK, end) else text[:end].rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        def scored(rest: list[Instance]) -> list[tuple[float, bool]]:
            return TemplateLM.loglikelihood(self, rest, disable_tqdm=disable_tqdm)

        return [(total, bool(greedy)) for total, greedy in self._answered("loglikelihood", requests, scored)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        fitting = [Request(*self._cut(context, continuation)) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, scored in self._shown(score(self.model, fitting), len(fitting), "scoring", disable_tqdm):
            found[index] = (scored.total, scored.is_greedy)
            if (texts := requests[index][0]) is not None:
                self._keep("loglikelihood", texts, found[index])
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """The context without what the model has no room for, from the left; its last token predicts, and stays."""
        too_many = len(context) + len(continuation) - 1 - self.max_length
        return context[min(max(too_many, 0), len(context) - 1) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        def scored(rest: list[Instance]) -> list[float]:
            windows = [(i, pair) for i, request in enumerate(rest) for pair in self._windows(request.args[0])]
            parts = self._loglikelihood_tokens([(None, *pair) for _, pair in windows], disable_tqdm)
            totals = [0.0] * len(rest)
            for (i, _), (total, _) in zip(windows, parts, strict=True):
                totals[i] += total
            for request, total in zip(rest, totals, strict=True):
                self._keep("loglikelihood_rolling", request.args, total)
            return totals

        return self._answered("loglikelihood_rolling", requests, scored)

    def _windows(self, text: str) -> Iterator[Pair]:
        """A text in pieces that fit the model, each of its tokens predicted once."""
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def written(rest: list[Instance]) -> list[str]:
            texts = [""] * len(rest)
            with self._bar(len(rest), "writing", disable_tqdm) as bar:
                for index, text in self._replies([request.args for request in rest]):
                    texts[index] = text
                    self._keep("generate_until", rest[index].args, text)
                    bar.update()
            return texts

        return self._answered("generate_until", requests, written)

    def _replies(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, str]]:
        """Index and text of each answer; requests with the same settings are written together."""
        alike = defaultdict(list)
        for index, (_, settings) in enumerate(requests):
            alike[json.dumps(settings, sort_keys=True)].append(index)
        for indices in alike.values():
            until, params = self.sampling(requests[indices[0]][1])
            room = self.max_length - params.max_new_tokens
            prompts = [self.tok_encode(requests[index][0])[-room:] for index in indices]
            for turn, text in replies(self.model, self.tokenizer, prompts, params, self.batch_size):
                yield indices[turn], postprocess_generated_text(text, until, None)

    def sampling(self, settings: Mapping[str, Any]) -> tuple[list[str], SamplingParams]:
        """Where a text is cut, and how it is sampled.

        Raises:
            ValueError: for a setting that we do not have, and for more tokens than the model has room for.
        """
        known = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        until = handle_stop_sequences(known.pop("until"), eos=self.tokenizer.decode([self.eot_token_id], False))
        until = [text for text in until if text]
        tokens, draws = known.pop("max_gen_toks"), known.pop("do_sample")
        if unknown := [name for name in known if name not in SAMPLING]:
            allowed = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise ValueError(f"generation settings must be of {allowed}, got {', '.join(unknown)}")
        if tokens >= self.max_length:
            raise ValueError(
                f"{tokens} new tokens are asked for, more than the model's context of {self.max_length} has room for:"
                " give a smaller max_gen_toks"
            )
        chosen = known if draws else {}
        return until, SamplingParams(max_new_tokens=tokens, stop=until, **chosen)

    def _answered(
        self, kind: str, requests: list[Instance], answer: Callable[[list[Instance]], list[Found]]
    ) -> list[Found]:
        """What was answered before, and for the rest what is answered now."""
        if self.answers is None:
            return answer(requests)
        known = [self.answers.get(kind, request.args) for request in requests]
        rest = [request for request, found in zip(requests, known, strict=True) if found is None]
        fresh = iter(answer(rest) if rest else [])
        return [next(fresh) if found is None else found for found in known]

    def _keep(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        """For a run that goes on after a kill, and for the harness's own cache."""
        if self.answers is not None:
            self.answers.add(kind, args, answer)
        self.cache_hook.add_partial(kind, args, answer)

    def _shown(self, found: Iterable[Found], total: int, name: str, hidden: bool) -> Iterator[Found]:
        with self._bar(total, name, hidden) as bar:
            for one in found:
                yield one
                bar.update()

    def _bar(self, total: int, name: str, hidden: bool) -> tqdm:
        """Progress, with the time that is left."""
        return tqdm(total=total, desc=name, unit="request", dynamic_ncols=True, disable=hidden or self.rank != 0)


def _loaded(
    pretrained: str | Phi2ForCausalLM, tokenizer: Tokenizer | None, settings: Mapping[str, Any]
) -> tuple[Phi2ForCausalLM, Tokenizer]:
    if isinstance(pretrained, str) and tokenizer is None:
        return load(pretrained, **settings)
    if isinstance(pretrained, str) or tokenizer is None or settings:
        raise ValueError(f"give the name of a model with settings, or a model with its tokenizer; got {[*settings]}")
    return pretrained, tokenizer
