"""A run's configuration, checked once at the edge; below it, plain arguments travel.

Flower hands an app flat scalars (``train.batch-size = 8``) and does not check their types. `RunConfig` does, and
names a wrong key as the user wrote it.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from fl_split.config.sections import (
    DEMO_RATE,
    Aggregation,
    Data,
    Dp,
    Kind,
    Lora,
    Model,
    Positive,
    Report,
    Run,
    Section,
    Split,
    Surrogate,
    Task,
    Train,
    TrunkService,
    absolute,
)
from fl_split.config.values import KEYS, Scalar
from fl_split.errors import ConfigError, explain_invalid

_TRACKERS = ("tensorboard", "trackio", "mlflow", "wandb")

_LEAST_NOISE = 0.3  # of `dp.record-*`: 90 steps, each with a tenth of the examples, come to epsilon 100
_REDACTED = ("email", "url", "date", "phone", "number")


class RunConfig(Section):
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
        if self.aggregation.secure:
            _check_secure(self.aggregation, self.dp)
        if self.aggregation.personal is True and (reason := self.why_not_personal):
            raise ValueError(f"aggregation.personal=true does not go with {reason}")
        if self.dp.is_record:
            _check_record(self)
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
        _check_shares(self.has_shares, self.surrogate.kind, self.trunk, self.model)
        if not embedded and not self.trunk.address.rpartition(":")[2].isdigit():
            raise ValueError(f"trunk.address={self.trunk.address!r}: expected 'embedded' or host:port")
        return self

    @property
    def has_shares(self) -> bool:
        """Whether nodes may send gradients in shares, to a second trunk."""
        return self.surrogate.kind == "shares" or (self.surrogate.kind == "auto" and self.trunk.share_address != "")

    @property
    def is_personal(self) -> bool:
        """Whether a node trains an adapter of its own beside the one that is shared."""
        return self.aggregation.personal is not False and not self.why_not_personal

    @property
    def num_trainings(self) -> int:
        """How often a node trains a round's steps."""
        return 2 if self.is_personal else 1

    @property
    def why_not_personal(self) -> str:
        """What `aggregation.personal` cannot keep its promise with: a node's own adapter is nobody's but its own."""
        how, mode = self.aggregation, self.dp.mode
        reasons = {
            "aggregation.share='none'": how.share == "none" and "there is nothing to add to a node's own adapter",
            f"aggregation.tensors={how.tensors!r}": how.tensors != "both"
            and "half of a product B A can be neither frozen nor weighed",
            "aggregation.share-head=true": how.share_head and "a head is no product B A",
            "lora.variant='dora'": self.lora.variant == "dora" and "its update is no product B A",
            "dp.record-noise-multiplier": self.dp.is_record
            and "private examples decide how much of the others' adapters is taken",
            f"aggregation.min-nodes={how.min_nodes}": how.min_nodes < 3
            and mode == "off"
            and "the mean of two adapters shows each node the other's: set 3 or more, or dp.mode",
        }
        return next((f"{given}: {reason}" for given, reason in reasons.items() if reason), "")

    def with_kind(self, kind: Kind, layers: int | None = None) -> "RunConfig":
        """The configuration of a node that has settled what gives its bottom a gradient."""
        changes = {"kind": kind, "layers": layers or self.surrogate.layers}
        return self.model_copy(update={"surrogate": self.surrogate.model_copy(update=changes)})

    def with_rates(self) -> "RunConfig":
        """The configuration with the demo's rates where it is the demo; else each node settles what is ``auto``."""
        return self.with_rate(DEMO_RATE) if self.model.name == "demo" and self.train.top_lr == "auto" else self

    def with_rate(self, top_lr: float) -> "RunConfig":
        """The configuration of a node that has settled its rates: the bottom's goes with it where that is ``auto``."""
        return self.model_copy(update={"train": self.train.model_copy(update={"top_lr": top_lr})})

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
            raise ConfigError("wrong configuration:\n" + explain_invalid(error, KEYS, cls().to_flat())) from None

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


def _check_secure(aggregation: Aggregation, dp: Dp) -> None:
    """Refuse what needs a single node's part, which masks hide, or a sum without some of the nodes."""
    strategy, combine = aggregation.strategy, aggregation.combine
    robust = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
    reasons = {
        "aggregation.share='none'": aggregation.share == "none" and "nothing is shared",
        f"aggregation.combine={combine!r}": combine != "mean" and "it needs each node's product B A, and masks hide it",
        f"aggregation.strategy={strategy!r}": strategy in robust and "it compares single nodes, and masks hide them",
        f"dp.mode={dp.mode!r}": dp.mode.startswith("server")
        and "the server cannot clip what it does not see: use 'client-fixed' or 'client-adaptive'",
        f"aggregation.fraction={aggregation.fraction:g}": aggregation.fraction < 1
        and "the difference of two rounds' sums would be single nodes' parts",
    }
    for given, reason in reasons.items():
        if reason:
            raise ValueError(f"aggregation.secure=true does not go with {given}: {reason}")


def _check_record(config: RunConfig) -> None:
    """Refuse what looks at private examples outside the account of `dp.record-*`, or mixes them."""
    kind, noise = config.surrogate.kind, config.dp.record_noise_multiplier
    if noise < _LEAST_NOISE:
        raise ValueError(
            f"dp.record-noise-multiplier={noise:g} is too little for an epsilon that says anything: set "
            f"{_LEAST_NOISE:g} or more, or 0 for none"
        )
    outside = {
        "auto": "it times a step on private examples: name a kind",
        "distilled": "what the surrogate learns from private text reaches the adapter without noise",
        "shares": "a batch's gradient leaves the node without noise",
        "exact": "a batch's gradient leaves the node without noise",
    }
    reasons = {
        f"surrogate.kind={kind!r}": outside.get(kind),
        "surrogate.distill=true": config.surrogate.distill and kind == "matched" and outside["distilled"],
        "surrogate.check=true": config.surrogate.is_tried
        and "a trial on private examples decides whether the bottom trains; set it to false",
        "train.keep='best'": config.train.keep == "best"
        and "private examples decide which adapter is exported; set 'last'",
        "data.packing=true": config.data.packing and "each example's gradient is clipped by itself",
        "data.group-by-length=true": config.data.group_by_length
        and "each example is drawn by itself, which epsilon counts on",
    }
    for given, reason in reasons.items():
        if reason:
            raise ValueError(f"dp.record-noise-multiplier does not go with {given}: {reason}")


def _check_shares(wanted: bool, kind: str, trunk: TrunkService, model: Model) -> None:
    embedded = trunk.address == "embedded"
    if not wanted and trunk.share_address:
        raise ValueError(
            f"trunk.share-address={trunk.share_address!r} is for surrogate.kind='shares' or 'auto', not "
            f"{kind!r}: set one of them, or leave it empty"
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
    if unknown := [kind for kind in data.redacted if kind not in _REDACTED]:
        raise ValueError(f"data.redact={data.redact!r}: {unknown[0]!r} is none of {', '.join(_REDACTED)}")
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
