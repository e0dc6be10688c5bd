"""A node's own configuration, which its institution gives its SuperNode."""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_split.config.run import RunConfig
from fl_split.config.sections import Lora, absolute, kebab
from fl_split.config.values import KEYS, Scalar
from fl_split.errors import ConfigError, explain_invalid


class NodeConfig(BaseModel):
    """A node's own values (``flower-supernode --node-config``); other apps' keys are left alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", alias_generator=kebab, populate_by_name=True)

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
    trunk_operator_key: str = ""
    trunk_verifier: str = ""
    allow_exact_gradient: bool = False
    trunk_share_address: str = ""
    trunk_share_ca: str = ""
    trunk_share_cert: str = ""
    trunk_share_key: str = ""
    trunk_share_token_file: str = ""
    trunk_share_operator_key: str = ""
    trunk_share_verifier: str = ""
    allow_gradient_shares: bool = False
    secure_key: str = ""
    secure_peers: str = ""
    lora_rank: Annotated[int, Field(ge=0, alias="lora.rank")] = 0  # 0: the run's
    record_noise_multiplier: Annotated[float, Field(ge=0, alias="dp.record-noise-multiplier")] = 0.0  # 0: the run's
    record_clip: Annotated[float, Field(ge=0, alias="dp.record-clip")] = 0.0
    record_delta: Annotated[float, Field(ge=0, lt=1, alias="dp.record-delta")] = 0.0
    record_max_epsilon: Annotated[float, Field(ge=0, alias="dp.record-max-epsilon")] = 0.0
    redact_rules: str = ""
    metrics_allow: str = ""
    metrics_least: Annotated[int, Field(ge=0)] = 0
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
            raise ConfigError("wrong node-config:\n" + explain_invalid(error, KEYS)) from None

    @property
    def is_deployed(self) -> bool:
        """Whether a node is an institution's, so that there is somebody to ask; a simulation has nobody.

        Either the institution has said something but numbers, which simulated nodes have as well, or this is the
        process that a SuperNode runs messages in, which a simulation has none of.
        """
        said = self.model_fields_set & type(self).model_fields.keys()
        return (
            bool(said - {"partition_id", "num_partitions", "lora_rank"}) or Path(sys.argv[0]).name == "flwr-clientapp"
        )

    @property
    def unknown(self) -> dict[str, str]:
        """Keys that are not of fl-split, each with the nearest one that is."""
        return {key: get_close_matches(key, _NODE_KEYS, 1, 0.0)[0] for key in self.model_extra or ()}

    @property
    def allowed_metrics(self) -> tuple[str, ...]:
        """Names and patterns of metrics that may leave the node; empty: all."""
        return tuple(name.strip() for name in self.metrics_allow.split(",")) if self.metrics_allow else ()

    def lora(self, of_run: Lora) -> Lora:
        """The run's adapters with this node's own rank, if it has one."""
        return of_run.model_copy(update={"rank": self.lora_rank}) if self.lora_rank else of_run

    def with_record_dp(self, of_run: RunConfig) -> RunConfig:
        """The run's configuration with this node's own `dp.record-*`, if it has any.

        Raises:
            ConfigError: The run does something that does not go with it.
        """
        names = ("record_noise_multiplier", "record_clip", "record_delta", "record_max_epsilon")
        own = {f"dp.{kebab(name)}": value for name in names if (value := getattr(self, name))}
        if not own:
            return of_run
        personal = of_run.is_personal  # settled by the run, not by this: Flower wants the same metrics of all nodes
        return RunConfig.from_flat({**of_run.to_flat(), "aggregation.personal": personal, **own})

    def folder(self, config: RunConfig, run_name: str) -> Path:
        """Where this node keeps what it trains."""
        if self.out_dir:
            return absolute("out-dir", self.out_dir) / run_name
        return config.run.root / run_name / "nodes" / str(self.partition_id)


_NODE_KEYS = [field.alias or kebab(name) for name, field in NodeConfig.model_fields.items()]
