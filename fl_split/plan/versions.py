"""Whether the packages installed are those that fl-split asks for."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from fl_split.plan.fits_here import Check


def check_versions() -> Iterator[Check]:
    """Whether the packages installed are those that fl-split asks for."""
    try:
        needed = [Requirement(line) for line in requires("fl-split") or ()]
    except PackageNotFoundError:
        yield Check("warn", "versions", "fl-split is not installed here, so nothing says which versions it needs")
        return
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement} is wanted, {have} is installed")
    if wrong:
        yield Check("fail", "versions", f"{'; '.join(wrong)}: install fl-split anew, in an environment of its own")
    else:
        shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "flwr"))
        yield Check("pass", "versions", shown)
