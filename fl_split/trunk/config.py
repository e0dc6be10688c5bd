"""A trunk server's configuration: a TOML file, flags over it, checked once at the edge.

Defaults live here; a test holds `configs/trunk.toml` and docs/trunk.md equal to them.
"""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_split.address import is_loopback
from fl_split.config.sections import Positive, kebab
from fl_split.errors import ConfigError, explain_invalid

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Quantization = Literal["", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=kebab, populate_by_name=True)


class TrunkModel(_Section):
    """What is served, and on which hardware."""

    name: str = Field("demo", description="`demo`, a path of a model folder, or a Hugging Face id")
    revision: str = Field("", description="branch, tag or commit of a Hugging Face id; empty: the default branch")
    bottom_layers: Positive = Field(2, description="layers that nodes hold before the trunk")
    top_layers: Positive = Field(2, description="layers that nodes hold after the trunk")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights and the computation")
    device_map: str = Field(
        "", description="`auto`, `cpu`, `cuda:1`, ...: transformers' device map; empty: a GPU if any"
    )
    tensor_parallel: bool = Field(False, description="one trunk over all processes that torchrun started")
    quantization: Quantization = Field("", description="of the weights, by transformers; needs the named package")
    compile: bool = Field(False, description="`torch.compile` the layers: slow to start, faster after")
    surrogate: str = Field("", description="file that `fl-split surrogate fit` wrote, published to nodes")
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="CPU threads to compute with; 0: all this process may use"
    )


class Server(_Section):
    """Where callers reach it."""

    host: str = Field("127.0.0.1", description="address to listen on; `0.0.0.0` for every network of the machine")
    port: Port = Field(9470, description="0 takes a free one")
    exact_gradient: bool = Field(
        False, description="also serve exact gradients: nodes that ask for them send dL/dh2, which breaks the promise"
    )
    gradient_shares: bool = Field(
        False,
        description="also serve shares of gradients: each says nothing as long as this operator and that of the other "
        "trunk do not collude",
    )
    drain_s: Seconds = Field(30.0, description="seconds that calls get to finish after SIGTERM")


class Batching(_Section):
    """How calls of different callers share a forward pass."""

    enabled: bool = Field(True, description="false: one forward pass per call")
    max_batch_tokens: Positive = Field(4096, description="tokens in one forward pass; one larger call runs alone")
    max_wait_ms: Annotated[float, Field(ge=0)] = Field(
        2.0, description="longest wait for other active callers; a lone caller never waits"
    )


class Limits(_Section):
    """What callers may ask for; together they bound the server's memory."""

    max_tokens: Positive = Field(8192, description="tokens in one call")
    max_sequence_length: Annotated[int, Field(ge=0)] = Field(0, description="tokens in one sequence; 0: the model's")
    queue_tokens: Positive = Field(65_536, description="tokens waiting, of all callers; beyond it calls are refused")
    queue_s: Annotated[float, Field(gt=0)] = Field(
        5.0, description="seconds of work waiting, at most: what waits longer than its caller does is wasted"
    )
    calls: Positive = Field(512, description="calls at the same time, of all callers")
    calls_per_caller: Positive = Field(64, description="calls at the same time, of one caller")
    reading: Positive = Field(16, description="requests being received at the same time; the rest wait unread")
    reading_per_caller: Positive = Field(8, description="the same, of one caller")
    unread_mb: Positive = Field(
        256, description="MB of replies that one caller has yet to take; more calls are refused"
    )
    receive_timeout_s: Seconds = Field(30.0, description="seconds that sending one request may take")
    connections: Positive = Field(1024, description="open connections")
    idle_s: Seconds = Field(300.0, description="seconds after which a connection without calls is closed")
    cache_mb: Annotated[int, Field(ge=0)] = Field(
        1024, description="MB of keys and values of all generation streams; 0: generation is not offered"
    )
    stream_idle_s: Seconds = Field(300.0, description="seconds after which a generation stream without steps is closed")


class Security(_Section):
    """Who may call, and who may listen in."""

    cert: str = Field("", description="PEM file of the server's certificate chain; read anew when it changes")
    key: str = Field("", description="PEM file of its private key")
    client_ca: str = Field("", description="PEM file of the CA that callers' certificates must come from (mTLS)")
    tokens: str = Field("", description="file of bearer tokens' hashes, made by `fl-split trunk token add`")
    allow_plaintext: bool = Field(False, description="serve without TLS beyond loopback: hidden states can be read")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.cert) != bool(self.key):
            raise ValueError("cert and key belong together: set both, or neither")
        if self.client_ca and not self.cert:
            raise ValueError("client-ca needs TLS: set cert and key as well")
        return self


class Metrics(_Section):
    """Prometheus."""

    enabled: bool = Field(True, description="serve metrics over HTTP")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(9471, description="0 takes a free one")


class Log(_Section):
    """One line per call and per event on standard error; never a value of a tensor."""

    format: Literal["json", "text"] = Field("json", description="`json`: an object a line; `text`: for people")
    level: Literal["debug", "info", "warning"] = Field(
        "info", description="`info` logs each call, `warning` only trouble"
    )


class TrunkConfig(_Section):
    """Everything that a trunk server can be told."""

    model: TrunkModel = TrunkModel()
    server: Server = Server()
    batching: Batching = Batching()
    limits: Limits = Limits()
    security: Security = Security()
    metrics: Metrics = Metrics()
    log: Log = Log()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.model.tensor_parallel and self.server.exact_gradient:
            raise ValueError("model.tensor-parallel and server.exact-gradient do not work together: set one of them")
        if self.server.gradient_shares and (
            self.model.dtype != "float32" or self.model.quantization or self.model.tensor_parallel
        ):
            raise ValueError(
                "server.gradient-shares=true needs model.dtype='float32', no model.quantization and no "
                "model.tensor-parallel: two trunks' answers are large and nearly cancel, so only rounding would be left"
            )
        if self.limits.queue_tokens < self.limits.max_tokens:
            raise ValueError(
                f"limits.queue-tokens={self.limits.queue_tokens} is less than limits.max-tokens="
                f"{self.limits.max_tokens}: such a call could never be queued; raise the one or lower the other"
            )
        if not (self.security.cert or self.security.allow_plaintext or is_loopback(self.server.host)):
            raise ValueError(
                f"server.host={self.server.host!r} is beyond loopback, and without TLS anybody on the way can read "
                "hidden states and tokens: set security.cert and security.key, or security.allow-plaintext=true"
            )
        return self

    @classmethod
    def load(cls, file: Path | None, overrides: Iterable[str] = ()) -> Self:
        """Read a configuration.

        Args:
            file: TOML; None for the defaults.
            overrides: ``section.key=value`` each, the value in TOML; a bare word counts as a string.

        Raises:
            ConfigError: The file cannot be read, or a key or value is wrong; names it as the user wrote it.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = tomllib.loads(file.read_text())
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise ConfigError(f"--config {file} cannot be read as TOML: {error}") from error
        for override in overrides:
            _override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(
                "wrong trunk configuration:\n" + explain_invalid(error, "docs/trunk.md", _keys())
            ) from None


def _keys() -> list[str]:
    sections = TrunkConfig().model_dump(by_alias=True)
    return [f"{section}.{key}" for section, keys in sections.items() for key in keys]


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not separator or not dot:
        raise ConfigError(f"--set {override!r}: expected section.key=value, such as batching.max-wait-ms=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    keys = values.setdefault(section, {})
    if not isinstance(keys, dict):
        raise ConfigError(f"{section}={keys!r} in the file: expected a section [{section}], for --set {override!r}")
    keys[name] = value
