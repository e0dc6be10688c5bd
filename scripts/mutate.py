#!/usr/bin/env python3
"""Which small changes of the code does no test notice?

    python scripts/mutate.py                                          # all modules below: hours; goes on where it was
    python scripts/mutate.py --module node/trial.py --most 20       # twenty of one module's, drawn at random

Makes one change at a time in a copy of the tree (another comparison, constant or operator, a condition that always or
never holds, a statement left out), runs the tests that are about the module, and lists the changes that all of them
pass. Not every survivor is a gap: some changes are no change. Each result is kept in a file as soon as it is known, so
that a run that was cut, or another with more, does not begin anew. For a person to run and to judge, not for CI.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Modules of which a wrong line costs a promise (privacy, split == whole, rounds, fairness), and what tests them.
MODULES = {
    "wire.py": "tests/test_wire.py",
    "files.py": "tests/server/test_run_folder.py",
    "data/batches.py": "tests/data/test_data.py tests/model/test_packing.py",
    "data/load.py": "tests/data",
    "model/adapters.py": "tests/model/test_adapters.py tests/model/test_split.py tests/test_privacy.py",
    "model/distill.py": "tests/tools/test_fit_surrogate.py tests/node/test_round.py",
    "model/loss.py": "tests/node/test_train.py tests/model/test_packing.py tests/node/test_classifier.py",
    "model/packing.py": "tests/model/test_packing.py",
    "model/products.py": "tests/server/test_aggregation.py",
    "model/slots.py": "tests/model/test_split.py tests/model/test_surrogate.py tests/tools/test_fit_surrogate.py",
    "model/surrogate.py": "tests/model/test_surrogate.py",
    "model/turns.py": "tests/model/test_turns.py",
    "node/build.py": "tests/node/test_round.py tests/test_end_to_end.py",
    "node/calls.py": "tests/node/test_trunk_connection.py tests/node/test_replicas.py tests/node/test_vetting.py",
    "node/choice.py": "tests/node/test_choice.py",
    "node/trial.py": "tests/node/test_trial.py",
    "node/received.py": "tests/server/test_aggregation.py tests/node/test_round.py",
    "node/replicas.py": "tests/node/test_replicas.py tests/node/test_trunk_connection.py tests/trunk/test_access.py",
    "node/round.py": "tests/node/test_round.py tests/test_end_to_end.py tests/server/test_strategy.py",
    "node/state.py": "tests/server/test_run_folder.py tests/node/test_round.py",
    "node/train.py": "tests/node/test_train.py tests/node/test_round.py",
    "node/trunk_connection.py": "tests/node/test_trunk_connection.py tests/node/test_replicas.py",
    "server/aggregation.py": "tests/server/test_aggregation.py",
    "server/flower.py": "tests/server tests/node/test_round.py",
    "server/strategy.py": "tests/server tests/test_end_to_end.py",
    "trunk/access.py": "tests/trunk/test_access.py",
    "trunk/admission.py": "tests/trunk/test_admission.py",
    "trunk/batching.py": "tests/trunk/test_batching.py tests/trunk/test_queueing.py",
    "trunk/fair_queue.py": "tests/trunk/test_batching.py tests/trunk/test_queueing.py",
    "trunk/calls.py": "tests/trunk/test_calls.py tests/trunk/test_server.py",
    "trunk/messages.py": "tests/trunk/test_messages.py tests/trunk/test_server.py",
    "trunk/padding.py": "tests/trunk/test_padding.py",
}

_COMPARISONS = {
    "Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "==",
    "Is": "is not", "IsNot": "is", "In": "not in", "NotIn": "in",
}  # fmt: skip
_OPERATORS = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "//", "Pow": "*"}
_LOADED_ONCE = ("pytest", "torch", "transformers", "peft", "flwr.serverapp.strategy", "datasets", "hypothesis")


@dataclass(frozen=True)
class Mutation:
    """One change of a module's text."""

    line: int
    old: str
    new: str
    text: str  # the whole module with it

    def __str__(self) -> str:
        return f"{self.line}: {' '.join(self.old.split())}  ->  {self.new}"


def main() -> int:
    """Exit code 1 if a mutation survived."""
    options = _parser().parse_args()
    results = Results(Path(options.results))
    for name in _LOADED_ONCE:  # each run is a fork of this process: it need not load them again
        __import__(name)
    survivors: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv"))
        for module in options.module or MODULES:
            survivors += _try(copy, module, options.most, results)
    print(f"\n{len(survivors)} survived" + "".join(f"\n  {survivor}" for survivor in survivors))
    return 1 if survivors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", choices=MODULES, metavar="NAME", help="below fl_split/; repeat it")
    parser.add_argument("--most", type=int, help="mutations of a module, at most (default: all)")
    parser.add_argument("--results", default=str(ROOT / "mutations.jsonl"), help="file of what is known already")
    return parser


class Results:
    """What became of earlier mutations, kept by the module's text and its tests' names."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.known: dict[str, bool] = {entry["key"]: entry["survived"] for entry in map(json.loads, lines)}

    def add(self, key: str, about: str, survived: bool) -> None:
        """Keep one more."""
        self.known[key] = survived
        with self._file.open("a") as file:
            file.write(json.dumps({"key": key, "mutation": about, "survived": survived}) + "\n")


def _try(copy: Path, module: str, most: int | None, results: Results) -> list[str]:
    """Try a module's mutations; returns those that survived."""
    file = copy / "fl_split" / module
    text, tests = file.read_text(), MODULES[module].split()
    drawn = list(mutations(text))
    random.Random(0).shuffle(drawn)
    drawn = drawn[:most]
    left = [mutation for mutation in drawn if _key(module, mutation) not in results.known]
    if left:
        started = time.monotonic()
        if not passes(copy, tests, timeout_s=3600):
            raise SystemExit(f"{module}: its tests fail as they are: python -m pytest {' '.join(tests)}")
        limit_s = 30 + 3 * (time.monotonic() - started)
        print(f"{module}: {len(left)} to try, {limit_s:.0f} s each at most", flush=True)
    for mutation in left:
        file.write_text(mutation.text)
        try:
            survived = passes(copy, tests, limit_s)
        finally:
            file.write_text(text)
        results.add(_key(module, mutation), f"{module}:{mutation}", survived)
        print(f"  {'SURVIVED' if survived else 'noticed '} {module}:{mutation}", flush=True)
    return [f"{module}:{m}" for m in sorted(drawn, key=lambda m: m.line) if results.known[_key(module, m)]]


def _key(module: str, mutation: Mutation) -> str:
    return hashlib.sha256(f"{MODULES[module]}\n{mutation.text}".encode()).hexdigest()


def passes(copy: Path, tests: list[str], timeout_s: float) -> bool:
    """Whether all tests pass in a copy of the tree; a run that takes too long has not passed."""
    child = os.fork()
    if child == 0:
        _run_tests(copy, tests)
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() < end:
            time.sleep(0.05)
            continue
        with contextlib.suppress(ProcessLookupError):  # with what it started and left behind
            os.killpg(child, signal.SIGKILL)
        if not done:
            os.waitpid(child, 0)
        return bool(done) and status == 0


def _run_tests(copy: Path, tests: list[str]) -> None:
    """In the child: never returns."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # of processes that tests start
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    import pytest

    code = 70
    try:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *tests]))
    finally:
        os._exit(code)


# ------------------------------------------------------------------------------------------------------ mutations


def mutations(text: str) -> Iterator[Mutation]:
    """All single changes of a module that are made here, in the order of the text."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def change(node: ast.AST, new: str) -> Mutation:
        first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        whole = text.encode()
        changed = whole[:first] + new.encode() + whole[last:]
        return Mutation(node.lineno, whole[first:last].decode(), new, changed.decode())  # type: ignore[attr-defined]

    for node in _code(ast.parse(text)):
        for place, new in _changes(node):
            mutation = change(place, new)
            compile(mutation.text, "mutation", "exec")
            yield mutation


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What decides at run time: no annotations, documentation, logging or texts of errors."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom) or _is_text(child):
                continue
            yield child
            yield from _code(child)


def _is_text(node: ast.AST) -> bool:
    if not isinstance(node, ast.Expr):
        return False
    return isinstance(node.value, ast.Constant) or ast.unparse(node).startswith(("logger.", "warnings."))


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What to put in place of a node, or of a part of it."""
    match node:
        case ast.If() | ast.IfExp():
            yield node.test, "True"
            yield node.test, "False"
        case ast.Compare(left, [operator], [right]):
            yield node, f"({ast.unparse(left)} {_COMPARISONS[type(operator).__name__]} {ast.unparse(right)})"
        case ast.BoolOp(operator, values):
            other = " or " if isinstance(operator, ast.And) else " and "
            yield node, f"({other.join(f'({ast.unparse(value)})' for value in values)})"
        case ast.BinOp(left, operator, right) if type(operator).__name__ in _OPERATORS:
            if not (_is_string(left) or _is_string(right)):
                yield node, f"(({ast.unparse(left)}) {_OPERATORS[type(operator).__name__]} ({ast.unparse(right)}))"
        case ast.UnaryOp(ast.Not(), operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(bool() as value):
            yield node, str(not value)
        case ast.Constant(int() | float() as value):
            yield node, repr(value + 1)
        case ast.Return(ast.expr() as result) if not isinstance(result, ast.Constant):
            yield node, "return None"
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield node, "pass"
        case ast.Assign(targets) if not isinstance(targets[0], ast.Name):
            yield node, "pass"


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


if __name__ == "__main__":
    raise SystemExit(main())
