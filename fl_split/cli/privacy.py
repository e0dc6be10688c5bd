"""Verbs that show an institution what its trunk's operator can read."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fl_split.cli.options import NodeValues, RunFile, RunValues, columns, errors, log_to_stderr

app = typer.Typer()
ledger = typer.Typer(no_args_is_help=True, help="What has left this node: <out-dir>/<run.name>/ledger.jsonl.")
app.add_typer(ledger, name="ledger")
LedgerFile = Annotated[
    Path,
    typer.Argument(
        help="ledger.jsonl of a run on the node, or its folder, <out-dir>/<run.name>",
        callback=lambda file: file / "ledger.jsonl" if file.is_dir() else file,
    ),
]


@app.command("audit")
def audit_command(
    config: RunFile = None,
    run_config: RunValues = None,
    node_config: NodeValues = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter folder of a run: what is sent with it")] = None,
    examples: Annotated[int, typer.Option(min=1, help="of this node's data")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="of each example, from its beginning")] = 64,
    canaries: Annotated[int, typer.Option(min=0, help="invented records to look for")] = 8,
    noise: Annotated[float, typer.Option(min=0, help="show what noise of this relative size would hide")] = 0.0,
    passes: Annotated[int | None, typer.Option(min=1, help="in which an example is sent, with other noise")] = None,
    ledger: Annotated[Path | None, typer.Option(help="ledger of a run: passes as counted there")] = None,
    members: Annotated[int, typer.Option(min=0, help="rows trained on, and as many held out, to be told apart")] = 64,
    text: Annotated[list[Path] | None, typer.Option(help="public text in UTF-8 to attack with")] = None,
    out: Annotated[Path, typer.Option(help="page to write; the figures go beside it, as .json")] = Path("audit.html"),
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as one JSON object")] = False,
) -> None:
    """Attack this node's own hidden states: how much of its text the trunk's operator could read. Sends nothing."""
    from fl_split.config import NodeConfig, RunConfig, read_values
    from fl_split.errors import ConfigError
    from fl_split.files import write_atomic
    from fl_split.tools.audit.audit import Setting, audit
    from fl_split.tools.audit.page import page, summary

    log_to_stderr()
    with errors():
        run = RunConfig.from_flat(read_values(config, run_config or []))
        own = NodeConfig.from_flat({"partition-id": 0, **read_values(None, node_config or [])})
        if ledger and passes:
            raise ConfigError("--ledger and --passes both say how often an example is sent: give one of them")
        setting = Setting(adapter, noise, passes or 1, ledger, members, examples, tokens, canaries, tuple(text or ()))
        report = audit(run, own, setting)
        write_atomic(out, page(report))
        write_atomic(out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report))
        return
    print(report["verdict"], *(f"{value:>14}  {text}" for text, value in summary(report)), out.resolve(), sep="\n")


@ledger.command("verify")
def ledger_verify(
    file: LedgerFile,
    head: Annotated[str, typer.Option(help="a last hash that was kept elsewhere: it has to be in the ledger")] = "",
) -> None:
    """Check that no line was changed or taken out; exit code 1 if one was."""
    from fl_split.node.ledger import read_ledger

    with errors():
        sums = read_ledger(file, head)
    print(f"{sum(sums.calls.values())} messages, whole and unchanged; keep this hash elsewhere: {sums.head}")


@ledger.command("show")
def ledger_show(
    file: LedgerFile, as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False
) -> None:
    """Sum up what has left the node, by receiver and kind."""
    from fl_split.node.ledger import read_ledger, rows_of, say_passes, say_shown

    with errors():
        sums = read_ledger(file)
    rows = rows_of(sums)
    if as_json:
        print(*(json.dumps(row) for row in rows), sep="\n")
        return
    print(columns(rows) if rows else "nothing has left this node", say_passes(sums), *say_shown(sums), sep="\n")
