"""scripts/check_gpu.py: without a GPU it says so; its own code works on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_gpu.py"


def check(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_is_content() -> None:
    done = check()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "There is no GPU here that torch can use, so nothing was checked.\n"


def test_a_device_that_is_none_is_refused_before_the_tests() -> None:
    done = check("--device", "cuda:3")
    assert done.returncode == 2 and "argument --device: invalid choice: 'cuda:3'" in done.stderr


def test_figures_of_tiny_shapes_are_written_with_the_device_they_are_of(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--quick", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["card"] == "cpu" and figures["commit"]
    for what in ("forward", "step"):
        for how in ("alone", "batched"):
            assert figures[f"tiny/{what}/{how}-tokens-per-s"] > 0
            assert 0 < figures[f"tiny/{what}/{how}-of-peak"] < 1
            assert f"tiny   {what:8} {how:8}" in done.stdout
