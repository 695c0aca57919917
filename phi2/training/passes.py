"""How an update is computed: its window cut into forward passes by their tokens.

The settings say what an update is, per_device_train_batch_size times gradient_accumulation_steps samples; how many of
them go through the model at a time changes no gradient, only time and memory. A pass holds up to `max_tokens_per_pass`
tokens, a shared prompt counted once. Unless that is set, it is what a GPU's memory holds, by the bytes that a token
needs, and on a CPU what is fastest there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from phi2.data.encoded import Encoded
from phi2.data.flat import largest
from phi2.losses.head import head_logps
from phi2.model import Phi2ForCausalLM
from phi2.training.config import TrainingConfig
from phi2.training.packing import best_fit
from phi2_kernels.linear_logprob import GPU_KEPT_BYTES

Cut = Callable[[Sequence[int]], list[list[int]]]  # of the tokens of each sample: the samples of each pass
Result = TypeVar("Result")
Attempt = Callable[[Callable[[], Any]], Any]  # gives what a computation gives, if need be in smaller passes
AUTO = "auto"
CPU_TOKENS = 2048  # of a pass: shorter ones cost more, longer ones gain nothing
PROBES = (64, 128)  # tokens of the passes on which memory is counted
SHARE = 0.9  # of a GPU's free memory; allocators leave gaps
HEAD_BYTES = 2**30  # of logits and their gradient, which the head has some rows at a time, and of its other tensors


class Passes:
    """The passes of a run.

    Attributes:
        max_tokens: of a pass; a sample with more has one to itself. A checkpoint keeps it.
        halved: whether the device's memory has not held one before.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.halved = max_tokens, False

    def cut(self, tokens: Sequence[int]) -> list[list[int]]:
        """The samples of each pass, in their order: as few passes as hold them, and these about even.

        Args:
            tokens: of each sample.
        """
        whole = best_fit(tokens, max(self.max_tokens, *tokens))
        even = _evenly(tokens, len(whole))
        fits = all(sum(tokens[i] for i in each) <= self.max_tokens for each in even)
        return [sorted(each) for each in (even if fits else whole)]

    def attempt(self, compute: Callable[[], Result], again: Callable[[], None]) -> Result:
        """The result of `compute`; where memory does not hold it, once more with passes of half as many tokens.

        Args:
            again: undoes what a failure has left.
        Raises:
            ValueError: when half is too much as well.
        """
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            if self.halved:
                raise ValueError(
                    f"max_tokens_per_pass {self.max_tokens}: the device's memory does not hold such a pass; set fewer,"
                    " a lower max_length, or gradient_checkpointing: true"
                ) from error
        self.max_tokens, self.halved = self.max_tokens // 2, True
        print(f"out of memory: going on with max_tokens_per_pass {self.max_tokens}")
        again()
        torch.cuda.empty_cache()
        return self.attempt(compute, again)


def once(compute: Callable[[], Result]) -> Result:
    """An `Attempt` at passes that the memory is known to hold."""
    return compute()


def _evenly(tokens: Sequence[int], passes: int) -> list[list[int]]:
    """The samples in so many passes, longest first, each to the pass that has fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(passes)]
    sums = [(0, place) for place in range(passes)]  # a heap
    for index in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        total, least = sums[0]
        parts[least].append(index)
        heapq.heapreplace(sums, (total + tokens[index], least))
    return parts


def passes_of(config: TrainingConfig, model: Phi2ForCausalLM, rows: Sequence[Encoded]) -> Passes:
    """Those of a run with these rows.

    Raises:
        ValueError: for a number of tokens that does not hold the longest row.
    """
    if config.max_tokens_per_pass == AUTO:
        return Passes(fitting_tokens(model) if has_own_memory(model.device) else CPU_TOKENS)
    longest = largest(rows, "tokens")
    if longest.tokens > int(config.max_tokens_per_pass):
        raise ValueError(
            f"max_tokens_per_pass {config.max_tokens_per_pass}: {longest.origin} has {longest.tokens} tokens"
        )
    return Passes(int(config.max_tokens_per_pass))


def tell_choice(passes: Passes, config: TrainingConfig, device: torch.device) -> None:
    """Prints what the free memory of a GPU has chosen: rounding follows it, and another run may find less."""
    if config.max_tokens_per_pass == AUTO and has_own_memory(device):
        print(f"max_tokens_per_pass {passes.max_tokens}, by the free memory of {device} when the run began")


def rewind_of(device: torch.device) -> Callable[[], None]:
    """What puts torch's random generators, the CPU's and the device's, back to where they are now."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return rewind


# ---- what a GPU holds ----


def fitting_tokens(model: Phi2ForCausalLM) -> int:
    """How many tokens of a pass the free memory of the model's GPU holds beside what training adds to it."""
    left = SHARE * free_bytes(model.device) - optimizer_bytes(model) - HEAD_BYTES
    return most_tokens(left, bytes_of_token(model), head_bytes_of_token(model))


def most_tokens(left: float, each: float, each_of_head: float) -> int:
    """How many tokens some memory holds, were each of them a target.

    Args:
        left: bytes.
        each: bytes of a token, the head apart.
        each_of_head: bytes of a token that the head keeps, up to its budget.
    """
    return max(1, int(left / (each + each_of_head)), int((left - GPU_KEPT_BYTES) / each))


def require_memory(config: TrainingConfig, model: Phi2ForCausalLM, rows: Sequence[Encoded]) -> None:
    """Refuses a row that a pass of its own cannot hold: what it keeps is more than all of the GPU's free memory.

    What a pass needs beside that is an estimate, so a row that may fit is tried. With a max_tokens_per_pass of one's
    own, any row is.

    Raises:
        ValueError: naming the longest row, and what would fit.
    """
    if config.max_tokens_per_pass != AUTO or not has_own_memory(model.device):
        return
    longest, room = largest(rows, "tokens"), free_bytes(model.device) - optimizer_bytes(model)
    try:
        fits = max(0, int(room / held_bytes_of_token(model)[0]))
    except torch.OutOfMemoryError:  # not even the passes that count
        fits = 0
    if longest.tokens > fits:
        held = f"the free memory of {model.device} holds a pass of {fits} at most"
        recompute = "" if config.gradient_checkpointing else ", gradient_checkpointing: true"
        raise ValueError(
            f"{longest.origin} has {longest.tokens} tokens, and {held}: set a lower max_length (for packing: wrapped,"
            f" packing_length){recompute}, or a max_tokens_per_pass that holds the row, to try it all the same"
        )


def has_own_memory(device: torch.device) -> bool:
    """Whether a pass is limited by the memory of the device, which says how much of it is free."""
    return device.type == "cuda"


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, with what torch has taken of it and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def optimizer_bytes(model: Phi2ForCausalLM) -> int:
    """A gradient and AdamW's two moments of all that is trained, in float32."""
    return 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def bytes_of_token(model: Phi2ForCausalLM) -> float:
    """Memory of one more token of a pass: what it holds for the backward pass, and what one block works with.

    Gradients of what a block has kept stand beside its own working memory.
    """
    held, of_block = held_bytes_of_token(model)
    return held + 2 * of_block


def held_bytes_of_token(model: Phi2ForCausalLM) -> tuple[float, float]:
    """Memory that one more token certainly holds when its backward pass begins, and how much of it one block keeps.

        kept without activation checkpointing; with it, L inputs of blocks, and what is kept of the block made again

    What is kept is counted on the model, since it depends on its adapters, dropout, dtype and kernels.
    """
    blocks, training = model.config.num_hidden_layers, model.training
    checkpointing = model.model.activation_checkpointing
    model.train().model.activation_checkpointing = False
    kept = kept_bytes_of_token(model)
    model.train(training).model.activation_checkpointing = checkpointing
    if not checkpointing:
        return kept, kept / blocks
    return blocks * model.config.hidden_size * model.dtype.itemsize + kept / blocks, kept / blocks


def kept_bytes_of_token(model: Phi2ForCausalLM) -> float:
    """Bytes that are kept of one more token for the backward pass of the blocks."""
    return _of_one_more(model, lambda tokens: model.model(torch.zeros_like(tokens)[None]))


def head_bytes_of_token(model: Phi2ForCausalLM) -> float:
    """Bytes that the head keeps of one more target: with a head that trains above all the gradient of its logits."""

    def logps(tokens: Tensor) -> object:
        hidden = model.model.embed_tokens.weight.new_zeros(len(tokens), model.config.hidden_size)
        return head_logps(model.lm_head, hidden.requires_grad_(), tokens % 2)

    return _of_one_more(model, logps)


def _of_one_more(model: Phi2ForCausalLM, forward: Callable[[Tensor], object]) -> float:
    """Bytes kept of one more token of a pass, given its places: the difference of two short passes."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        short, longer = (_kept_bytes(model, partial(forward, torch.arange(n, device=model.device))) for n in PROBES)
    return (longer - short) / (PROBES[1] - PROBES[0])


def _kept_bytes(model: Phi2ForCausalLM, forward: Callable[[], object]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = forward()
        total = sum(kept.values())
    del result  # until here all that is kept is alive, so no two tensors are at one address
    return total
