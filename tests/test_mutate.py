"""scripts/mutate.py: which changes it makes, and that it tells a change that is noticed from one that is not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "mutate.py"
CODE = '''"""Text 1."""

LIMIT: "Literal[3]" = 3


def clamp(x: int, low=0) -> int:
    """Never 7."""
    if not low <= LIMIT and x > LIMIT:
        logger.info("%d", 5)
        raise ValueError(f"{x + 1} is too much")
    return x - low
'''


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutate", module)
    spec.loader.exec_module(module)
    return module


def test_conditions_comparisons_constants_operators_and_statements_are_changed_and_texts_are_not(
    mutate: ModuleType,
) -> None:
    made = list(mutate.mutations(CODE))
    assert [(m.line, m.new) for m in made] == [
        (3, "4"),
        (6, "1"),
        (8, "True"),
        (8, "False"),
        (8, "((not low <= LIMIT) or (x > LIMIT))"),
        (8, "(low <= LIMIT)"),
        (8, "(low < LIMIT)"),
        (8, "(x >= LIMIT)"),
        (10, "pass"),
        (11, "return None"),
        (11, "((x) + (low))"),
    ]
    assert all(m.text != CODE and m.text.count("\n") == CODE.count("\n") for m in made)
    assert str(made[-1]) == "11: x - low  ->  ((x) + (low))"


def test_survivors_are_listed_and_what_is_known_is_not_tried_again(
    mutate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fl_split").mkdir()
    (tmp_path / "fl_split" / "small.py").write_text("def twice(x):\n    return x + x if x < 9 else 0\n")
    tried: list[str] = []

    def passes(copy: Path, tests: list[str], timeout_s: float) -> bool:
        """As tests would that look at twice(3) only."""
        space: dict[str, object] = {}
        tried.append((copy / "fl_split" / "small.py").read_text())
        exec(tried[-1], space)
        return space["twice"](3) == 6  # type: ignore[operator]

    monkeypatch.setitem(mutate.MODULES, "small.py", "tests")
    monkeypatch.setattr(mutate, "passes", passes)
    for _ in range(2):
        results = mutate.Results(tmp_path / "results.jsonl")
        survivors = mutate._try(tmp_path, "small.py", None, results)
    assert sorted(survivors) == [
        "small.py:2: 0  ->  1",
        "small.py:2: 9  ->  10",
        "small.py:2: x < 9  ->  (x <= 9)",
        "small.py:2: x < 9  ->  True",
    ]
    assert len(tried) == 1 + 7  # as it is, and each mutation once


def test_modules_and_their_tests_are_there(mutate: ModuleType) -> None:
    root = SCRIPT.parent.parent
    assert all((root / "fl_split" / module).is_file() for module in mutate.MODULES)
    assert all((root / name).exists() for tests in mutate.MODULES.values() for name in tests.split())
