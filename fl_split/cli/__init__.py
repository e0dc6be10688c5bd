"""`fl-split`: thin verbs over the package. The only place that prints."""

import os
from typing import Annotated

import typer

from fl_split import __version__
from fl_split.cli import keys, node, privacy, tools, trunk

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core prints what our own errors say, some twelve times over

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(node.app)
app.add_typer(tools.app)
app.add_typer(privacy.app)
app.add_typer(trunk.app, name="trunk")
app.add_typer(keys.app, name="keys")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fl-split {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """fl-split: see also `flwr run`."""
