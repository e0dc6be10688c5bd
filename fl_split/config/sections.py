"""The sections of a run's configuration: every key with its type, default and meaning.

A test holds `pyproject.toml` and `docs/configuration.md` equal to them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from fl_split.config.values import num_bytes
from fl_split.errors import ConfigError

if TYPE_CHECKING:
    import torch

Positive = Annotated[int, Field(ge=1)]
Share = Literal["none", "bottom", "top", "both"]
Tensors = Literal["both", "a-only", "b-only"]
StrategyName = Literal[
    "fedavg", "fedavgm", "fedadam", "fedprox", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"
]
Kind = Literal["none", "identity", "blocks", "distilled", "matched", "streamed", "shares", "exact"]
KindOrAuto = Literal["auto", Kind]
AUTO = (  # what each node does with `surrogate.kind = auto`; see `node.choice`
    "`shares` where the run names a second trunk and the institution allows it; else `streamed` where the whole "
    "checkpoint is on the node's disk and a round takes at most half of `run.round-timeout`; else `blocks` where "
    "memory allows, if a trial shows that they help; else `none`"
)
Combine = Literal["mean", "svd", "stack", "exact"]
Task = Literal["causal-lm", "sequence-classification"]
Partitioner = Literal["", "iid", "column", "dirichlet", "pathological", "linear", "exponential"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$")]


def kebab(name: str) -> str:
    """A field's name as users write it."""
    return name.replace("_", "-")


class Section(BaseModel):
    """What all sections have in common: frozen, strict, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=kebab, populate_by_name=True)


class Model(Section):
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


def _size(value: str) -> str:
    if value:
        num_bytes(value)
    return value


Size = Annotated[str, AfterValidator(_size)]


class Split(Section):
    """Where the model is cut."""

    bottom_layers: Positive = Field(2, description="layers on the node before the trunk")
    top_layers: Positive = Field(2, description="layers on the node after the trunk")
    client_memory: Size = Field(
        "", description="such as `4GB`: take the deepest split that a node of this memory can train, instead of the two"
    )


class Surrogate(Section):
    """What gives the bottom its gradient."""

    kind: KindOrAuto = Field(
        "auto",
        description=f"`auto`: {AUTO}; `blocks`: the trunk's first layers; `distilled`: those, trained on the way; "
        "`matched`: published by the trunk; `streamed`: all trunk layers, read from disk one at a time; `identity`; "
        "`none`: the bottom stays frozen; `shares`: dL/dh2 leaves the node as two shares, for two trunks; `exact`: "
        "dL/dh2 leaves the node",
    )
    layers: Positive = Field(2, description="trunk layers kept on the node, for `blocks` and `distilled`")
    max_bytes: Size = Field(
        "",
        description="such as `2GB`: of `auto`, nothing for which a node would send and get more than this while it "
        "trains a round; the bottom is frozen if need be, or where it is shared, the run refused",
    )
    check: bool = Field(
        True,
        description="try the bottom's gradient on examples kept apart for it, and train the bottom only once it lowers "
        "the loss there for sure, and until it no longer does; not for kinds with an exact gradient",
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
    def planned(self) -> Kind:
        """The kind; of `auto`, the one that needs the most memory."""
        return "blocks" if self.kind == "auto" else self.kind

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
        return self.layers if self.planned in ("blocks", "distilled") else 0


class Lora(Section):
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


class Data(Section):
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
    redact: str = Field(
        "",
        description="what each node replaces by pseudonyms before anything is made of its text, with commas between: "
        "`email`, `url`, `date`, `phone`, `number`; a node may add rules of its own (`redact-rules`); noise in its "
        "place would not help: a node cannot be protected from the trunk's operator by noise",
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
    def redacted(self) -> tuple[str, ...]:
        """`redact` one by one."""
        return tuple(kind.strip() for kind in self.redact.split(",")) if self.redact else ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """`labels` one by one: a label's place is its class. Empty: the data is for a language model."""
        return tuple(name.strip() for name in self.labels.split(",")) if self.labels else ()


def _rate(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("expected a number of at least 0, or 'auto'")


Rate = Annotated[float | Literal["auto"], PlainValidator(_rate)]
CAREFUL_RATE = 2e-3  # of the top, where nothing is tested: SmolLM2-135M's held-out loss falls from 2.64 to 2.45
DEMO_RATE = 1.6e-2  # its model is tiny; with this on both ends a real one was wrecked: from 2.64 to 6.16


class Train(Section):
    """Local training."""

    steps: Positive = Field(30, description="optimizer steps per round")
    batch_size: Positive = Field(8, description="examples per micro-batch, one call to the trunk each")
    accumulation: Positive = Field(1, description="micro-batches per optimizer step")
    bottom_lr: Rate = Field("auto", description="AdamW's rate for the bottom adapter; `auto`: half of `train.top-lr`")
    top_lr: Rate = Field(
        "auto",
        description="AdamW's rate for the top adapter; `auto`: found by each node with a short test before its first "
        "round; 0.002 in runs of fewer than 30 steps in all, with few examples, and with `dp.record-*`; demo 0.016",
    )
    scheduler: Literal["constant", "linear", "cosine"] = Field("linear", description="of the rates, over all rounds")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this L2 norm")
    activation_checkpointing: bool = Field(
        False, description="compute the activations of the node's layers again in backward: less memory, more time"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="the round whose adapter a node exports: of the lowest held-out loss, or the last"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="of adapters, order of examples, held-out part and dropout"
    )

    @property
    def rates(self) -> tuple[float, float]:
        """Of bottom and top, in numbers; the top's is the careful one where it is still `auto`."""
        top = CAREFUL_RATE if self.top_lr == "auto" else float(self.top_lr)
        return top / 2 if self.bottom_lr == "auto" else float(self.bottom_lr), top


class TrunkService(Section):
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
        1024,
        description="disk for trunk outputs on a node, MB, with `surrogate.kind = none`: one call per example; and "
        "while rates are tested",
    )
    exact_gradient: bool = Field(False, description="let the embedded trunk serve `surrogate.kind = exact`")


def _switch(value: object) -> object:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("expected true, false, or 'auto'")


class Aggregation(Section):
    """What nodes share, and how it is combined."""

    share: Share = Field("none", description="adapters combined over the nodes; the rest never leaves a node")
    share_head: bool = Field(
        False, description="share a classifier's head with the top; it shows how frequent each label is on a node"
    )
    personal: Annotated[bool | Literal["auto"], PlainValidator(_switch)] = Field(
        "auto",
        description="each node's adapter trains as if nothing were shared, and a second one, which is, beside it; its "
        "model is a mixture of both, as far as that is better on the node's own examples; `auto`: true where something "
        "is shared and that goes together with it, see docs",
    )
    secure: bool = Field(
        False,
        description="nodes mask what they share, so that the server learns their mean and no node's part; every node "
        "named in the nodes' `secure-peers` takes part in every round",
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


UNCOVERED = "it does not cover hidden states, which the trunk's operator can read"  # stands beside every epsilon


class Dp(Section):
    """Differential privacy: of a node's part in combined adapters (`mode`), of one example in a node's (`record`)."""

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

    record_noise_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="bound what an adapter tells of one training example: noise that each node adds to each step's "
        "clipped gradients, in units of `dp.record-clip`; 0: none; hidden states are not covered",
    )
    record_clip: Annotated[float, Field(gt=0)] = Field(1.0, description="L2 norm of one example's gradient")
    record_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="at which a node reports epsilon for one example; below 1 / its examples to train on"
    )
    record_max_epsilon: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a node trains no step that would exceed it; 0: no limit"
    )

    @property
    def is_record(self) -> bool:
        """Whether single examples are protected."""
        return self.record_noise_multiplier > 0


class Run(Section):
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


class Report(Section):
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


def is_local_model(name: str) -> bool:
    """Whether a model's name stands for a folder of this machine: the demo's, or an absolute or ``~`` path."""
    return name == "demo" or name.startswith(("/", "~"))


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
