"""A run's configuration, checked once at the edge; below it, plain arguments travel.

Flower hands an app flat scalars (``train.batch-size = 8``) and does not check their types. `RunConfig` does, and
names a wrong key as the user wrote it. Defaults live here; a test holds `pyproject.toml` and the docs equal to them.
"""

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from fl_split.errors import ConfigError, explain_invalid

if TYPE_CHECKING:
    import torch

_KEYS = "the table of keys in docs/configuration.md"

_PAIR = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")  # as Flower finds them
_QUOTES = "strings need quotes, as in 'run.name=\"mine\"'"

Scalar = str | int | float | bool
Positive = Annotated[int, Field(ge=1)]
Share = Literal["none", "bottom", "top", "both"]
Tensors = Literal["both", "a-only", "b-only"]
StrategyName = Literal[
    "fedavg", "fedavgm", "fedadam", "fedprox", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"
]
Kind = Literal["none", "identity", "blocks", "distilled", "matched", "streamed", "shares", "exact"]
Combine = Literal["mean", "svd", "stack", "exact"]
Task = Literal["causal-lm", "sequence-classification"]
Partitioner = Literal["", "iid", "column", "dirichlet", "pathological", "linear", "exponential"]
_TRACKERS = ("tensorboard", "trackio", "mlflow", "wandb")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$")]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True)


class Model(_Section):
    """The base model."""

    name: str = Field("demo", description="`demo`, an absolute or `~` path of a model folder, or a Hugging Face id")
    revision: str = Field("", description="branch, tag or commit of a Hugging Face id; empty: the default branch")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights, on nodes and trunk")

    @property
    def is_local(self) -> bool:
        """Whether `name` stands for a folder of this machine, not for a model of the hub."""
        return is_local_model(self.name)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """`dtype` as torch has it; imported only here: commands that need no model read the configuration, too."""
        import torch

        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class Split(_Section):
    """Where the model is cut."""

    bottom_layers: Positive = Field(2, description="layers on the node before the trunk")
    top_layers: Positive = Field(2, description="layers on the node after the trunk")
    client_memory: Annotated[str, Field(pattern=r"^$|^ *[0-9]+(\.[0-9]+)? *[A-Za-z]+ *$")] = Field(
        "", description="such as `4GB`: take the deepest split that a node of this memory can train, instead of the two"
    )


class Surrogate(_Section):
    """What gives the bottom its gradient."""

    kind: Kind = Field(
        "blocks",
        description="`blocks`: kept trunk layers; `distilled`: those, trained on the way; `matched`: published by the "
        "trunk; `streamed`: all trunk layers, read from disk one at a time; `identity`; `none`: the bottom stays "
        "frozen; `shares`: dL/dh2 leaves the node as two shares, for two trunks; `exact`: dL/dh2 leaves the node",
    )
    layers: Positive = Field(2, description="trunk layers kept on the node, for `blocks` and `distilled`")
    check: bool = Field(
        True,
        description="try the bottom's gradient on examples kept apart for it, and train the bottom only in rounds in "
        "which it lowers the loss for sure; not for kinds with an exact gradient",
    )
    file: str = Field("", description="made by `fl-split surrogate fit`, for the embedded trunk to publish")
    distill: bool = Field(False, description="train a `matched` surrogate on the node as well")
    distill_lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="AdamW's rate for the surrogate itself")
    probe_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="while a surrogate is trained on the node: at every so many micro-batches ask the trunk about "
        "randomly shifted hidden states, too, and fit the surrogate's slope to the answer; 0: never",
    )

    mask_std: Annotated[float, Field(ge=1, le=4096)] = Field(
        30.0,
        description="of `shares`: standard deviation c of the mask, where a sequence's gradient is 1: one trunk learns "
        "at most 0.72 / c^2 bits of it; rounding grows with c",
    )

    @property
    def trains_bottom(self) -> bool:
        """Whether the bottom gets a gradient; without one it has no adapter either."""
        return self.kind != "none"

    @property
    def is_tried(self) -> bool:
        """Whether the bottom's gradient, which may be wrong, is tried before it is followed."""
        return self.check and self.kind in ("identity", "blocks", "distilled", "matched")

    @property
    def is_trained(self) -> bool:
        """Whether the surrogate itself is trained on the way."""
        return self.kind == "distilled" or (self.kind == "matched" and self.distill)

    @property
    def num_kept(self) -> int:
        """How many of the trunk's layers a node keeps as they are."""
        return self.layers if self.kind in ("blocks", "distilled") else 0


class Lora(_Section):
    """The adapters."""

    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="`lora`; `rslora`: scaled by alpha / sqrt(rank); `dora`: magnitudes are trained as well"
    )
    rank: Positive = Field(8, description="rank of the update")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="on the adapter's input")
    target_modules: str = Field(
        "all-linear", description="`all-linear`, or names of linear modules inside a layer, with commas between"
    )


class Data(_Section):
    """Private examples; never sent anywhere."""

    path: str = Field(
        "demo",
        description="`demo`; an absolute or `~` path: a file, folder or pattern of .jsonl, .json, .csv, .tsv or "
        ".parquet, or a folder of `save_to_disk`; or a dataset on the Hugging Face hub; a node's own `data-path` comes "
        "first",
    )
    subset: str = Field("", description="configuration of a dataset on the hub")
    split: str = Field("train", description="split of a dataset on the hub or of a `save_to_disk` folder")
    prompt: str = Field("question", description="column of the prompt")
    response: str = Field("answer", description="column of the response; the loss counts its tokens only")
    template: str = Field(
        "auto",
        description="how the two are written: `plain`: a line each; `chat`: by the tokenizer's chat template; a text "
        "with `{prompt}`, and `{response}` if something follows it; `auto`: `chat` if there is such a template, else "
        "`plain`",
    )
    text: str = Field("", description="column of plain text, instead of prompt and response")
    messages: str = Field(
        "", description="column of chats (role, content), instead: written by the tokenizer's chat template"
    )
    label: str = Field("label", description="column of the label, for `sequence-classification`")
    labels: str = Field("", description="names of all labels, with commas between: all nodes of a run have these")
    max_length: Annotated[int, Field(ge=2)] = Field(256, description="tokens per example; the rest is cut off")
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="part held out for evaluation, never trained on; a row's side depends on nothing but the row"
    )
    holdout_max: Positive = Field(500, description="examples of the held-out part that are evaluated, at most")
    samples: Annotated[int, Field(ge=0)] = Field(
        0,
        description="held-out prompts that a node answers after each round; the texts stay in its folder, exact match "
        "and ROUGE-L are metrics",
    )
    bad_rows: Literal["skip", "refuse"] = Field(
        "skip", description="rows that are empty, malformed or too long to learn from: leave out and count, or stop"
    )
    group_by_length: bool = Field(False, description="examples of similar length in the same batch: less padding")
    packing: bool = Field(
        False, description="examples of a batch end to end, without padding; refused where that is not exact"
    )

    partitioner: Partitioner = Field(
        "",
        description="how a simulation deals out `data.path`: empty: a file each, or equal parts of one file; "
        "`iid`: equal parts of all files; by a column's values: `column` (one each), `dirichlet`, `pathological`; by "
        "size: `linear`, `exponential`; all but `iid` need flwr-datasets",
    )
    partition_by: str = Field("", description="column that `column`, `dirichlet` and `pathological` go by")
    partition_alpha: Annotated[float, Field(gt=0)] = Field(
        0.5, description="of `dirichlet`: the smaller, the more a node has of few values"
    )
    partition_classes: Positive = Field(2, description="of `pathological`: values that a node has")

    @property
    def label_names(self) -> tuple[str, ...]:
        """`labels` one by one: a label's place is its class. Empty: the data is for a language model."""
        return tuple(name.strip() for name in self.labels.split(",")) if self.labels else ()


def _rate(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("expected a number of at least 0, or 'auto'")


Rate = Annotated[float | Literal["auto"], PlainValidator(_rate)]
_RATES = (1e-3, 2e-3)  # of bottom and top: SmolLM2-135M's held-out loss falls from 2.64 to 2.45
_DEMO_RATES = (8e-3, 1.6e-2)  # its model is tiny; these wreck a real one: from 2.64 to 6.16


class Train(_Section):
    """Local training."""

    steps: Positive = Field(30, description="optimizer steps per round")
    batch_size: Positive = Field(8, description="examples per micro-batch, one call to the trunk each")
    accumulation: Positive = Field(1, description="micro-batches per optimizer step")
    bottom_lr: Rate = Field(
        "auto", description="AdamW's rate for the bottom adapter; `auto`: 0.001, and 0.008 for the demo's tiny model"
    )
    top_lr: Rate = Field("auto", description="AdamW's rate for the top adapter; `auto`: 0.002, demo 0.016")
    scheduler: Literal["constant", "linear", "cosine"] = Field("linear", description="of the rates, over all rounds")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this L2 norm")
    activation_checkpointing: bool = Field(
        False, description="compute the activations of the node's layers again in backward: less memory, more time"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="the round whose adapter a node exports: of the lowest held-out loss, or the last"
    )
    seed: int = Field(0, description="of adapters, order of examples, held-out part and dropout")

    @property
    def rates(self) -> tuple[float, float]:
        """Of bottom and top, in numbers."""
        bottom, top = _RATES
        return (
            bottom if self.bottom_lr == "auto" else float(self.bottom_lr),
            top if self.top_lr == "auto" else float(self.top_lr),
        )


class TrunkService(_Section):
    """The trunk service."""

    address: str = Field(
        "embedded",
        description="`embedded`: started for the run; or host:port, several with commas; a node's own comes first",
    )
    share_address: str = Field(
        "",
        description="of `surrogate.kind = shares`: a second trunk, of another operator, as `trunk.address`; a node's "
        "own comes first",
    )
    wire_dtype: Literal["bfloat16", "float32", "int8"] = Field("bfloat16", description="of hidden states on the wire")
    in_flight: Positive = Field(
        4, description="calls under way while the node computes, of the micro-batches of one `train.accumulation`"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="seconds that one call may take, retries included"
    )
    cache_mb: Annotated[int, Field(ge=0)] = Field(
        1024, description="disk for trunk outputs on a node, MB, with `surrogate.kind = none`: one call per example"
    )
    exact_gradient: bool = Field(False, description="let the embedded trunk serve `surrogate.kind = exact`")


class Aggregation(_Section):
    """What nodes share, and how it is combined."""

    share: Share = Field("none", description="adapters combined over the nodes; the rest never leaves a node")
    share_head: bool = Field(
        False, description="share a classifier's head with the top; it shows how frequent each label is on a node"
    )
    tensors: Tensors = Field(
        "both",
        description="of the shared adapters: `both`; `a-only`: B stays private (FedSA-LoRA); `b-only`: A stays as it "
        "began on every node (FFA-LoRA)",
    )
    combine: Combine = Field(
        "mean",
        description="`mean` of A and B apart; `svd`, `stack`, `exact`: the mean of alpha/rank * B A, see docs",
    )
    strategy: StrategyName = Field("fedavg", description="Flower's strategy for the shared arrays")
    weighting: Literal["examples", "equal"] = Field("examples", description="a node's weight in the mean")
    server_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of `fedavgm` and `fedadam`; 0: 1 for fedavgm, 0.01 for fedadam, which moves each weight by it"
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="for `fedavgm`")
    proximal_mu: Annotated[float, Field(gt=0)] = Field(0.01, description="for `fedprox`")
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="for `fedtrimmedavg`: part cut off at each end"
    )
    malicious_nodes: Annotated[int, Field(ge=0)] = Field(
        0, description="for `krum`, `multikrum` and `bulyan`: nodes that may lie"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="part of the connected nodes that a round asks, at least `aggregation.min-nodes`"
    )
    min_nodes: Positive = Field(2, description="fewer nodes in a round, and the run stops with an error")


class Dp(_Section):
    """Differential privacy of what nodes share, towards whoever sees the combined adapters."""

    mode: Literal["off", "server-fixed", "server-adaptive", "client-fixed", "client-adaptive"] = Field(
        "off", description="who clips the nodes' updates, and whether the norm is fixed; the server adds the noise"
    )
    noise_multiplier: Annotated[float, Field(gt=0)] = Field(1.0, description="noise in units of the clipping norm")
    clipping_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="L2 norm of a node's update; adaptive: the first"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="at which epsilon is reported, with a fixed norm"
    )
    max_epsilon: Annotated[float, Field(ge=0)] = Field(
        0.0, description="stop before a round would exceed it, with a fixed norm; 0: no limit"
    )


class Run(_Section):
    """Where results go."""

    name: Name = Field("", description="folder of the run below `run.dir`; empty: date and time")
    dir: str = Field("~/fl-split/runs", description="an absolute or `~` path")
    resume: bool = Field(False, description="go on with the run of this name after its last finished round")
    node_wait_s: Annotated[float, Field(ge=0)] = Field(
        60.0, description="seconds to wait for `aggregation.min-nodes` nodes"
    )
    round_timeout: Annotated[float, Field(gt=0)] = Field(3600.0, description="seconds that a round may take")

    @property
    def root(self) -> Path:
        """`run.dir` as a path."""
        return absolute("run.dir", self.dir)


class Report(_Section):
    """Who else gets a run's metrics."""

    to: str = Field(
        "",
        description="trackers that the server sends each round's metrics to, with commas between: `tensorboard`, "
        "`trackio`, `mlflow`, `wandb`; empty: none",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """`to` one by one."""
        return tuple(name.strip() for name in self.to.split(",")) if self.to else ()


class RunConfig(_Section):
    """Everything a run can be told."""

    num_server_rounds: Positive = Field(3, description="rounds in all")
    task: Task = Field(
        "causal-lm",
        description="`causal-lm`, or `sequence-classification` of `data.text` into `data.labels`, with a head of the "
        "node's own",
    )
    model: Model = Model()
    split: Split = Split()
    surrogate: Surrogate = Surrogate()
    lora: Lora = Lora()
    data: Data = Data()
    train: Train = Train()
    trunk: TrunkService = TrunkService()
    aggregation: Aggregation = Aggregation()
    dp: Dp = Dp()
    run: Run = Run()
    report: Report = Report()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        absolute("run.dir", self.run.dir)
        if unknown := [name for name in self.report.names if name not in _TRACKERS]:
            raise ValueError(f"report.to={self.report.to!r}: {unknown[0]!r} is none of {', '.join(_TRACKERS)}")
        _check_task(self.task, self.data)
        _check_data(self.data)
        if self.run.resume and not self.run.name:
            raise ValueError("run.resume=true needs run.name: the name of the run to go on with")
        _check_aggregation(self.aggregation, self.dp)
        if self.lora.variant == "dora" and (self.aggregation.combine, self.aggregation.tensors) != ("mean", "both"):
            raise ValueError(
                "lora.variant='dora' needs aggregation.combine='mean' and aggregation.tensors='both', not "
                f"{self.aggregation.combine!r} and {self.aggregation.tensors!r}: its update is not alpha/rank * B A, "
                "and its magnitudes belong to A and B together"
            )
        if not self.surrogate.trains_bottom and self.aggregation.share in ("bottom", "both"):
            raise ValueError(
                f"aggregation.share={self.aggregation.share!r} shares a bottom adapter, but surrogate.kind='none' "
                "makes none: use aggregation.share='top', or another surrogate"
            )
        shares_head = self.task == "sequence-classification" and self.aggregation.share in ("top", "both")
        if self.aggregation.share_head and not shares_head:
            raise ValueError(
                "aggregation.share-head=true shares a classifier's head with the top: it needs "
                "task='sequence-classification' and aggregation.share='top' or 'both'"
            )
        if self.data.partitioner in ("column", "dirichlet", "pathological") and not self.data.partition_by:
            raise ValueError(
                f"data.partitioner={self.data.partitioner!r} goes by a column's values: name it in data.partition-by"
            )
        embedded = self.trunk.address == "embedded"
        if self.surrogate.file:
            absolute("surrogate.file", self.surrogate.file)
        if self.surrogate.kind == "matched" and embedded and not self.surrogate.file:
            raise ValueError(
                "surrogate.kind='matched' with the embedded trunk needs surrogate.file: make one with "
                "'fl-split surrogate fit'"
            )
        if self.surrogate.kind == "exact" and embedded and not self.trunk.exact_gradient:
            raise ValueError(
                "surrogate.kind='exact' makes gradients leave the nodes: for that, set trunk.exact-gradient=true too"
            )
        _check_shares(self.surrogate.kind == "shares", self.trunk, self.model)
        if not embedded and not self.trunk.address.rpartition(":")[2].isdigit():
            raise ValueError(f"trunk.address={self.trunk.address!r}: expected 'embedded' or host:port")
        return self

    def with_rates(self) -> "RunConfig":
        """The configuration with numbers for rates that are ``auto``: what suits the demo's model wrecks a real one."""
        rates = zip(("bottom_lr", "top_lr"), _DEMO_RATES if self.model.name == "demo" else _RATES, strict=True)
        chosen = {key: rate for key, rate in rates if getattr(self.train, key) == "auto"}
        return self.model_copy(update={"train": self.train.model_copy(update=chosen)})

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar]) -> "RunConfig":
        """Build from Flower's flat run config.

        Raises:
            ConfigError: Unknown keys, wrong types or values, impossible combinations: all of them, one a line.
        """
        nested: dict[str, Any] = {}
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError("wrong configuration:\n" + explain_invalid(error, _KEYS)) from None

    def to_flat(self) -> dict[str, Scalar]:
        """Inverse of `from_flat`: every key as the user writes it."""
        flat: dict[str, Scalar] = {}
        for key, value in self.model_dump(by_alias=True).items():
            flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return flat


def _check_aggregation(aggregation: Aggregation, dp: Dp) -> None:
    """Refuse what makes no sense together, before anything starts."""
    changed = aggregation.tensors != "both" or aggregation.combine != "mean" or aggregation.strategy != "fedavg"
    if aggregation.share == "none" and (changed or dp.mode != "off"):
        raise ValueError(
            "aggregation.share='none' shares nothing, but aggregation.tensors, .combine, .strategy or dp.mode say what "
            "to do with it: set aggregation.share, or leave these alone"
        )
    if aggregation.combine != "mean":
        for key, value, plain in (
            ("aggregation.tensors", aggregation.tensors, "both"),
            ("aggregation.strategy", aggregation.strategy, "fedavg"),
            ("dp.mode", dp.mode, "off"),
        ):
            if value != plain:
                raise ValueError(
                    f"aggregation.combine={aggregation.combine!r} needs {key}={plain!r}, not {value!r}: it works on "
                    "whole products B A, the others on single arrays"
                )
    if dp.mode != "off" and (aggregation.strategy != "fedavg" or aggregation.weighting != "equal"):
        raise ValueError(
            f"dp.mode={dp.mode!r} needs aggregation.strategy='fedavg' and aggregation.weighting='equal': with other "
            "weights one node's part in the mean, and so the noise that hides it, is unknown"
        )
    most = aggregation.min_nodes / 10  # Flower adds noise of min_nodes / 20 to the count of clipped updates as well
    if dp.mode.endswith("adaptive") and dp.noise_multiplier >= most:
        raise ValueError(
            f"dp.noise-multiplier={dp.noise_multiplier:g} is too much for dp.mode={dp.mode!r} with "
            f"aggregation.min-nodes={aggregation.min_nodes}: it must be below {most:g}; or use a fixed norm"
        )
    nodes, liars = aggregation.min_nodes, aggregation.malicious_nodes
    least = {"krum": 2 * liars + 3, "multikrum": 2 * liars + 3, "bulyan": 4 * liars + 3}.get(aggregation.strategy, 1)
    if nodes < least:
        raise ValueError(
            f"aggregation.strategy={aggregation.strategy!r} with aggregation.malicious-nodes={liars} needs "
            f"aggregation.min-nodes of at least {least}, not {nodes}"
        )
    if aggregation.strategy == "fedtrimmedavg" and int(aggregation.trim * nodes) < 1:
        raise ValueError(
            f"aggregation.trim={aggregation.trim:g} of aggregation.min-nodes={nodes} cuts off nobody: the plain mean; "
            "raise either, or use 'fedavg'"
        )


def _check_shares(wanted: bool, trunk: TrunkService, model: Model) -> None:
    embedded = trunk.address == "embedded"
    if not wanted and trunk.share_address:
        raise ValueError(
            f"trunk.share-address={trunk.share_address!r} is for surrogate.kind='shares': set that, or leave it empty"
        )
    if wanted and (not trunk.share_address or embedded != (trunk.share_address == "embedded")):
        raise ValueError(
            f"surrogate.kind='shares' needs two trunks of different operators: trunk.address={trunk.address!r} and "
            f"trunk.share-address={trunk.share_address!r}; expected host:port twice, or 'embedded' twice to try it out"
        )
    if wanted and embedded and model.dtype != "float32":
        raise ValueError(f"surrogate.kind='shares' needs trunks in float32: model.dtype={model.dtype!r}")
    if wanted and not embedded and not trunk.share_address.rpartition(":")[2].isdigit():
        raise ValueError(f"trunk.share-address={trunk.share_address!r}: expected host:port")


def _check_task(task: Task, data: Data) -> None:
    if task == "causal-lm":
        if data.labels:
            raise ValueError("data.labels is for task='sequence-classification': set that, or leave data.labels empty")
        return
    names = data.label_names
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ValueError(
            f"task='sequence-classification' needs data.labels, at least two different names with commas between: "
            f"data.labels={data.labels!r}"
        )
    if not data.text:
        raise ValueError("task='sequence-classification' needs data.text: the column of the text to be classified")


def _check_data(data: Data) -> None:
    if data.text and data.messages:
        raise ValueError(f"data.text={data.text!r} and data.messages={data.messages!r}: an example is one or the other")
    if data.template not in ("auto", "plain", "chat"):
        if data.template.count("{prompt}") != 1 or data.template.count("{response}") > 1:
            raise ValueError(
                f"data.template={data.template!r}: expected 'auto', 'plain', 'chat', or a text with {{prompt}} "
                "once, and {response} after it if something follows the response"
            )
        if "{prompt}" in data.template.partition("{response}")[2]:
            raise ValueError(f"data.template={data.template!r}: {{prompt}} must come before {{response}}")
    if data.template != "auto" and (data.text or data.messages):
        key = "data.text" if data.text else "data.messages"
        raise ValueError(f"data.template={data.template!r} is for data.prompt and data.response, and {key} is set")
    if data.samples and data.labels:
        raise ValueError("data.samples is for language models: with data.labels, set data.samples=0")
    if data.packing and data.labels:
        raise ValueError("data.packing=true is for language models: with data.labels, set data.packing=false")


def read_values(file: Path | None, overrides: list[str]) -> dict[str, Scalar]:
    """Flat keys and values as `flwr run -c` takes them: from a TOML file, then from ``key=value`` strings.

    They are merged key by key: `flwr run` itself keeps only the last ``-c`` of each table.

    Raises:
        ConfigError: There is no such file, or something cannot be parsed.
    """
    values = _read_file(file) if file else {}
    for given in overrides:
        values |= _read_file(Path(given)) if given.endswith(".toml") else _read_pairs(given)
    return values


def _read_file(file: Path) -> dict[str, Scalar]:
    try:
        return _flatten(tomllib.loads(file.expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as TOML ({type(error).__name__}): {_QUOTES}") from None


def _read_pairs(given: str) -> dict[str, Scalar]:
    pairs = _PAIR.findall(given)
    left = _PAIR.sub("", given).split()
    if left:
        raise ConfigError(f"wrong key=value: {left[0]!r} has no key or no value; {_QUOTES}")
    try:
        return _flatten(tomllib.loads("\n".join(f"{key} = {value}" for key, value in pairs)))
    except ValueError as error:
        raise ConfigError(f"wrong key=value ({type(error).__name__}): {_QUOTES}") from None


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            flat[f"{prefix}{key}"] = value
        else:
            raise ValueError(key)
    return flat


def check_given(given: Mapping[str, Scalar]) -> None:
    """Refuse what two ``-c`` of `flwr run` become, where that can be seen: the demo's model under another's keys.

    Args:
        given: What Flower has kept of the keys that a person gave.

    Raises:
        ConfigError: Keys of ``model`` without its name.
    """
    keys = [key for key in given if key.startswith("model.")]
    if keys and "model.name" not in given:
        raise ConfigError(
            f"{keys[0]} is given and model.name is not: of several -c with keys of one table, 'flwr run' keeps one and "
            "drops the others. Put all pairs into one -c '...'; for the demo's model, add model.name=\"demo\""
        )


class NodeConfig(BaseModel):
    """A node's own values (``flower-supernode --node-config``); other apps' keys are left alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", alias_generator=_kebab, populate_by_name=True)

    partition_id: int = 0
    num_partitions: int = 1
    data_path: str = ""
    out_dir: str = ""
    trunk_address: str = ""
    trunk_ca: str = ""
    trunk_cert: str = ""
    trunk_key: str = ""
    trunk_token_file: str = ""
    trunk_allow_plaintext: bool = False
    allow_exact_gradient: bool = False
    trunk_share_address: str = ""
    trunk_share_ca: str = ""
    trunk_share_cert: str = ""
    trunk_share_key: str = ""
    trunk_share_token_file: str = ""
    allow_gradient_shares: bool = False
    lora_rank: Annotated[int, Field(ge=0, alias="lora.rank")] = 0  # 0: the run's
    report_to: Annotated[Literal["", "tensorboard"], Field(alias="report.to")] = ""

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar]) -> "NodeConfig":
        """Build from Flower's node config.

        Raises:
            ConfigError: A value of the wrong type, a key that looks like a misspelt one, or no number of the node.
        """
        for key in values:
            near = get_close_matches(key, _NODE_KEYS, 1)
            if near and key != near[0]:
                raise ConfigError(f"wrong node-config: there is no key {key!r}; did you mean {near[0]!r}?")
        if "partition-id" not in values:  # a simulation sets it; its default would make all nodes of a deployment one
            raise ConfigError(
                "node-config lacks partition-id: give each SuperNode a number of its own, from 0, and always the same, "
                "such as --node-config 'partition-id=0 num-partitions=3'; metrics and seeds go by it"
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("wrong node-config:\n" + explain_invalid(error, _KEYS)) from None

    @property
    def speaks_for_itself(self) -> bool:
        """Whether an institution has said anything but numbers, which simulated nodes have as well."""
        said = self.model_fields_set & type(self).model_fields.keys()
        return bool(said - {"partition_id", "num_partitions", "lora_rank"})

    @property
    def unknown(self) -> dict[str, str]:
        """Keys that are not of fl-split, each with the nearest one that is."""
        return {key: get_close_matches(key, _NODE_KEYS, 1, 0.0)[0] for key in self.model_extra or ()}

    def lora(self, of_run: Lora) -> Lora:
        """The run's adapters with this node's own rank, if it has one."""
        return of_run.model_copy(update={"rank": self.lora_rank}) if self.lora_rank else of_run

    def folder(self, config: RunConfig, run_name: str) -> Path:
        """Where this node keeps what it trains."""
        if self.out_dir:
            return absolute("out-dir", self.out_dir) / run_name
        return config.run.root / run_name / "nodes" / str(self.partition_id)


def is_local_model(name: str) -> bool:
    """Whether a model's name stands for a folder of this machine: the demo's, or an absolute or ``~`` path."""
    return name == "demo" or name.startswith(("/", "~"))


_NODE_KEYS = [field.alias or _kebab(name) for name, field in NodeConfig.model_fields.items()]


def absolute(key: str, path: str) -> Path:
    """An absolute path from an absolute or ``~`` one.

    Raises:
        ConfigError: It is relative: Flower runs apps in folders of its own, so it would mean something else there.
    """
    expanded = Path(path).expanduser()
    if not expanded.is_absolute():
        raise ConfigError(
            f"{key}={path!r} is relative, and Flower runs apps in folders of its own: write it from / or ~"
        )
    return expanded
