"""Breaks every loss and modifier in small ways and checks that its proofs notice.

`python tests/mutate_losses.py > docs/losses_checks.md`; tests/test_mutants.py does the same, in seconds.

A mutant is a function whose source differs in one place: a sign, an operation, a term that is gone, an answer taken for
the other, good for bad, better for worse, a sum for a mean, policy for reference, a number, a function that is not
applied. It takes the place of the loss in the registry, and the proofs of the files in PROOFS that are about this loss
run on it, in this process; of a modifier those of test_modifiers.py. One of them must fail. A copy in which nothing was
changed must pass them all.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from phi2.losses.modifiers import MODIFIERS
from phi2.losses.registry import PREFERENCE_LOSSES

HERE = Path(__file__).parent
Proof = Callable[[], None]
PROOFS = (
    "test_losses.py",
    "test_loss_invariances.py",
    "test_window_losses.py",
    "test_answer_losses.py",
    "test_answer_invariances.py",
    "test_tdpo.py",
)
OTHER_OPERATION = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPPOSITES = ((ast.Eq, ast.NotEq), (ast.Lt, ast.GtE), (ast.Gt, ast.LtE), (ast.Is, ast.IsNot))
OTHER_COMPARISON = {one: other for pair in OPPOSITES for one, other in (pair, pair[::-1])}
OTHER_SUM = {  # a sum for a mean, a mean for a sum
    "margin": "margin_per_token",
    "margin_per_token": "margin",
    "policy_chosen": "policy_chosen_per_token",
    "policy_rejected": "policy_rejected_per_token",
    "policy_chosen_per_token": "policy_chosen",
    "policy_rejected_per_token": "policy_rejected",
    "policy": "policy_per_token",
    "policy_per_token": "policy",
    "sum": "mean",
    "mean": "sum",
}
OTHER_MODEL = {  # policy for reference
    "policy_chosen": "ref_chosen",
    "policy_rejected": "ref_rejected",
    "ref_chosen": "policy_chosen",
    "ref_rejected": "policy_rejected",
    "logratio": "policy",
}
OTHER_ANSWER = {  # one that is imitated for one that is chosen
    "gold": "policy_chosen",
    "gold_length": "chosen_length",
}


def main() -> int:
    text, survivors = report()
    print(text, end="")
    return bool(survivors)


def report() -> tuple[str, list[str]]:
    """docs/losses_checks.md, and the mutants that no proof noticed."""
    proofs, rows, survivors, total = proofs_by_loss(), [], [], 0
    own = {name: loss for name, loss in PREFERENCE_LOSSES.items() if loss.is_own}
    modifiers = dict.fromkeys(MODIFIERS, proofs_of_modifiers())
    for registry, names, checks in ((PREFERENCE_LOSSES, own, proofs), (MODIFIERS, list(MODIFIERS), modifiers)):
        for name in names:
            function = registry[name].function
            assert not noticed(registry, name, copy_of(function), checks[name]), f"{name} fails as it is"
            mutants = list(mutants_of(function))
            alive = [what for what, mutant in mutants if not noticed(registry, name, mutant, checks[name])]
            survivors += [f"{name}: {what}" for what in alive]
            rows.append(f"| `{name}` | {len(mutants)} | {len(mutants) - len(alive)} |")
            total += len(mutants)
    left = "\n".join(f"- {each}" for each in survivors) or "None."
    return TEXT.format(total=total, noticed=total - len(survivors), rows="\n".join(rows), survivors=left), survivors


TEXT = """# How the losses are checked

`tests/test_losses.py` has for every loss of [losses.md](losses.md): its value on two pairs worked out by hand from the
formula, in plain floats; value and both slopes where policy and reference agree; its gradient against finite
differences in float64; a finite loss and gradient far from the reference and without tokens. Of a loss of
windows `tests/test_window_losses.py` has values, slopes and state by hand on two pairs, and `tests/test_two_phases.py`
its gradient for every split of a window. `tests/test_answer_losses.py` has values and slopes of the losses of labelled
answers, of lists and with an answer to imitate, on two to four answers to a prompt; `tests/test_tdpo.py` those with a
KL at each token.
`tests/test_loss_invariances.py` and `tests/test_answer_invariances.py` hold each to what it must not depend on, and to
depending on all else. `tests/parity` has the losses that trl 1.16 has too: runs of both trainers from the same weights,
step by step, with all f-divergences, KTO and TPO among them, and its CPO and ORPO functions.

## Would they notice?

By `python tests/mutate_losses.py`, which also writes this page: every loss and modifier is broken in one place at a
time (a sign, an operation, a term dropped, chosen for rejected, good for bad, better for worse, a sum for a mean,
policy for reference, a number, a function not applied), and the proofs run on what comes out. Of {total} mutants they
notice {noticed}.

| loss or modifier | mutants | noticed |
|---|---|---|
{rows}

Not noticed:

{survivors}
"""


# ---- the proofs ----


def proofs_by_loss() -> dict[str, list[Proof]]:
    """Of each loss the tests whose parameter `name` it is."""
    found: dict[str, list[Proof]] = {name: [] for name in PREFERENCE_LOSSES}
    for module in map(module_at, PROOFS):
        for test in vars(module).values():
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize" and mark.args[0] == "name":
                    for name in mark.args[1]:
                        found[name].append(partial(test, name))
    return found


def proofs_of_modifiers() -> list[Proof]:
    """What is worked out by hand there: tests without parameters, and with those of a few cases."""
    found: list[Proof] = []
    for name, test in vars(module_at("test_modifiers.py")).items():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if not name.startswith("test_") or (marks and len(marks[0].args[1]) > 20):
            continue
        cases = marks[0].args[1] if marks else [()]
        found += [partial(test, *(case if isinstance(case, tuple) else (case,))) for case in cases]
    return found


def module_at(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noticed(registry: dict[str, Any], name: str, mutant: FunctionType, proofs: list[Proof]) -> bool:
    """Whether a proof fails with the mutant in the place of the function that is registered."""
    entry = registry[name]
    registry[name] = entry._replace(function=mutant)
    try:
        for proof in proofs:
            try:
                proof()
            except (Exception, pytest.fail.Exception):  # whatever a broken formula runs into
                return True
        return False
    finally:
        registry[name] = entry


# ---- the mutants ----


def mutants_of(function: FunctionType) -> Iterator[tuple[str, FunctionType]]:
    """Every mutant of a function and of those of its file that it calls, with what was changed."""
    parts = [*helpers_of(function), function]
    for changed in parts:
        for what, mutated in mutations(tree_of(changed)):
            space = dict(function.__globals__)
            for part in parts:  # all anew, so that they call each other
                exec(compiled(mutated) if part is changed else code_of(part), space)
            yield f"{changed.__name__}: {what}", space[function.__name__]


def helpers_of(function: FunctionType) -> list[FunctionType]:
    """Functions of the same file that it names, however deep, but for other losses and modifiers."""
    registered = {entry.function for registry in (PREFERENCE_LOSSES, MODIFIERS) for entry in registry.values()}
    found: dict[str, FunctionType] = {}
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value.__module__ == function.__module__ and value not in registered:
            found |= {name: value, **{helper.__name__: helper for helper in helpers_of(value)}}
    return list(found.values())


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def copy_of(function: FunctionType) -> FunctionType:
    """The same function by the same way."""
    space = dict(function.__globals__)
    exec(code_of(function), space)
    return space[function.__name__]


def tree_of(function: FunctionType) -> ast.Module:
    """Its source without the decorator, which would register it."""
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].decorator_list = []
    return tree


def compiled(tree: ast.Module) -> CodeType:
    return compile(ast.fix_missing_locations(tree), "<mutant>", "exec")


@cache
def code_of(function: FunctionType) -> CodeType:
    return compiled(tree_of(function))


def mutations(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Copies of a function's tree, each with one place of its body replaced."""
    for index, node in enumerate(places(tree)):
        for replacement in replacements(node):
            copy = deepcopy(tree)
            place = list(places(copy))[index]
            before = ast.unparse(place)
            Replace(place, replacement).visit(copy)
            yield f"`{before}` becomes `{ast.unparse(ast.fix_missing_locations(replacement))}`", copy


def places(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body, but for what is no formula: docstring, types, devices, dimensions, assertions."""
    if isinstance(node, ast.FunctionDef):
        yield from (place for statement in node.body[bool(ast.get_docstring(node)) :] for place in places(statement))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        yield from places(node.func.value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "without_wait":
        yield from places(node.args[0])
    elif isinstance(node, ast.Module) or not is_no_formula(node):
        yield from [] if isinstance(node, ast.Module) else [node]
        yield from (place for child in ast.iter_child_nodes(node) for place in places(child))


def is_no_formula(node: ast.AST) -> bool:
    dimensions = isinstance(node, ast.keyword) and node.arg in ("dim", "keepdim", "dtype", "strict")
    return dimensions or isinstance(node, ast.Assert)


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, place: ast.AST, by: ast.AST) -> None:
        self.place, self.by = place, by

    def visit(self, node: ast.AST) -> ast.AST:
        return self.by if node is self.place else self.generic_visit(node)


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    node = deepcopy(node)
    if isinstance(node, ast.BinOp):
        if type(node.op) in OTHER_OPERATION:
            yield ast.BinOp(node.left, OTHER_OPERATION[type(node.op)](), node.right)
        yield node.left  # the other term is dropped
        if not isinstance(node.op, ast.Pow):
            yield node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Compare):
        yield ast.Compare(node.left, [OTHER_COMPARISON[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        yield from unapplied(node)
        if ast.unparse(node.func) == "torch.where":  # good for bad
            yield ast.Call(node.func, [node.args[0], *reversed(node.args[1:])], [])
    elif isinstance(node, ast.Attribute):
        yield from other_attributes(node)


def unapplied(call: ast.Call) -> Iterator[ast.AST]:
    """The argument of a function that is not applied, or what a method is called on."""
    is_module = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("torch", "F", "math")
    if isinstance(call.func, ast.Attribute) and not is_module:
        yield call.func.value
    elif call.args and not isinstance(call.args[0], ast.Starred):
        yield call.args[0]


def other_attributes(node: ast.Attribute) -> Iterator[ast.AST]:
    name = node.attr
    sides = {"chosen": "rejected", "rejected": "chosen"}
    other_answer = next((name.replace(side, other) for side, other in sides.items() if side in name), None)
    for other in (other_answer, OTHER_SUM.get(name), OTHER_MODEL.get(name), OTHER_ANSWER.get(name)):
        if other is not None:
            yield ast.Attribute(node.value, other, ast.Load())
    if name.endswith("logratio"):
        length = ast.Attribute(node.value, name.replace("logratio", "length"), ast.Load())
        yield ast.BinOp(node, ast.Div(), length)
    if name == "mismatched":  # the answers to the prompt itself
        yield node.value


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
