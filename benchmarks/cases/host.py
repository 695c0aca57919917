"""What the host does for a training pass, in microseconds of a processor that do not depend on a GPU.

A GPU waits wherever the host has not launched its next kernel. Here the tensors are tiny and lie on the CPU, so that
nothing but the way to the kernels takes time: Python, torch's dispatch and autograd, and what Triton does to find a
compiled kernel by its arguments. The driver's part of a launch is left out. Times are the process's own (CPU time), of
one thread: others of torch would wait in a loop for the next product, and their time would count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time
from unittest import mock

import torch
from torch import nn

from benchmarks.cases.dpo_step import LORA, peft_model
from benchmarks.harness.aot import pretended_driver
from benchmarks.harness.models import random_model
from benchmarks.registry import GateError, Measure, Report, case, versions
from phi2.config import Phi2Config
from phi2.fused import fuse
from phi2.lora import disabled
from phi2.model import Phi2ForCausalLM
from phi2_kernels import _dispatch

TOKENS = 2
TOLERANCE = 1e-3  # of gradients in float32, relative


def shape(layers: int) -> Phi2Config:
    """As many layers as are wanted, and tensors too small to take time."""
    return Phi2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@case("host_time", turns=15, summary="the host's part of a DPO pass of 32 layers: reference, forward and backward")
def host_time(turns: int) -> Report:
    return compare_host_time(turns, layers=32)


def compare_host_time(turns: int, layers: int) -> Report:
    """Ours fused, as on a GPU by default, beside ours unfused and transformers with peft."""
    difference = gate(layers)
    fused, unfused = (random_model(shape(layers), torch.device("cpu"), torch.bfloat16, LORA.r) for _ in range(2))
    fuse(fused)
    theirs = peft_model(unfused)
    with kernels_not_launched() as launches, one_thread():
        passes = {"fused": pass_of(fused), "unfused": pass_of(unfused), "theirs": pass_of(theirs)}
        counts = {name: _count(launches, run) for name, run in passes.items()}
        times = timed(passes, turns)
    per_layer = {name: [1e6 * seconds / layers for seconds in each] for name, each in times.items()}
    return Report(
        peer=versions("transformers", "peft", "torch", "triton"),
        gate=f"gradients of all adapters as theirs in float32, {difference:.1e} apart",
        measures=[
            Measure.of(name, "us a layer", per_layer["fused"], per_layer[other])
            for name, other in (("fused, by transformers and peft", "theirs"), ("fused, by unfused", "unfused"))
        ],
        facts={f"Triton launches a layer, {name}": round(count / layers, 1) for name, count in counts.items()},
    )


def gate(layers: int) -> float:
    """How far apart ours fused and theirs are, where everything is computed.

    Raises:
        GateError: if they are not the same.
    """
    ours = random_model(shape(layers), torch.device("cpu"), torch.float32, LORA.r)
    theirs = peft_model(ours)
    fuse(ours)
    grads = []
    for model in (ours, theirs):
        pass_of(model)()
        trained = {name.split("layers.")[1]: p.grad for name, p in model.named_parameters() if p.grad is not None}
        grads.append(torch.cat([grad.flatten() for _, grad in sorted(trained.items())]))
    difference = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
    if not difference <= TOLERANCE:
        raise GateError(f"the gradients of adapters are {difference:.1e} apart")
    return difference


def pass_of(model: Phi2ForCausalLM | nn.Module) -> Callable[[], None]:
    """The reference's forward pass, and the policy's with gradients."""
    ids = torch.arange(TOKENS)[None]
    off = disabled if isinstance(model, Phi2ForCausalLM) else lambda model: model.disable_adapter()

    def run() -> None:
        with torch.no_grad(), off(model):
            model(input_ids=ids)
        logits = model(input_ids=ids)
        getattr(logits, "logits", logits).float().square().sum().backward()

    return run


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kernels_not_launched() -> Iterator[list[str]]:
    """Within, our kernels are found as for an A100, and listed instead of handed to the driver."""
    from triton.compiler import CompiledKernel

    launched: list[str] = []
    run = property(lambda form: lambda *_: launched.append(form.name))
    kept = {"run": run, "_init_handles": lambda form: None}
    everything = {"default_impl": "triton", "_unsupported_tensor": lambda x: ""}
    with mock.patch.multiple(CompiledKernel, **kept), mock.patch.multiple(_dispatch, **everything):
        with pretended_driver(80):
            yield launched


def _count(launches: list[str], run: Callable[[], None]) -> int:
    """Of a second pass: the first one compiles."""
    run()
    before = len(launches)
    run()
    return len(launches) - before


def timed(passes: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of processor time of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(turns):
        for name, run in passes.items():
            begin = process_time()
            run()
            times[name].append(process_time() - begin)
    return times
