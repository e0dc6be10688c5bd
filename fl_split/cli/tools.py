"""Verbs before and after a run: what a split costs, whether a run would work here, what runs came to."""

import json
import logging
from pathlib import Path
from textwrap import fill
from typing import Annotated, cast

import typer

from fl_split.cli.options import (
    Bottom,
    Model,
    NodeValues,
    Revision,
    RunFile,
    RunValues,
    Top,
    columns,
    errors,
    log_to_stderr,
)

app = typer.Typer()
surrogate = typer.Typer(no_args_is_help=True, help="What gives the bottom its gradient.")
app.add_typer(surrogate, name="surrogate")


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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
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
    from fl_split.tools.fit.folder import Fit
    from fl_split.tools.fit.surrogate import fit_model

    log_to_stderr()
    fit = Fit(layers, steps, batch_size, length, lr, seed, whole, lessons, cast(Task, task), device, dtype)
    with errors():
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

    log_to_stderr()
    with errors():
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
    print(columns(shown), verdict(rows), sep="\n\n")


@app.command("doctor")
def doctor_command(
    config: RunFile = None,
    run_config: RunValues = None,
    node_config: NodeValues = None,
    rows: Annotated[int, typer.Option(min=2, help="look at the first rows of the data")] = 10_000,
    show: Annotated[int, typer.Option(min=0, help="print so many examples as the model sees them")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Check versions, model, data, trunk, disk and memory before a run; exit code 1 if anything fails."""
    from transformers.utils import logging as transformers_logging

    from fl_split.config import NodeConfig, RunConfig, read_values
    from fl_split.tools.doctor import diagnose, show_examples

    logging.getLogger("fl_split").addHandler(logging.NullHandler())  # the checks say it all
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    failed = False
    with errors():
        run = RunConfig.from_flat(read_values(config, run_config or []))
        of_node = read_values(None, node_config or [])
        own = NodeConfig.from_flat({"partition-id": 0, **of_node})
        for check in diagnose(run, own, rows, numbered=not of_node or "partition-id" in of_node):
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
    privacy: Annotated[
        bool, typer.Option("--privacy", help="what left a node, of its own folder: <out-dir>/<run.name>")
    ] = False,
    audit: Annotated[Path | None, typer.Option(help="for --privacy: the .json that 'fl-split audit' wrote")] = None,
) -> None:
    """Write what runs came to, or what left a node, as one HTML page."""
    from fl_split.files import write_atomic
    from fl_split.tools.privacy_report import privacy_report
    from fl_split.tools.report import report

    with errors():
        if privacy:
            write_atomic(out, privacy_report(runs[0].expanduser(), audit))
        else:
            write_atomic(out, report(run.expanduser() for run in runs))
    print(out.resolve())


@app.command("stop")
def stop_command(
    port: Annotated[int, typer.Option(help="its port; 0: the one that flwr run uses")] = 0,
) -> None:
    """Stop the SuperLink that flwr run has left running, with the runs on it."""
    from fl_split.tools.superlink import local_port, stop

    with errors():
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
    from fl_split.config import AUTO, RunConfig, read_values
    from fl_split.plan.plan import Link, rows_of

    link = Link(bandwidth_mbps * 1e6, latency_ms / 1e3, node_tflops * 1e12, trunk_tflops * 1e12)
    with errors():
        values = read_values(config, run_config or [])
        if model:
            values |= {"model.name": model, "model.revision": revision}
        run = RunConfig.from_flat(values)
        rows = rows_of(run, split or [], link)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    print(columns(rows))
    if run.surrogate.kind == "auto":
        print(fill(f"surrogate.kind=auto, planned as blocks: {AUTO.replace('`', '')}", 80))
