"""One piece of work with a reference in float32, our implementation and its peers; and the gate before the clock.

The gate lets all compute fresh inputs: ours must be right, or there is no number; a peer that is missing, fails or
computes something else is left out, and the report says why. It runs on a CPU too, where the kernels are interpreted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import GateError

Inputs = tuple[Any, ...]
Outputs = dict[str, Tensor]

OURS = "ours"
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # ||out - ref|| / ||ref|| that is right
WRONG = 0.1  # of that, what no rounding explains
PEER_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Implementation:
    """One way to do the work of a comparison.

    Attributes:
        run: what is timed: inputs to outputs by name.
        prepare: from the inputs of the comparison to those of `run`, before the clock.
        finish: from the outputs of `run` to those of the reference, for the gate.
        is_compared: False for one that does part of the work only, to say how long that part takes.
    """

    run: Callable[..., Outputs]
    prepare: Callable[..., Inputs] = lambda *inputs: inputs
    finish: Callable[[Outputs], Outputs] = lambda outputs: outputs
    is_compared: bool = True


Peers = dict[str, Callable[[], Implementation]]  # what makes each, by name; it may raise PEER_ERRORS


class Work(NamedTuple):
    """What is needed at least: operations of matmuls, and bytes of inputs and outputs, each counted once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """The same work for all implementations.

    Attributes:
        inputs: fresh ones of a seed.
        plain: torch in the same dtype; ours may be twice as far from the reference as it is.
        rounding: how far any output may be from the reference's, ||out - ref|| / ||ref||.
        peers_are_ours: they are other launches of our kernels, and as right as ours, or left out.
        targets: how many times as fast as a peer; a name that ends in * means the fastest peer whose name begins so.
        peak_limit: GB that ours may allocate beside its inputs.
        in_graph: the calls are so short that they are timed as one CUDA graph, which goes around several inputs.
    """

    name: str
    inputs: Callable[[int], Inputs]
    reference: Callable[..., Outputs]
    ours: Implementation
    plain: Implementation
    peers: Peers
    rounding: float
    work: Work | None = None
    targets: dict[str, float] = field(default_factory=dict)
    peak_limit: float | None = None
    in_graph: bool = False
    peers_are_ours: bool = False


def of_function(function: Callable[..., Tensor], names: str = "", **options: Any) -> Implementation:
    """A function's output and the gradients of those of its arguments that require one.

    Args:
        names: of the arguments, separated by spaces, where any requires a gradient. There is one input more then, the
            gradient of the output.
        options: other attributes.
    """

    def run(*inputs: Tensor) -> Outputs:
        if not any(x.requires_grad for x in inputs):
            return {"output": function(*inputs)}
        *arguments, grad = inputs
        output = function(*arguments)
        leaves = {name: x for name, x in zip(names.split(), arguments, strict=True) if x.requires_grad}
        grads = torch.autograd.grad(output, list(leaves.values()), grad)
        return {"output": output.detach(), **{f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)}}

    return Implementation(run, **options)


def in_float32(*inputs: Tensor) -> Inputs:
    """Copies of the inputs, those of floating point as float32 leaves."""
    return tuple(
        x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x.clone() for x in inputs
    )


def compare_functions(
    name: str,
    inputs: Callable[[int], Inputs],
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    peers: Peers,
    work: Work,
    dtype: torch.dtype,
    names: str = "",
    **settings: Any,
) -> Comparison:
    """Functions of tensors and, where inputs require them, their gradients.

    Args:
        peers: the first is torch's own, which is always there.
        names: see `of_function`.
        settings: other attributes of the comparison.
    """
    return Comparison(
        name=name,
        inputs=inputs,
        reference=lambda *x: of_function(formula, names).run(*in_float32(*x)),
        ours=of_function(ours, names),
        plain=next(iter(peers.values()))(),
        peers=peers,
        work=work,
        rounding=ROUNDING[dtype],
        **settings,
    )


def eager_and_compiled(function: Callable[..., Tensor], names: str, device: torch.device) -> Peers:
    """torch's own function as two of the peers."""
    return {
        "eager": lambda: of_function(function, names),
        "torch.compile": lambda: of_function(compiled(function, device), names),
    }


def random(seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Tensor]:
    """normal(*shape, dtype=dtype, scale=1.0, grad=False): random tensors, the same ones for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0, grad: bool = False) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale
        return x.to(dtype).requires_grad_(grad)

    return normal


def drawn(
    device: torch.device, dtype: torch.dtype, draw: Callable[[Callable[..., Tensor]], Inputs]
) -> Callable[[int], Inputs]:
    """Inputs of a seed, of what makes them with the `normal` of `random`."""
    return lambda seed: draw(random(seed, device, dtype))


def compiled(function: Callable, device: torch.device) -> Callable:
    """By torch.compile on a GPU; as it is on a CPU, where only the gate runs."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


class Passed(NamedTuple):
    """What the gate found: what may be timed, the largest error of each, and why other peers are left out."""

    implementations: dict[str, Implementation]
    errors: dict[str, float]
    absent: dict[str, str]


def gate(comparison: Comparison) -> Passed:
    """Lets every implementation compute fresh inputs.

    Raises:
        GateError: when ours is wrong.
    """
    inputs = comparison.inputs(0)
    expected = comparison.reference(*inputs)
    with poisoned_memory():
        errors = _errors(comparison.ours, inputs, expected)
    beyond = {name: error for name, error in errors.items() if not error <= comparison.rounding}
    plain = _errors(comparison.plain, inputs, expected) if beyond else {}
    for name, error in beyond.items():
        allowed = min(WRONG, max(comparison.rounding, 2 * plain[name]))
        if not error <= allowed:
            raise GateError(f"{comparison.name}: {name} is off by {error:.1e} of its size, allowed {allowed:.1e}")
    passed = Passed({OURS: comparison.ours}, {OURS: max(errors.values())}, {})
    memory, allowed = (poisoned_memory, comparison.rounding) if comparison.peers_are_ours else (nullcontext, WRONG)
    for name, make in comparison.peers.items():
        with memory():
            _admit(name, make, inputs, expected, allowed, passed)
    return passed


def _admit(
    name: str, make: Callable[[], Implementation], inputs: Inputs, expected: Outputs, allowed: float, passed: Passed
) -> None:
    """Adds a peer to those that pass, or says in one line why not."""
    from triton.errors import TritonError

    try:
        peer = make()
        errors = _errors(peer, inputs, expected)
    except (*PEER_ERRORS, TritonError) as error:
        passed.absent[name] = f"{type(error).__name__}: {str(error).strip()[:160]}".splitlines()[0]
        return
    wrong = [f"{output} is off by {error:.1e} of its size" for output, error in errors.items() if not error <= allowed]
    if wrong:
        passed.absent[name] = wrong[0]
    else:
        passed.implementations[name], passed.errors[name] = peer, max(errors.values(), default=math.nan)


def _errors(implementation: Implementation, inputs: Inputs, expected: Outputs) -> dict[str, float]:
    outputs = implementation.run(*implementation.prepare(*inputs))
    if not implementation.is_compared:
        return {}
    outputs = implementation.finish(outputs)
    assert outputs.keys() == expected.keys(), (set(outputs), set(expected))
    return {name: relative_error(outputs[name], expected[name]) for name in expected}


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||; infinite for another shape."""
    if output.shape != reference.shape:
        return math.inf
    apart = torch.linalg.vector_norm(output.double() - reference.double())
    return (apart / torch.linalg.vector_norm(reference.double()).clamp(min=1e-30)).item()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is full of NaN, which torch does in its deterministic mode: an output nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ops that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
