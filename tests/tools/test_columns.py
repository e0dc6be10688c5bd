"""What verbs print is for 80 columns and for pipes, and says what it means."""

import pytest
from typer.testing import CliRunner

from fl_split import __version__
from fl_split.cli import app
from fl_split.cli.options import columns
from fl_split.tools.gradcheck import verdict


def test_version_is_shown() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"fl-split {__version__}\n"


def test_rows_stand_in_narrow_columns_with_headings_over_several_lines() -> None:
    rows = [
        {"split": "2+4+2", "node GB": 0.9, "up B/token": 192.0},
        {"split": "10+9+9", "node GB": 12.25, "up B/token": 9},
    ]
    assert columns(rows).splitlines() == [
        " split  node GB  up B/token",
        " 2+4+2      0.9       192.0",
        "10+9+9    12.25           9",
    ]
    wide = columns([{"s": 1, f"{'a' * 40} {'b' * 40}": 2}]).splitlines()
    assert wide == [f"s  {'a' * 40}", f"   {'b' * 40}", f"1  {'2':>40}"]


def test_a_plan_fits_eightycolumns() -> None:
    text = CliRunner().invoke(app, ["plan", "--model", "demo"]).output
    assert text.startswith("split") and "activations" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("cosines", "message"),
    [
        (
            {"identity": 0.02, "blocks-2": 0.08, "streamed": 1.0, "exact": 1.0},
            "No estimate here gives the bottom a useful gradient. Of use are: surrogate.kind='streamed', whose",
        ),
        (
            {"identity": 0.2, "blocks-2": 0.5, "exact": 1.0},
            "identity is weak (cosine 0.20); blocks-2 follows the exact",
        ),
        (
            {"identity": 0.2, "blocks-2": 0.5},
            "The best estimate is blocks-2; a run tries it before it is followed",
        ),
    ],
)
def test_gradcheck_says_in_words_what_its_cosines_mean(cosines: dict[str, float], message: str) -> None:
    assert message in verdict([{"surrogate": name, "gradient cosine": x} for name, x in cosines.items()])
