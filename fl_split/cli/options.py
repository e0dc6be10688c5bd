"""Options that several verbs take, and what all verbs do: errors in one line, tables, logs."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fl_split.errors import FLSplitError
from fl_split.files import disk_in_words

Address = Annotated[str, typer.Argument(help="host:port")]
Ca = Annotated[str, typer.Option(help="PEM file of the CA that the trunk's certificate must come from")]
Cert = Annotated[str, typer.Option(help="PEM file of one's own certificate (mTLS)")]
Key = Annotated[str, typer.Option(help="PEM file of its private key")]
TokenFile = Annotated[str, typer.Option(help="file that holds one's bearer token")]
Plaintext = Annotated[bool, typer.Option(help="no TLS even beyond loopback")]
OperatorKey = Annotated[str, typer.Option(help="PEM file of the public key that must have signed for the trunk")]
Verifier = Annotated[str, typer.Option(help="command that judges evidence of the trunk's machine; see docs/trunk.md")]
Timeout = Annotated[float, typer.Option(help="seconds to wait for an answer")]
Model = Annotated[str, typer.Option(help="demo, a path of a model folder, or a Hugging Face id")]
Revision = Annotated[str, typer.Option(help="branch, tag or commit of a Hugging Face id")]
Bottom = Annotated[int, typer.Option(help="split.bottom-layers")]
Top = Annotated[int, typer.Option(help="split.top-layers")]
RunFile = Annotated[Path | None, typer.Option("--config", help="TOML file of a run, such as configs/jsonl.toml")]
RunValues = Annotated[
    list[str] | None, typer.Option("--run-config", "-c", help="key=value of a run, as for flwr run; may be repeated")
]

NodeValues = Annotated[list[str] | None, typer.Option(help="key=value of this node, as for flower-supernode")]


@contextmanager
def errors() -> Iterator[None]:
    """Turn what went wrong into one message and exit code 1."""
    try:
        with disk_in_words("a file of this command"):
            yield
    except FLSplitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def columns(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows in columns as narrow as they can be, with headings over several lines: for 80 columns, and for pipes."""
    cells = [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    fits = sum(widths) + 2 * (len(widths) - 1) <= 80
    headings = [[key] if fits else key.split(" ") for key in rows[0]]
    height = max(map(len, headings))
    lines = [[(words + [""] * height)[i] for words in headings] for i in range(height)]
    lines += cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= 80 else " "
    return "\n".join(
        gap.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def log_to_stderr() -> None:
    """Show what the package logs, and no progress bar for every load of a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fl_split").setLevel(logging.INFO)
