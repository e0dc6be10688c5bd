"""The replicas of a trunk, as a node sees them: one channel each, taken in turns, left alone for a while after trouble.

`trunk.address` is one or several ``host:port`` with commas between; one DNS name may stand for many addresses.
"""

import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fl_split.address import is_local, split_address
from fl_split.errors import ConfigError
from fl_split.node.ledger import Note, NotingChannel
from fl_split.node.trouble import unavailable
from fl_split.proto import trunk_pb2 as pb
from fl_split.proto.trunk_pb2_grpc import ExactGradientStub, GradientSharesStub, TrunkStub

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # replies are checked against their requests
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),  # a restarted trunk is found within seconds, not minutes
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
    ("grpc.keepalive_time_ms", 20_000),  # a trunk that is gone without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),  # `Calls` makes them again, and knows of other replicas
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Credentials:
    """How a node proves who it is, and whom it trusts.

    Beyond loopback the connection is TLS unless `allow_plaintext` says otherwise; paths are of PEM files.
    """

    ca: str = ""  # of the CA that the trunk's certificate must come from; empty: those the system trusts
    cert: str = ""  # the node's certificate, for mTLS
    key: str = ""  # and its private key
    token_file: str = ""  # a file that holds the bearer token
    allow_plaintext: bool = False
    operator_key: str = ""  # of whoever signs a statement about the trunk; empty: none is asked for
    verifier: str = ""  # command that judges evidence of the trunk's machine; empty: none is asked for

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries.

        Raises:
            ConfigError: The token file cannot be read.
        """
        token = _read("trunk-token-file", self.token_file).decode(errors="replace").strip() if self.token_file else ""
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError(
                "trunk-token-file does not hold a token: expected one line as 'trunk token add' printed it"
            )
        return (("authorization", f"Bearer {token}"),) if token else ()

    def is_plain(self, address: str) -> bool:
        """Whether a connection to this address has no TLS."""
        return not (self.ca or self.cert) and (is_local(address) or self.allow_plaintext)

    def channel(self, address: str, only: bytes = b"") -> grpc.Channel:
        """A channel to one address; connects when it is used.

        Args:
            address: ``host:port``.
            only: PEM of the one certificate that it takes, at every connection that it makes; empty: any of the CA's.

        Raises:
            ConfigError: A file cannot be read, or only one of certificate and key is given.
        """
        if bool(self.cert) != bool(self.key):
            raise ConfigError("trunk-cert and trunk-key belong together: set both, or neither")
        if self.is_plain(address):
            return grpc.insecure_channel(address, options=_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=only or (_read("trunk-ca", self.ca) if self.ca else None),
            private_key=_read("trunk-key", self.key) if self.key else None,
            certificate_chain=_read("trunk-cert", self.cert) if self.cert else None,
        )
        return grpc.secure_channel(address, credentials, options=_OPTIONS)


@dataclass
class Replica:
    """One address of the trunk."""

    address: str
    channel: grpc.Channel
    description: pb.DescribeReply | None = None  # what it last said of itself
    checked: bool = False  # else to be checked before the next call
    rests_until: float = 0.0  # of `time.monotonic`
    failures: int = 0  # in a row
    note: Note | None = None  # gets every message before it is sent
    only: bytes = b""  # the certificate that the channel is bound to, if it is
    lock: threading.Lock = field(default_factory=threading.Lock)  # one thread checks it
    describe: Any = field(init=False)
    forward: Any = field(init=False)
    surrogate: Any = field(init=False)
    decode: Any = field(init=False)
    pull: Any = field(init=False)
    share: Any = field(init=False)

    def bound(self, only: bytes, credentials: Credentials) -> "Replica":
        """The same address, reached through a channel that takes this certificate alone; itself, if its does."""
        if only == self.only:
            return self
        return Replica(self.address, credentials.channel(self.address, only), note=self.note, only=only)

    def take(self, other: "Replica") -> None:
        """Go on with another's channel; calls through the one before are lost."""
        before, self.channel, self.only = self.channel, other.channel, other.only
        self.__post_init__()
        before.close()

    def __post_init__(self) -> None:
        """Look up the methods."""
        channel = self.channel if self.note is None else NotingChannel(self.channel, self.address, self.note)
        stub = TrunkStub(channel)
        self.describe, self.forward, self.surrogate = stub.Describe, stub.Forward, stub.Surrogate
        self.decode = stub.Decode
        self.pull = ExactGradientStub(channel).Pull
        self.share = GradientSharesStub(channel).Share


class Replicas:
    """All addresses of a trunk. For several threads."""

    def __init__(self, address: str, credentials: Credentials, note: Note | None = None) -> None:
        """Prepare channels; nothing is sent. `note` gets every message before it is.

        Raises:
            ConfigError: An address that is none, or credentials that cannot be used.
        """
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._all = [Replica(part, credentials.channel(part), note=note) for part in split_address(address)]

    def __len__(self) -> int:
        return len(self._all)

    def pick(self) -> Replica:
        """The next one in turn that does not rest; if all do, the one whose rest ends first."""
        with self._lock:
            turn, now = next(self._turn) % len(self._all), time.monotonic()
            in_turn = self._all[turn:] + self._all[:turn]
            awake = (replica for replica in in_turn if replica.rests_until <= now)
            return next(awake, None) or min(in_turn, key=lambda replica: replica.rests_until)

    def rest(self, replica: Replica, seconds: float) -> None:
        """Leave one alone for a while; others are asked meanwhile."""
        with self._lock:
            replica.rests_until = max(replica.rests_until, time.monotonic() + seconds)

    def shortest_rest_s(self) -> float:
        """Seconds until one of them may be asked."""
        with self._lock:
            return max(0.0, min(replica.rests_until for replica in self._all) - time.monotonic())

    @property
    def descriptions(self) -> Sequence[pb.DescribeReply]:
        """Of those that were checked, as they last were."""
        return [replica.description for replica in self._all if replica.description is not None]

    def close(self) -> None:
        """Close all channels."""
        for replica in self._all:
            replica.channel.close()


def description_of(
    address: str, credentials: Credentials, timeout_s: float, note: Note | None = None
) -> pb.DescribeReply:
    """What a trunk says of itself: the first of its replicas that answers; `note` gets every message before it is sent.

    Raises:
        TrunkUnavailable: None does, or they do not let this caller in.
        ConfigError: As `Replicas`.
    """
    replicas = Replicas(address, credentials, note)
    try:
        for replica in (replicas.pick() for _ in range(len(replicas))):
            try:
                reply: pb.DescribeReply = replica.describe(
                    pb.DescribeRequest(), timeout=timeout_s / len(replicas), metadata=credentials.metadata()
                )
                return reply
            except grpc.RpcError as error:
                failure = unavailable(replica.address, error)
    finally:
        replicas.close()
    raise failure


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}={path!r} cannot be read ({type(error).__name__}): expected a file") from None
