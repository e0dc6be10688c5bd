"""`fl-split`: thin verbs over the package. The only place that prints."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fl_split import __version__
from fl_split.errors import FLSplitError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
trunk = typer.Typer(no_args_is_help=True, help="The trunk service.")
surrogate = typer.Typer(no_args_is_help=True, help="What gives the bottom its gradient.")
keys = typer.Typer(no_args_is_help=True, help="Certificates of servers, key pairs of nodes.")
token = typer.Typer(no_args_is_help=True, help="Bearer tokens of institutions; the file holds hashes only.")
app.add_typer(trunk, name="trunk")
app.add_typer(surrogate, name="surrogate")
app.add_typer(keys, name="keys")
trunk.add_typer(token, name="token")

Address = Annotated[str, typer.Argument(help="host:port")]
Ca = Annotated[str, typer.Option(help="PEM file of the CA that the trunk's certificate must come from")]
Cert = Annotated[str, typer.Option(help="PEM file of one's own certificate (mTLS)")]
Key = Annotated[str, typer.Option(help="PEM file of its private key")]
TokenFile = Annotated[str, typer.Option(help="file that holds one's bearer token")]
Plaintext = Annotated[bool, typer.Option(help="no TLS even beyond loopback")]
Timeout = Annotated[float, typer.Option(help="seconds to wait for an answer")]
Tokens = Annotated[Path, typer.Option(help="the tokens file: `security.tokens` of the trunk")]


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


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what went wrong into one message and exit code 1."""
    try:
        yield
    except FLSplitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@trunk.command("serve")
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
    with _errors():
        serve(TrunkConfig.load(config, [*overrides, *(set_ or ())]))


@trunk.command("describe")
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

    with _errors():
        about = describe(address, Credentials(ca, cert, key, token_file, allow_plaintext), timeout_s)
    if as_json:
        print(json.dumps(about))
        return
    for name, value in about.items():
        print(f"{name:20} {value}")


@trunk.command("ping")
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

    with _errors():
        status, seconds = ping(address, Credentials(ca, cert, key, "", allow_plaintext), timeout_s)
    print(f"{status} in {seconds * 1e3:.1f} ms")
    if status != "SERVING":
        raise typer.Exit(1)


@trunk.command("top")
def trunk_top(
    url: Annotated[str, typer.Argument(help="the trunk's metrics")] = "http://127.0.0.1:9471/metrics",
    interval_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option(help="one look, then exit")] = False,
) -> None:
    """Watch a trunk: rates per institution, queue, batches."""
    from fl_split.tools.watch import scrape, table

    with _errors():
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
    days: Annotated[float | None, typer.Option(help="until it expires; without it, never")] = None,
) -> None:
    """Create a token and print it: it cannot be shown again."""
    from fl_split.trunk.access import add_token

    with _errors():
        print(add_token(tokens, institution, days))


@token.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="a token's id, or an institution: all of its tokens")], tokens: Tokens
) -> None:
    """Remove tokens; a running trunk refuses them from its next call on."""
    from fl_split.trunk.access import revoke_tokens

    with _errors():
        print(f"revoked {revoke_tokens(tokens, name)}")


@token.command("list")
def token_list(tokens: Tokens) -> None:
    """Show ids, institutions and dates; the tokens themselves are not kept anywhere."""
    from fl_split.trunk.access import read_tokens

    view = Table("id", "institution", "created", "expires")
    with _errors():
        for entry in read_tokens(tokens):
            view.add_row(entry.id, entry.institution, _date(entry.created), _date(entry.expires))
    Console().print(view)


@keys.command("authority")
def keys_authority(
    folder: Annotated[Path, typer.Argument(help="where ca.crt (for everybody) and ca.key (secret) go")],
    days: Annotated[int, typer.Option(min=1, help="until it expires")] = 3650,
) -> None:
    """Make the authority whose certificate nodes trust."""
    from fl_split.tools.certificates import make_authority

    with _errors():
        print(*make_authority(folder, days), sep="\n")


@keys.command("server")
def keys_server(
    folder: Annotated[Path, typer.Argument(help="folder of the authority")],
    name: Annotated[str, typer.Argument(help="of the files: superlink, trunk, ...")],
    host: Annotated[list[str], typer.Option(help="DNS name or IP address that clients use; may be repeated")],
    days: Annotated[int, typer.Option(min=1, help="until it expires")] = 365,
) -> None:
    """Make a server's certificate and key."""
    from fl_split.tools.certificates import make_server_certificate

    with _errors():
        print(*make_server_certificate(folder, name, host, days), sep="\n")


@keys.command("node")
def keys_node(file: Annotated[Path, typer.Argument(help="the private key; <file>.pub goes to the operator")]) -> None:
    """Make an institution's key pair for its SuperNode."""
    from fl_split.tools.certificates import make_node_key

    with _errors():
        print(*make_node_key(file), sep="\n")


@app.command("executor")
def executor_command(
    address: Annotated[str, typer.Argument(help="host:port of the SuperNode's runtime API: its --host and --port")],
    root_certificates: Annotated[Path | None, typer.Option(help="PEM file, where that API speaks TLS")] = None,
) -> None:
    """Run a SuperNode's messages with libraries already loaded; it was started with --isolation process."""
    from fl_split.node.executor import serve

    with _errors():
        serve(address, root_certificates)


Model = Annotated[str, typer.Option(help="demo, a path of a model folder, or a Hugging Face id")]
Revision = Annotated[str, typer.Option(help="branch, tag or commit of a Hugging Face id")]
Bottom = Annotated[int, typer.Option(help="split.bottom-layers")]
Top = Annotated[int, typer.Option(help="split.top-layers")]


@surrogate.command("fit")
def surrogate_fit(
    out: Annotated[Path, typer.Argument(help="file to write, for model.surrogate of the trunk")],
    model: Model = "demo",
    revision: Revision = "",
    bottom_layers: Bottom = 2,
    top_layers: Top = 2,
    text: Annotated[
        list[Path] | None, typer.Option(help="public text in UTF-8; without it, the model writes its own")
    ] = None,
    layers: Annotated[float, typer.Option(help="memory and compute on a node, in trunk layers")] = 2.0,
    whole: Annotated[int, typer.Option(min=0, help="of these, first layers of the trunk left as they are")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="of the fit")] = 3000,
    lessons: Annotated[int, typer.Option(min=1, help="batches to learn from, recorded once")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences per step")] = 8,
    length: Annotated[int, typer.Option(min=8, help="tokens per sequence")] = 96,
    lr: Annotated[float, typer.Option(help="AdamW's rate")] = 2.5e-3,
    seed: int = 0,
    task: Annotated[str, typer.Option(help="causal-lm, or sequence-classification for encoders and classifiers")] = (
        "causal-lm"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model: float32 or bfloat16")] = "float32",
) -> None:
    """Fit a surrogate whose gradient is the trunk's, to public text; the owner does it once per model and split.

    Killed, it goes on from where it was when the same command is given again.
    """
    from fl_split.config import Task
    from fl_split.tools.fit_folder import Fit
    from fl_split.tools.fit_surrogate import fit_model

    _log_to_stderr()
    fit = Fit(layers, steps, batch_size, length, lr, seed, whole, lessons, cast(Task, task), device, dtype)
    with _errors():
        card = fit_model((model, revision), (bottom_layers, top_layers), text or [], fit, out)
    for name, value in card.items():
        print(f"{name:22} {value}")


@app.command("gradcheck")
def gradcheck_command(
    model: Model = "demo",
    revision: Revision = "",
    bottom_layers: Bottom = 2,
    top_layers: Top = 2,
    data: Annotated[str, typer.Option(help="data.path: private examples, used here and sent nowhere")] = "demo",
    prompt: Annotated[str, typer.Option(help="data.prompt")] = "question",
    response: Annotated[str, typer.Option(help="data.response")] = "answer",
    text: Annotated[str, typer.Option(help="data.text")] = "",
    max_length: Annotated[int, typer.Option(help="data.max-length")] = 256,
    layers: Annotated[list[int] | None, typer.Option(help="numbers of kept layers to look at")] = None,
    matched: Annotated[list[Path] | None, typer.Option(help="fitted surrogates to look at")] = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter folder of a run: check there")] = None,
    batches: Annotated[int, typer.Option(min=1, help="batches of 8 examples")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Compare each surrogate's bottom gradient with the exact one, on one's own model and data."""
    from fl_split.config import Data
    from fl_split.tools.gradcheck import check_model, verdict

    _log_to_stderr()
    with _errors():
        rows = check_model(
            (model, revision),
            (bottom_layers, top_layers),
            Data(path=data, prompt=prompt, response=response, text=text, max_length=max_length),
            layers or [1, 2],
            matched or [],
            adapter,
            batches,
        )
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    shown = [{key: f"{x:.3f}" if isinstance(x, float) else str(x) for key, x in row.items()} for row in rows]
    print(_columns(shown), verdict(rows), sep="\n\n")


Adapter = Annotated[Path, typer.Argument(help="folder of the adapter that a run exported on this node")]
MaxTokens = Annotated[int, typer.Option(min=1, help="tokens of an answer, at most")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token")]
Seed = Annotated[int | None, typer.Option(help="of the choice of tokens")]
Lookup = Annotated[int, typer.Option(min=0, help="tokens to guess at a time from prompt and answer; 0: none")]
ApiTokenFile = Annotated[str, typer.Option(help="file with the token that callers bring; a must beyond loopback")]
Base = Annotated[str, typer.Option(help="base model, if it is not where the adapter says")]


@app.command("chat")
def chat_command(
    adapter: Adapter,
    address: Address,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    base: Base = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    lookup: Lookup = 0,
) -> None:
    """Talk to what this node has trained; an empty line or Ctrl-D ends it."""
    from fl_split.node.answers import Sampling, answer
    from fl_split.node.replicas import Credentials
    from fl_split.node.tuned import load_tuned

    _log_to_stderr()
    sampling = Sampling(max_tokens, temperature, lookup=lookup)
    messages: list[dict[str, str]] = []
    with _errors():
        with load_tuned(adapter, address, Credentials(ca, cert, key, token_file, allow_plaintext), base=base) as tuned:
            while question := _ask():
                messages.append({"role": "user", "content": question})
                made, text = answer(tuned, tuned.encode(messages), sampling), ""
                for piece in made:
                    print(piece, end="", flush=True)
                    text += piece
                rate = made.num_tokens / made.seconds
                print(f"\n({made.num_tokens} tokens, {rate:.1f} tokens/s)", file=sys.stderr)
                messages.append({"role": "assistant", "content": text})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


@app.command("generate")
def generate_command(
    adapter: Adapter,
    address: Address,
    questions: Annotated[Path, typer.Option("--in", help="JSONL: an object a line")],
    answers: Annotated[Path, typer.Option("--out", help="JSONL: the same objects with their answer; is gone on with")],
    prompt: Annotated[str, typer.Option(help="key of the question: a text, or a list of messages")] = "question",
    batch_size: Annotated[int, typer.Option(min=1, help="questions at the same time")] = 8,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    base: Base = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
) -> None:
    """Answer a file of questions with what this node has trained; what is cut off goes on where it was."""
    from tqdm import tqdm

    from fl_split.node.answers import Sampling, answer_file
    from fl_split.node.replicas import Credentials
    from fl_split.node.tuned import load_tuned

    _log_to_stderr()
    sampling = Sampling(max_tokens, temperature, seed=seed)
    with _errors(), tqdm(unit="answer") as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        with load_tuned(adapter, address, Credentials(ca, cert, key, token_file, allow_plaintext), base=base) as tuned:
            answer_file(tuned, questions, answers, prompt, sampling, batch_size, progress)


@app.command("serve")
def serve_command(
    adapter: Adapter,
    address: Address,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    api_token_file: ApiTokenFile = "",
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    base: Base = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
) -> None:
    """Serve what this node has trained to programs that speak OpenAI's protocol."""
    from fl_split.node.answers import Sampling
    from fl_split.node.replicas import Credentials
    from fl_split.node.serve import serve
    from fl_split.node.tuned import load_tuned

    _log_to_stderr()
    with _errors():
        with load_tuned(adapter, address, Credentials(ca, cert, key, token_file, allow_plaintext), base=base) as tuned:
            serve(tuned, host, port, api_token_file, Sampling(max_tokens, temperature), print)


RunFile = Annotated[Path | None, typer.Option("--config", help="TOML file of a run, such as configs/jsonl.toml")]
RunValues = Annotated[
    list[str] | None, typer.Option("--run-config", "-c", help="key=value of a run, as for flwr run; may be repeated")
]


@app.command("doctor")
def doctor_command(
    config: RunFile = None,
    run_config: RunValues = None,
    node_config: Annotated[
        list[str] | None, typer.Option(help="key=value of this node, as for flower-supernode")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="look at the first rows of the data")] = 10_000,
    show: Annotated[int, typer.Option(min=0, help="print so many examples as the model sees them")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Check versions, model, data, trunk, disk and memory before a run; exit code 1 if anything fails."""
    from fl_split.config import NodeConfig, RunConfig, read_values
    from fl_split.tools.doctor import diagnose, show_examples

    logging.getLogger("fl_split").addHandler(logging.NullHandler())  # the checks say it all
    failed = False
    with _errors():
        run = RunConfig.from_flat(read_values(config, run_config or []))
        own = NodeConfig.from_flat({"partition-id": 0, **read_values(None, node_config or [])})
        for check in diagnose(run, own, rows):
            failed |= check.status == "fail"
            if as_json:
                print(json.dumps(vars(check)))
            else:
                print(f"{check.status:5} {check.name:10} {check.text}")
        if show and not as_json:
            print(*show_examples(run, own, show), sep="\n\n")
    if failed:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, <run.dir>/<run.name>; several are compared")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("report.html"),
) -> None:
    """Write what runs came to as one HTML page."""
    from fl_split.files import write_atomic
    from fl_split.tools.report import report

    with _errors():
        write_atomic(out, report(run.expanduser() for run in runs))
    print(out.resolve())


@app.command("stop")
def stop_command(
    port: Annotated[int, typer.Option(help="its port; 0: the one that flwr run uses")] = 0,
) -> None:
    """Stop the SuperLink that flwr run has left running, with the runs on it."""
    from fl_split.tools.superlink import local_port, stop

    with _errors():
        number = port or local_port()
        print(f"stopped the SuperLink on port {number} (process {stop(number)})")


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Option(help="model.name; without it, the configuration's")] = "",
    revision: Revision = "",
    config: RunFile = None,
    run_config: RunValues = None,
    split: Annotated[list[str] | None, typer.Option(help="such as 4+2; may be repeated; by default several")] = None,
    bandwidth_mbps: Annotated[float, typer.Option(min=0.001, help="between node and trunk, Mbit/s each way")] = 100.0,
    latency_ms: Annotated[float, typer.Option(min=0, help="round trip between them")] = 20.0,
    node_tflops: Annotated[float, typer.Option(min=0, help="what a node computes; 0: count transfers only")] = 0.0,
    trunk_tflops: Annotated[float, typer.Option(min=0, help="what the trunk computes; 0: not counted")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Show what splits of a model cost in memory, bytes and time, from its configuration alone."""
    from fl_split.config import RunConfig, read_values
    from fl_split.plan.plan import Link, rows_of

    link = Link(bandwidth_mbps * 1e6, latency_ms / 1e3, node_tflops * 1e12, trunk_tflops * 1e12)
    with _errors():
        values = read_values(config, run_config or [])
        if model:
            values |= {"model.name": model, "model.revision": revision}
        rows = rows_of(RunConfig.from_flat(values), split or [], link)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    print(_columns(rows))


def _columns(rows: Sequence[Mapping[str, object]]) -> str:
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


def _log_to_stderr() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for every load of a model
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fl_split").setLevel(logging.INFO)


def _date(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    app()
