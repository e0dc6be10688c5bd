"""Every benchmark script starts and writes its figures; the folder for --bench is what FL_SPLIT_BENCH names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = os.path.abspath(os.environ["FL_SPLIT_BENCH"]) if os.environ.get("FL_SPLIT_BENCH") else ""
needs_bench = pytest.mark.skipif(not BENCH, reason="FL_SPLIT_BENCH is not set: see benchmarks/README.md for the folder")
CASES = {  # script: (arguments, a figure that it writes)
    "bench_bottom": (["--bench", BENCH, "--jobs", "1", "--work", "{tmp}"], "gap-closed/matched-2"),
    "bench_classifier": (["--bench", BENCH], "accuracy/whole"),
    "bench_families": ([], "families-exact"),
    "bench_federation": (["--bench", BENCH, "--jobs", "1", "--work", "{tmp}"], "gain-over-local/as-is/both"),
    "bench_generate": ([], "decode-ratio/local"),
    "bench_memory": (["--work", "{tmp}"], "client-peak-over-share"),
    "bench_privacy": (
        ["--models", f"{BENCH}/llama-7m", "--data", f"{BENCH}/medquad/niddk.jsonl"],
        "recovered/llama-7m/2/none",
    ),
    "bench_real": (
        ["--model", f"{BENCH}/llama-7m", "--data", f"{BENCH}/medquad/niddk.jsonl", "--kinds", "none", "exact"],
        "heldout-loss/2+2/exact",
    ),
    "bench_record_dp": (
        ["--model", f"{BENCH}/llama-7m", "--data", f"{BENCH}/medquad/niddk.jsonl"],
        "step-time-ratio/none",
    ),
    "bench_rounds": (["--only", "start", "deployment", "simulation"], "round-overhead-s/simulation"),
    "bench_secure": ([], "secure-sum-error/4-nodes"),
    "bench_trunk": (["--bench", BENCH, "--only", "bytes"], "heldout-loss/float32"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[needs_bench] if {"--bench", "--data"} & set(CASES[s][0]) else []) for s in CASES]
)
def test_quick_run_writes_its_figures(script: str, tmp_path: Path) -> None:
    arguments, figure = CASES[script]
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--quick", "--json", tmp_path / "figures.json"]
    command += [word.format(tmp=tmp_path) for word in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-5000:]
    assert isinstance(json.loads((tmp_path / "figures.json").read_text())[figure], int | float)


def test_every_script_has_a_quick_run_and_a_row_in_the_table() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts == CASES.keys()
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert [s for s in scripts if f"| `{s}.py` |" not in readme] == []
