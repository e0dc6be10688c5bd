"""Verbs about a trunk: serve one, look at one, hand out tokens for one."""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fl_split.cli.options import Address, Ca, Cert, Key, Plaintext, Timeout, TokenFile, errors

app = typer.Typer(no_args_is_help=True, help="The trunk service.")
token = typer.Typer(no_args_is_help=True, help="Bearer tokens of institutions; the file holds hashes only.")
statement = typer.Typer(no_args_is_help=True, help="What the operator states of the trunk, signed.")
app.add_typer(token, name="token")
app.add_typer(statement, name="statement")

Tokens = Annotated[Path, typer.Option(help="the tokens file: `security.tokens` of the trunk")]


@app.command("serve")
def trunk_serve(
    config: Annotated[Path | None, typer.Option(help="TOML file, such as configs/trunk.toml")] = None,
    model: Annotated[str | None, typer.Option(help="model.name")] = None,
    host: Annotated[str | None, typer.Option(help="server.host")] = None,
    port: Annotated[int | None, typer.Option(help="server.port")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any key: section.key=value; may be repeated")] = None,
) -> None:
    """Serve the middle layers of a model; flags come before the file."""
    from fl_split.trunk.config import TrunkConfig
    from fl_split.trunk.process import serve

    flags = {"model.name": model, "server.host": host, "server.port": port}
    overrides = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    with errors():
        serve(TrunkConfig.load(config, [*overrides, *(set_ or ())]))


@app.command("describe")
def trunk_describe(
    address: Address,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    timeout_s: Timeout = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Show what a trunk holds and accepts."""
    from fl_split.node.replicas import Credentials
    from fl_split.tools.watch import describe

    with errors():
        about = describe(address, Credentials(ca, cert, key, token_file, allow_plaintext), timeout_s)
    if as_json:
        print(json.dumps(about))
        return
    for name, value in about.items():
        print(f"{name:20} {value}")


@app.command("ping")
def trunk_ping(
    address: Address,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    allow_plaintext: Plaintext = False,
    timeout_s: Timeout = 5.0,
) -> None:
    """Ask for a trunk's health; exit code 1 unless it serves."""
    from fl_split.node.replicas import Credentials
    from fl_split.tools.watch import ping

    with errors():
        status, seconds = ping(address, Credentials(ca, cert, key, "", allow_plaintext), timeout_s)
    print(f"{status} in {seconds * 1e3:.1f} ms")
    if status != "SERVING":
        raise typer.Exit(1)


@app.command("top")
def trunk_top(
    url: Annotated[str, typer.Argument(help="the trunk's metrics")] = "http://127.0.0.1:9471/metrics",
    interval_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option(help="one look, then exit")] = False,
) -> None:
    """Watch a trunk: rates per institution, queue, batches."""
    from fl_split.tools.watch import scrape, table

    with errors():
        before = scrape(url)
        time.sleep(interval_s)
        now = scrape(url)
        if once or not sys.stdout.isatty():
            screen = Console(width=None if sys.stdout.isatty() else 120)
            screen.print(table(before, now))
            while not once:
                time.sleep(interval_s)
                before, now = now, scrape(url)
                screen.print(table(before, now))
            return
        with Live(table(before, now), auto_refresh=False) as live:
            while True:
                live.update(table(before, now), refresh=True)
                time.sleep(interval_s)
                before, now = now, scrape(url)


@token.command("add")
def token_add(
    institution: Annotated[str, typer.Argument(help="its name in metrics and logs")],
    tokens: Tokens,
    days: Annotated[float | None, typer.Option(min=0.001, help="until it expires; without it, never")] = None,
) -> None:
    """Create a token and print it: it cannot be shown again."""
    from fl_split.trunk.access import add_token

    with errors():
        print(add_token(tokens, institution, days))


@token.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="a token's id, or an institution: all of its tokens")], tokens: Tokens
) -> None:
    """Remove tokens; a running trunk refuses them from its next call on."""
    from fl_split.trunk.access import revoke_tokens

    with errors():
        print(f"revoked {revoke_tokens(tokens, name)}")


@token.command("list")
def token_list(tokens: Tokens) -> None:
    """Show ids, institutions and dates; the tokens themselves are not kept anywhere."""
    from fl_split.trunk.access import read_tokens

    view = Table("id", "institution", "created", "expires")
    with errors():
        for entry in read_tokens(tokens):
            view.add_row(entry.id, entry.institution, _date(entry.created), _date(entry.expires))
    Console().print(view)


@statement.command("sign")
def statement_sign(
    key: Annotated[Path, typer.Option(help="the operator's private key, of 'fl-split keys operator'")],
    operator: Annotated[str, typer.Option(help="who runs the trunk, as institutions know it")],
    log_policy: Annotated[str, typer.Option(help="what is kept of calls, and for how long, in your words")],
    out: Annotated[Path, typer.Option(help="file to write: `security.statement` of the trunk")],
    config: Annotated[Path | None, typer.Option(help="the trunk's TOML file: its model and certificate")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any key: section.key=value; may be repeated")] = None,
    cert: Annotated[list[Path] | None, typer.Option(help="of another replica; may be repeated")] = None,
    days: Annotated[float, typer.Option(min=0.01, help="for which it holds")] = 90,
) -> None:
    """Sign what this trunk serves and what is kept of calls; nodes with your public key ask to see it."""
    from fl_split.errors import ConfigError
    from fl_split.files import write_atomic
    from fl_split.tools.statement import make_statement, sign
    from fl_split.trunk.config import TrunkConfig

    with errors():
        trunk = TrunkConfig.load(config, set_ or ())
        files = [*([Path(trunk.security.cert)] if trunk.security.cert else []), *(cert or ())]
        if not files:
            raise ConfigError("a statement names the trunk's TLS keys: set security.cert in --config, or give --cert")
        signed = sign(make_statement(trunk.model, files, operator, log_policy, days), key)
        write_atomic(out, signed.decode())
    print(out.resolve())


@statement.command("show")
def statement_show(
    file: Annotated[Path, typer.Argument(help="a statement")],
    key: Annotated[Path | None, typer.Option(help="the operator's public key, to check the signature with")] = None,
) -> None:
    """Show a statement, and with --key whether it holds; exit code 1 if it does not."""
    from dataclasses import asdict

    from fl_split.attestation import Statement
    from fl_split.errors import ConfigError
    from fl_split.node.vetting import public_key

    with errors():
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({type(error).__name__})") from None
        found = Statement.verified(data, public_key("--key", str(key))) if key else Statement.of(data)
    for name, value in asdict(found).items():
        print(f"{name.replace('_', '-'):16} {', '.join(value) if isinstance(value, tuple) else value}")
    print("signed by this key, and holds now" if key else "not checked: give --key")


def _date(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
