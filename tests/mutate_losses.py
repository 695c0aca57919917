"""Breaks every loss in small ways and checks that its proofs notice.

`python tests/mutate_losses.py > docs/losses_checks.md`; tests/test_mutants.py does the same, in seconds.

A mutant is a loss whose source differs in one place: a sign, an operation, a term that is gone, an answer taken for the
other, a sum for a mean, policy for reference, a number, a function that is not applied. It takes the place of the loss
in the registry, and the proofs of test_losses.py and test_loss_invariances.py that are about this loss run on it, in
this process. One of them must fail. A copy in which nothing was changed must pass them all.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from phi2.losses.registry import PREFERENCE_LOSSES, PreferenceLoss

HERE = Path(__file__).parent
PROOFS = ("test_losses.py", "test_loss_invariances.py")
OTHER_OPERATION = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OTHER_COMPARISON = {ast.Eq: ast.NotEq, ast.GtE: ast.Lt, ast.Lt: ast.GtE, ast.LtE: ast.Gt}
OTHER_SUM = {  # a sum for a mean, a mean for a sum
    "margin": "margin_per_token",
    "margin_per_token": "margin",
    "policy_chosen": "policy_chosen_per_token",
    "policy_rejected": "policy_rejected_per_token",
    "policy_chosen_per_token": "policy_chosen",
    "policy_rejected_per_token": "policy_rejected",
}
OTHER_MODEL = {  # policy for reference
    "policy_chosen": "ref_chosen",
    "policy_rejected": "ref_rejected",
    "ref_chosen": "policy_chosen",
    "ref_rejected": "policy_rejected",
}


def main() -> int:
    text, survivors = report()
    print(text, end="")
    return bool(survivors)


def report() -> tuple[str, list[str]]:
    """docs/losses_checks.md, and the mutants that no proof noticed."""
    proofs, rows, survivors, total = proofs_by_loss(), [], [], 0
    for name, loss in PREFERENCE_LOSSES.items():
        if loss.is_own:
            assert not noticed(name, loss, copy_of(loss.function), proofs[name]), f"{name} fails as it is"
            mutants = list(mutants_of(loss.function))
            alive = [what for what, function in mutants if not noticed(name, loss, function, proofs[name])]
            survivors += [f"{name}: {what}" for what in alive]
            rows.append(f"| `{name}` | {len(mutants)} | {len(mutants) - len(alive)} |")
            total += len(mutants)
    left = "\n".join(f"- {each}" for each in survivors) or "None."
    return TEXT.format(total=total, noticed=total - len(survivors), rows="\n".join(rows), survivors=left), survivors


TEXT = """# How the losses are checked

`tests/test_losses.py` has for every loss of [losses.md](losses.md): its value on two pairs worked out by hand from the
formula, in plain floats; value and both slopes where policy and reference agree; its gradient against finite
differences in float64; a finite loss and gradient far from the reference and without tokens.
`tests/test_loss_invariances.py` holds each to what it must not depend on, and to depending on all else. `tests/parity`
has the losses that trl 1.16 has too: runs of both trainers from the same weights, step by step, with all f-divergences,
and its CPO and ORPO functions.

## Would they notice?

By `python tests/mutate_losses.py`, which also writes this page: every loss is broken in one place at a time (a sign, an
operation, a term dropped, chosen for rejected, a sum for a mean, policy for reference, a number, a function not
applied), and the proofs run on what comes out. Of {total} mutants they notice {noticed}.

| loss | mutants | noticed |
|---|---|---|
{rows}

Not noticed:

{survivors}
"""


# ---- the proofs ----


def proofs_by_loss() -> dict[str, list[Callable[[str], None]]]:
    """Of each loss the tests whose parameter `name` it is."""
    found: dict[str, list[Callable[[str], None]]] = {name: [] for name in PREFERENCE_LOSSES}
    for module in map(module_at, PROOFS):
        for test in vars(module).values():
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize" and mark.args[0] == "name":
                    for name in mark.args[1]:
                        found[name].append(test)
    return found


def module_at(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noticed(name: str, loss: PreferenceLoss, mutant: FunctionType, proofs: list[Callable[[str], None]]) -> bool:
    """Whether a proof fails with the mutant in the place of the loss."""
    PREFERENCE_LOSSES[name] = loss._replace(function=mutant)
    try:
        for proof in proofs:
            try:
                proof(name)
            except (Exception, pytest.fail.Exception):  # whatever a broken formula runs into
                return True
        return False
    finally:
        PREFERENCE_LOSSES[name] = loss


# ---- the mutants ----


def mutants_of(function: FunctionType) -> Iterator[tuple[str, FunctionType]]:
    """Every mutant of a loss and of the functions of its file that it calls, with what was changed."""
    helpers = [
        value
        for name in function.__code__.co_names
        if isinstance(value := function.__globals__.get(name), FunctionType) and value.__module__ == function.__module__
    ]
    registered = {loss.function for loss in PREFERENCE_LOSSES.values()}
    for changed in (function, *(helper for helper in helpers if helper not in registered)):
        for what, mutated in mutations(tree_of(changed)):
            space = dict(function.__globals__)
            run(mutated, space)
            if changed is not function:  # a loss that calls a mutated helper is compiled anew beside it
                run(tree_of(function), space)
            yield f"{changed.__name__}: {what}", space[function.__name__]


def copy_of(function: FunctionType) -> FunctionType:
    """The same function by the same way."""
    space = dict(function.__globals__)
    run(tree_of(function), space)
    return space[function.__name__]


def tree_of(function: FunctionType) -> ast.Module:
    """Its source without the decorator, which would register it."""
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].decorator_list = []
    return tree


def run(tree: ast.Module, space: dict) -> None:
    exec(compile(ast.fix_missing_locations(tree), "<mutant>", "exec"), space)


def mutations(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Copies of a function's tree, each with one place of its body replaced."""
    body = [node for statement in without_docstring(tree) for node in ast.walk(statement)]
    for index, node in enumerate(body):
        for replacement in replacements(node):
            copy = deepcopy(tree)
            place = [node for statement in without_docstring(copy) for node in ast.walk(statement)][index]
            before = ast.unparse(place)
            Replace(place, replacement).visit(copy)
            yield f"`{before}` becomes `{ast.unparse(ast.fix_missing_locations(replacement))}`", copy


def without_docstring(tree: ast.Module) -> list[ast.stmt]:
    body = tree.body[0].body
    is_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return body[1:] if is_docstring else body


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
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        yield from unapplied(node)
    elif isinstance(node, ast.Attribute):
        yield from other_attributes(node)


def unapplied(call: ast.Call) -> Iterator[ast.AST]:
    """The argument of a function that is not applied, or what a method is called on."""
    is_module = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("torch", "F", "math")
    if isinstance(call.func, ast.Attribute) and not is_module:
        yield call.func.value
    elif call.args:
        yield call.args[0]


def other_attributes(node: ast.Attribute) -> Iterator[ast.AST]:
    name = node.attr
    sides = {"chosen": "rejected", "rejected": "chosen"}
    other_answer = next((name.replace(side, other) for side, other in sides.items() if side in name), None)
    for other in (other_answer, OTHER_SUM.get(name), OTHER_MODEL.get(name)):
        if other is not None:
            yield ast.Attribute(node.value, other, ast.Load())
    if name in ("chosen_logratio", "rejected_logratio"):
        length = ast.Attribute(node.value, name.replace("logratio", "length"), ast.Load())
        yield ast.BinOp(node, ast.Div(), length)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
