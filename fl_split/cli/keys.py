"""Verbs that make certificates and keys."""

from pathlib import Path
from typing import Annotated

import typer

from fl_split.cli.options import errors

app = typer.Typer(no_args_is_help=True, help="Certificates of servers, key pairs of nodes and operators.")


@app.command("authority")
def keys_authority(
    folder: Annotated[Path, typer.Argument(help="where ca.crt (for everybody) and ca.key (secret) go")],
    days: Annotated[int, typer.Option(min=1, help="until it expires")] = 3650,
) -> None:
    """Make the authority whose certificate nodes trust."""
    from fl_split.tools.certificates import make_authority

    with errors():
        print(*make_authority(folder, days), sep="\n")


@app.command("server")
def keys_server(
    folder: Annotated[Path, typer.Argument(help="folder of the authority")],
    name: Annotated[str, typer.Argument(help="of the files: superlink, trunk, ...")],
    host: Annotated[list[str], typer.Option(help="DNS name or IP address that clients use; may be repeated")],
    days: Annotated[int, typer.Option(min=1, help="until it expires")] = 365,
) -> None:
    """Make a server's certificate and key."""
    from fl_split.tools.certificates import make_server_certificate

    with errors():
        print(*make_server_certificate(folder, name, host, days), sep="\n")


@app.command("node")
def keys_node(file: Annotated[Path, typer.Argument(help="the private key; <file>.pub goes to the operator")]) -> None:
    """Make an institution's key pair for its SuperNode."""
    from fl_split.tools.certificates import make_node_key

    with errors():
        print(*make_node_key(file), sep="\n")


@app.command("operator")
def keys_operator(
    file: Annotated[Path, typer.Argument(help="the private key; <file>.pub goes to the institutions")],
) -> None:
    """Make the key pair that a trunk's operator signs statements with."""
    from fl_split.tools.certificates import make_operator_key

    with errors():
        print(*make_operator_key(file), sep="\n")
