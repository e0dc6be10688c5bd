"""What a benchmark's figures were made with; every script writes it beside them."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")


def about(seed: int | str, *more_packages: str) -> dict[str, Any]:
    """Versions, machine, seed and commit, flat, as they are when a run begins; ``+``: code differs from the commit."""
    return {
        **{name: version(name) for name in (*PACKAGES, *more_packages)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "seed": seed,
        "commit": commit(),
    }


def commit() -> str:
    def git(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.toml").returncode == 1
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("+" if changed else "")


def write(file: Path | None, figures: Mapping[str, Any], *, keep: bool = False) -> None:
    """Write figures as one flat JSON object; with `keep`, what the file has under other names stays."""
    if file is None:
        return
    before = json.loads(file.read_text()) if keep and file.exists() else {}
    file.write_text(json.dumps({**before, **figures}, indent=1, sort_keys=True) + "\n")
