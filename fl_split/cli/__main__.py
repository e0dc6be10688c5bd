"""`python -m fl_split.cli`."""

from fl_split.cli import app

app()
