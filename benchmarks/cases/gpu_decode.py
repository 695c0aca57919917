"""Tokens per second of `phi2.generate` on a GPU: Phi-2 at full size in three forms, beside transformers' `generate`.

The whole loop is timed, from prompts to replies. A token of one reply needs every weight once, so the memory's speed is
the limit: bytes of the weights by the rate of a large copy. For eight replies at a time it is read once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import stream
from benchmarks.cases.block import implementation
from benchmarks.cases.step import BITS, rounded, step_work
from benchmarks.harness.gpu import PACKAGES, any_device, device, measured_rates
from benchmarks.harness.models import PHI2, TINY_WITH_TEXT, instruct_tokenizer, random_model, silence, twin
from benchmarks.registry import Cells, GateError, Measure, Report, Spread, case, versions
from phi2.checkpoints.weights import load_tokenizer
from phi2.config import Phi2Config
from phi2.hub import resolve
from phi2.inference.generate import generate_batch
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model
from phi2.tokenizer import Tokenizer

SHARES = {"bf16": 0.70, "int8": 0.55, "int4": 0.40}  # of the limit that the memory sets, wanted
BATCH, GAIN = 8, 5.0  # replies at a time, and how many times as fast as one they are to be
TEXT = "Write a detailed analogy between mathematics and a lighthouse. "
COMPILED = "transformers, compiled"


class Setting(NamedTuple):
    """What says how much, where.

    Attributes:
        prompt: of every reply, with its number behind it.
        tolerance: how far a log-probability may be from that in float32, in nats.
    """

    config: Phi2Config
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    prompt: str
    new_tokens: int
    tolerance: float

    def model(self, format: str | None) -> Phi2ForCausalLM:
        """The same random model each time, rounded as a format rounds it; its replies never end."""
        model = random_model(self.config, self.device, self.dtype)
        silence(model, [*range(len(self.tokenizer), self.config.vocab_size), *self.tokenizer.stop_ids])
        return rounded(model, format)

    @property
    def prompts(self) -> list[str]:
        return [f"{self.prompt}{number}" for number in range(BATCH)]


class Said(NamedTuple):
    """One reply; log-probabilities are missing where nobody tells them."""

    token_ids: list[int]
    logprobs: list[float] | None = None


class Side(NamedTuple):
    """Who says something, whose weights are rounded how, and to how many prompts at a time."""

    say: Callable[[Sequence[str]], list[Said]]
    format: str | None = None
    batch: int = 1


def full() -> Setting:
    return Setting(PHI2, device(), torch.bfloat16, instruct_tokenizer(), TEXT * 8, 256, 0.1)


def tiny() -> Setting:
    return Setting(TINY_WITH_TEXT, any_device(), torch.float32, load_tokenizer(resolve("nano")), TEXT, 4, 1e-3)


@case(
    "gpu_decode_vs_transformers",
    turns=5,
    summary="phi2.generate of Phi-2: 256 tokens in bf16, int8 and int4, and eight replies at a time",
    tiny=lambda: report_of_gate(tiny()),
)
def gpu_decode_vs_transformers(turns: int) -> Report:
    return compare_decoding(full(), turns)


def report_of_gate(setting: Setting) -> Report:
    whole = setting.model(None)
    sides = our_sides(setting, whole) | their_sides(setting, whole)
    return Report(versions(*PACKAGES), judged(setting, sides), [], {"sides": "; ".join(sides)})


def compare_decoding(setting: Setting, turns: int) -> Report:
    """Ours and transformers' loop; then the latter compiled, which takes long: what is known by then is told."""
    whole = setting.model(None)
    sides, theirs = our_sides(setting, whole), their_sides(setting, whole)
    compiled = {COMPILED: theirs.pop(COMPILED)}
    gate = judged(setting, sides | theirs)
    speeds = tokens_per_second(setting, sides, turns) | tokens_per_second(setting, theirs, 1)
    measures, facts = against_the_limit(setting, speeds), dict[str, str | int | float]()
    stream.measured("decoding", measures)
    try:
        judged(setting, compiled)
        speeds |= tokens_per_second(setting, compiled, 1)
    except (GateError, RuntimeError) as error:
        facts[f"without {COMPILED}"] = str(error).strip().splitlines()[0][:160]
    names = [name for name in speeds if name.startswith("transformers")]
    beside = [Measure.of(f"bf16: {name}", "tok/s", speeds["bf16"], speeds[name], more_is_better=True) for name in names]
    stream.measured("transformers", beside)
    return Report(versions("transformers", *PACKAGES), gate, measures + beside, facts, table_of(speeds))


def table_of(speeds: dict[str, list[float]]) -> list[Cells]:
    spreads = {name: Spread.of(each) for name, each in speeds.items()}
    return [
        {"side": name, "tok/s": round(median, 1), "20 %": round(low, 1), "80 %": round(high, 1)}
        for name, (low, median, high) in spreads.items()
    ]


# ---- who says something ----


def our_sides(setting: Setting, whole: Phi2ForCausalLM) -> dict[str, Side]:
    sides = {"bf16": Side(partial(we_say, setting, whole))}
    for format in ("int8", "int4"):
        model = setting.model(None)
        quantize_model(model, format)
        sides[format] = Side(partial(we_say, setting, model), format)
    return sides | {f"bf16, {BATCH} replies": Side(sides["bf16"].say, batch=BATCH)}


def we_say(setting: Setting, model: Phi2ForCausalLM, prompts: Sequence[str]) -> list[Said]:
    replies = generate_batch(model, setting.tokenizer, prompts, max_new_tokens=setting.new_tokens, temperature=0.0)
    return [Said(reply.token_ids, reply.logprobs) for reply in replies]


def their_sides(setting: Setting, whole: Phi2ForCausalLM) -> dict[str, Side]:
    """With the cache that grows, and with the one of fixed size, for which their loop compiles the model by itself."""
    model = twin(whole)
    say = partial(they_say, setting, model)
    return {"transformers": Side(say), COMPILED: Side(partial(say, cache_implementation="static"))}


def they_say(setting: Setting, model: nn.Module, prompts: Sequence[str], **options: str) -> list[Said]:
    (prompt,) = prompts
    ids = torch.tensor([setting.tokenizer.encode_prompt(prompt, "raw")], device=setting.device)
    length = dict(max_new_tokens=setting.new_tokens, do_sample=False, pad_token_id=0)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)
    return [Said(said[0, ids.shape[1] :].tolist())]


# ---- the gate ----


def judged(setting: Setting, sides: dict[str, Side]) -> str:
    """The gate in words: what all sides say is what float32 would say, but for rounding.

    Raises:
        GateError: when a log-probability is off, or a token that was taken is not the likeliest but for that much.
    """
    worst = 0.0
    for format in BITS:
        named = {name: side for name, side in sides.items() if side.format == format}
        reference = setting.model(format).float() if named else None
        for name, side in named.items():
            prompts = setting.prompts[: side.batch]
            for prompt, said in zip(prompts, side.say(prompts), strict=True):
                off = _off(setting, reference, prompt, said)
                worst = max(worst, off)
                if not off <= setting.tolerance:
                    raise GateError(f"{name}: off by {off:.1e} nats, allowed {setting.tolerance:.0e}")
    return f"greedy tokens and their log-probabilities within {worst:.1e} nats of float32"


@torch.no_grad()
def _off(setting: Setting, reference: Phi2ForCausalLM, prompt: str, said: Said) -> float:
    """How far a reply is from what the reference would say at each of its places, in nats.

    The log-probabilities are off by the difference; a token by half of what it is less likely than the likeliest, for
    both may be off by so much.
    """
    ids = setting.tokenizer.encode_prompt(prompt, "raw")
    if len(said.token_ids) != setting.new_tokens:
        raise GateError(f"{len(said.token_ids)} tokens in place of {setting.new_tokens}")
    whole = torch.tensor([ids + said.token_ids], device=setting.device)
    with implementation("torch"):
        logps = reference(whole)[0, len(ids) - 1 : -1].float().log_softmax(-1)  # (new tokens, V)
    taken = logps.gather(1, whole[0, len(ids) :, None])[:, 0]
    off = (logps.amax(-1) - taken).max().item() / 2
    if said.logprobs is None:
        return off
    return max(off, (torch.tensor(said.logprobs, device=setting.device) - taken).abs().max().item())


# ---- the clock ----


def tokens_per_second(setting: Setting, sides: dict[str, Side], turns: int) -> dict[str, list[float]]:
    """Of all replies of a call together; the gate has called each side once. They take turns."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            prompts, start = setting.prompts[: side.batch], time.perf_counter()
            tokens = sum(len(said.token_ids) for said in side.say(prompts))  # read on the host, so the GPU is done
            speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def against_the_limit(setting: Setting, speeds: dict[str, list[float]]) -> list[Measure]:
    """Each form beside the memory's speed, and many replies beside one."""
    rate, measures = 1e9 * measured_rates().gbytes, []
    for (format, bits), (name, share) in zip(BITS.items(), SHARES.items(), strict=True):
        assert format in (None, name)
        limit = rate / step_work(setting.config, 0, *bits).bytes
        label = f"{name}: the memory's limit"
        measures.append(Measure.of(label, "tok/s", speeds[name], [limit], target=share, more_is_better=True))
    many = f"bf16, {BATCH} replies"
    gain = Measure.of(f"{many}: one", "tok/s", speeds[many], speeds["bf16"], target=GAIN, more_is_better=True)
    return [*measures, gain]
