"""Verbs of an institution: its executor, and what it has trained, put to use."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_split.cli.options import (
    Address,
    Ca,
    Cert,
    Key,
    OperatorKey,
    Plaintext,
    TokenFile,
    Verifier,
    errors,
    log_to_stderr,
)

if TYPE_CHECKING:
    from fl_split.node.answers import Sampling
    from fl_split.node.tuned import Tuned

app = typer.Typer()

Adapter = Annotated[Path, typer.Argument(help="folder of the adapter that a run exported on this node")]
MaxTokens = Annotated[int, typer.Option(min=1, help="tokens of an answer, at most")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token")]
Seed = Annotated[int | None, typer.Option(help="of the choice of tokens")]
Lookup = Annotated[int, typer.Option(min=0, help="tokens to guess at a time from prompt and answer; 0: none")]
ApiTokenFile = Annotated[str, typer.Option(help="file with the token that callers bring; a must beyond loopback")]
LedgerFile = Annotated[str, typer.Option(help="file that notes what leaves; else <adapter>.ledger.jsonl")]
Base = Annotated[str, typer.Option(help="base model, if it is not where the adapter says")]


@app.command("executor")
def executor_command(
    address: Annotated[str, typer.Argument(help="host:port of the SuperNode's runtime API: its --host and --port")],
    root_certificates: Annotated[Path | None, typer.Option(help="PEM file, where that API speaks TLS")] = None,
) -> None:
    """Run a SuperNode's messages with libraries already loaded; it was started with --isolation process."""
    from fl_split.node.executor import serve

    print(f"executor for the SuperNode at {address}; it has to be started with --isolation process", flush=True)
    with errors():
        serve(address, root_certificates)


@app.command("chat")
def chat_command(
    adapter: Adapter,
    address: Address,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    operator_key: OperatorKey = "",
    verifier: Verifier = "",
    ledger: LedgerFile = "",
    base: Base = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    lookup: Lookup = 0,
) -> None:
    """Talk to what this node has trained; Ctrl-C ends an answer, an empty line or Ctrl-D the conversation."""
    from fl_split.errors import FLSplitError
    from fl_split.node.answers import Sampling
    from fl_split.node.replicas import Credentials
    from fl_split.node.tuned import load_tuned

    log_to_stderr()
    sampling = Sampling(max_tokens, temperature, lookup=lookup)
    messages: list[dict[str, str]] = []
    with errors():
        trust = Credentials(ca, cert, key, token_file, allow_plaintext, operator_key, verifier)
        with load_tuned(adapter, address, trust, base=base, ledger=ledger) as tuned:
            while question := _ask():
                asked = [*messages, {"role": "user", "content": question}]
                try:
                    text = _say(tuned, asked, sampling)
                except FLSplitError as error:
                    if not _is_terminal():
                        raise
                    print(f"\nerror: {error}\n(that question is forgotten; an empty line ends)", file=sys.stderr)
                    continue
                messages = [*asked, {"role": "assistant", "content": text}]


def _say(tuned: "Tuned", messages: list[dict[str, str]], sampling: "Sampling") -> str:
    """Print an answer as it comes, on a line of its own."""
    from fl_split.node.answers import answer

    made, text = answer(tuned, tuned.encode(messages), sampling), ""
    try:
        for piece in made:
            print(piece, end="", flush=True)
            text += piece
        said = f"{made.num_tokens} tokens, {made.num_tokens / made.seconds:.1f} tokens/s"
    except KeyboardInterrupt:
        made.cancel()
        said = "cut short"
    print(flush=True)
    print(f"({said})", file=sys.stderr)
    return text


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _ask() -> str:
    try:
        return input("> " if _is_terminal() else "").strip()
    except (EOFError, KeyboardInterrupt):
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
    operator_key: OperatorKey = "",
    verifier: Verifier = "",
    ledger: LedgerFile = "",
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

    log_to_stderr()
    sampling = Sampling(max_tokens, temperature, seed=seed)
    with errors(), tqdm(unit="answer") as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        trust = Credentials(ca, cert, key, token_file, allow_plaintext, operator_key, verifier)
        with load_tuned(adapter, address, trust, base=base, ledger=ledger) as tuned:
            answer_file(tuned, questions, answers, prompt, sampling, batch_size, progress)


@app.command("serve")
def serve_command(
    adapter: Adapter,
    address: Address,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: a free one")] = 8000,
    api_token_file: ApiTokenFile = "",
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = "",
    allow_plaintext: Plaintext = False,
    operator_key: OperatorKey = "",
    verifier: Verifier = "",
    ledger: LedgerFile = "",
    base: Base = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
) -> None:
    """Serve what this node has trained to programs that speak OpenAI's protocol."""
    from fl_split.node.answers import Sampling
    from fl_split.node.replicas import Credentials
    from fl_split.node.serve import serve
    from fl_split.node.tuned import load_tuned

    log_to_stderr()
    with errors():
        trust = Credentials(ca, cert, key, token_file, allow_plaintext, operator_key, verifier)
        with load_tuned(adapter, address, trust, base=base, ledger=ledger) as tuned:
            serve(tuned, host, port, api_token_file, Sampling(max_tokens, temperature), print)
