"""A run's configuration, checked once at the edge; below it, plain arguments travel.

Flower hands an app flat scalars (``train.batch-size = 8``) and does not check their types. `RunConfig` does, and
names a wrong key as the user wrote it. Defaults live here; a test holds `pyproject.toml` and the docs equal to them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_split.errors import ConfigError
from fl_split.surrogate import Kind

Scalar = str | int | float | bool
Positive = Annotated[int, Field(ge=1)]
Share = Literal["none", "bottom", "top", "both"]
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


class Split(_Section):
    """Where the model is cut."""

    bottom_layers: Positive = Field(2, description="layers on the node before the trunk")
    top_layers: Positive = Field(2, description="layers on the node after the trunk")


class Surrogate(_Section):
    """What gives the bottom its gradient."""

    kind: Kind = Field(
        "blocks",
        description="`blocks`: kept trunk layers; `distilled`: those, trained on the way; `matched`: published by the "
        "trunk; `identity`; `none`: the bottom stays frozen; `exact`: dL/dh2 leaves the node",
    )
    layers: Positive = Field(2, description="trunk layers kept on the node, for `blocks` and `distilled`")
    file: str = Field("", description="made by `fl-split surrogate fit`, for the embedded trunk to publish")
    distill: bool = Field(False, description="train a `matched` surrogate on the node as well")
    distill_lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="AdamW's rate for the surrogate itself")


class Lora(_Section):
    """The adapters."""

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
        description="`demo`, or an absolute or `~` path: a file, folder or pattern of .jsonl, .csv or .parquet; "
        "a node's own `data-path` comes first",
    )
    prompt: str = Field("question", description="column of the prompt")
    response: str = Field("answer", description="column of the response; the loss counts its tokens only")
    text: str = Field("", description="column of plain text, instead of prompt and response")
    max_length: Annotated[int, Field(ge=2)] = Field(256, description="tokens per example; the rest is cut off")
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="part held out for evaluation, never trained on"
    )


class Train(_Section):
    """Local training."""

    steps: Positive = Field(30, description="optimizer steps per round")
    batch_size: Positive = Field(8, description="examples per micro-batch, one call to the trunk each")
    accumulation: Positive = Field(1, description="micro-batches per optimizer step")
    bottom_lr: Annotated[float, Field(ge=0)] = Field(5e-3, description="AdamW's rate for the bottom adapter")
    top_lr: Annotated[float, Field(ge=0)] = Field(5e-3, description="AdamW's rate for the top adapter")
    scheduler: Literal["constant", "linear", "cosine"] = Field("constant", description="of the rates, over all rounds")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this L2 norm")
    seed: int = Field(0, description="of adapters, order of examples, held-out part and dropout")


class TrunkService(_Section):
    """The trunk service."""

    address: str = Field(
        "embedded",
        description="`embedded`: started for the run; or host:port, several with commas; a node's own comes first",
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

    share: Share = Field("none", description="adapters averaged over the nodes; the rest never leaves a node")
    min_nodes: Positive = Field(2, description="fewer nodes in a round, and the run stops with an error")


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


class RunConfig(_Section):
    """Everything a run can be told."""

    num_server_rounds: Positive = Field(3, description="rounds in all")
    model: Model = Model()
    split: Split = Split()
    surrogate: Surrogate = Surrogate()
    lora: Lora = Lora()
    data: Data = Data()
    train: Train = Train()
    trunk: TrunkService = TrunkService()
    aggregation: Aggregation = Aggregation()
    run: Run = Run()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        absolute("run.dir", self.run.dir)
        if self.run.resume and not self.run.name:
            raise ValueError("run.resume=true needs run.name: the name of the run to go on with")
        if self.surrogate.kind == "none" and self.aggregation.share in ("bottom", "both"):
            raise ValueError(
                f"aggregation.share={self.aggregation.share!r} shares a bottom adapter, but surrogate.kind='none' "
                "makes none: use aggregation.share='top', or another surrogate"
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
        if not embedded and not self.trunk.address.rpartition(":")[2].isdigit():
            raise ValueError(f"trunk.address={self.trunk.address!r}: expected 'embedded' or host:port")
        return self

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
            raise ConfigError("wrong configuration:\n" + "\n".join(_explain(e) for e in error.errors())) from None

    def to_flat(self) -> dict[str, Scalar]:
        """Inverse of `from_flat`: every key as the user writes it."""
        flat: dict[str, Scalar] = {}
        for key, value in self.model_dump(by_alias=True).items():
            flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return flat


class NodeConfig(BaseModel):
    """A node's own values (``flower-supernode --node-config``); other apps' keys are left alone."""

    model_config = ConfigDict(frozen=True, strict=True, alias_generator=_kebab, populate_by_name=True)

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

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar]) -> "NodeConfig":
        """Build from Flower's node config.

        Raises:
            ConfigError: A value of the wrong type.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("wrong node-config:\n" + "\n".join(_explain(e) for e in error.errors())) from None

    def folder(self, config: RunConfig, run_name: str) -> Path:
        """Where this node keeps what it trains."""
        if self.out_dir:
            return absolute("out-dir", self.out_dir) / run_name
        return config.run.root / run_name / "nodes" / str(self.partition_id)


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


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {key}: no such key; see the table of keys in docs/configuration.md"
    text = error["msg"].removeprefix("Value error, ")
    return f"  {key}={error['input']!r}: {text[0].lower()}{text[1:]}" if key else f"  {text}"
