"""What the command line of a fit refuses, before anything is recorded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fl_split.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:77"], "--device 'cuda:77' is not here"),
        (["--dtype", "float16"], "--dtype 'float16': expected float32 or bfloat16"),
        (["--task", "x"], "--task 'x': expected causal-lm or sequence-classification"),
        (["--task", "sequence-classification"], "a classifier writes no text of its own: give --text"),
        (["--whole", "2"], "--whole 2: expected less than --layers 1"),
    ],
)
def test_command_line_refuses_what_cannot_be(
    checkpoint: Callable[[str], Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    from_text = ["--text", str(Path(__file__)), "--layers", "1"] if "--whole" in arguments else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_split.tools.fit.surrogate.read_text", lambda *_: torch.zeros(48, 16, dtype=torch.long))
        command = ["surrogate", "fit", str(tmp_path / "x"), "--model", str(checkpoint("llama")), *from_text]
        done = CliRunner().invoke(app, [*command, *arguments])
    assert done.exit_code == 1
    assert message in done.output


@pytest.mark.parametrize("rate", ["-1", "0", "nan", "inf"])
def test_a_rate_that_is_none_is_refused_before_anything_is_recorded(
    checkpoint: Callable[[str], Path], tmp_path: Path, rate: str
) -> None:
    command = ["surrogate", "fit", str(tmp_path / "x"), "--model", str(checkpoint("llama")), "--lr", rate]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and f"--lr {rate}: expected a number above 0" in done.output
    assert not list(tmp_path.iterdir())


def test_sequences_beyond_a_models_positions_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["surrogate", "fit", str(tmp_path / "x"), "--model", str(checkpoint("gpt2")), "--length", "65"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "--length 65 is beyond the 64 positions that this model has" in done.output


def test_a_folder_in_the_place_of_the_file_is_refused_before_anything_is_recorded(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["surrogate", "fit", str(tmp_path), "--model", str(checkpoint("llama"))])
    assert done.exit_code == 1 and "is a folder: name the file that is to be written" in " ".join(done.output.split())
