"""For how many model families is the split model the whole one, bit for bit in float32?

    python benchmarks/bench_families.py [--quick] [--json FILE]

The families are those of ``tests/families.py``, and the check is the tests' own (``tests/model/test_families.py``),
run by pytest: a family is exact if its logits, with no, left and right padding, and the gradients of its top equal the
full model's bit for bit (the bottom's, with each exact surrogate, within 1e-3 of the largest). A type of model may be
there more than once: as language model and as classifier, or with another setting.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
from about import ROOT, about, write

CHECKS = ("test_logits_equal_the_full_models_bit_for_bit", "test_gradients_equal_the_full_models")


class Count:
    """A pytest plugin: keeps the checks, of the first families only if asked, and notes how they end."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.failed: dict[str, list[str]] = {}  # of each family, the checks that did not pass
        self.model_types: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        checks = [item for item in items if getattr(item, "originalname", "") in CHECKS]
        if missing := set(CHECKS) - {item.originalname for item in checks}:
            raise pytest.UsageError(f"tests/model/test_families.py has no longer: {', '.join(sorted(missing))}")
        types = {_family(item): item.callspec.params["family"].model_type for item in checks}
        self.model_types = dict(list(types.items())[: self._most])
        items[:] = [item for item in checks if _family(item) in self.model_types]
        self.failed = {name: [item.name for item in items if _family(item) == name] for name in self.model_types}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            check = report.nodeid.rpartition("::")[2]
            next(checks for checks in self.failed.values() if check in checks).remove(check)


def _family(item: Any) -> str:
    """Its name in a test's id, which may also say what else a check is run with."""
    family = item.callspec.params["family"]
    return f"{family.name}-classifier" if family.classifier else str(family.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first eight families only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    block = about(0)
    count = Count(8 if options.quick else None)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    ended = pytest.main([*arguments, str(ROOT / "tests" / "model" / "test_families.py")], plugins=[count])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not count.failed:
        sys.exit(f"pytest ended with {ended!r}: its own output says why")
    for name, checks in count.failed.items():
        if checks:
            print(f"not exact: {name} ({', '.join(checks)})")
    exact = {name for name, checks in count.failed.items() if not checks}
    types = set(count.model_types.values())
    inexact = {count.model_types[name] for name in count.failed.keys() - exact}
    figures = {
        "families-exact": len(exact),
        "families-tested": len(count.failed),
        "model-types-exact": len(types - inexact),
        "model-types-tested": len(types),
    }
    for name, value in figures.items():
        print(f"{name:20} {value}")
    print(block)
    write(options.json, figures | block)


if __name__ == "__main__":
    main()
