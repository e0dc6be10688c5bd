"""Two trunks of different operators as one: the exact gradient, which neither of them sees.

Data path: dL/dh2 -> **divided by its norm, split: a seed to one trunk, the rest to the other** -> their answers ->
**added, times the norm** -> dL/dh1. Both get h1; only the first runs forward.

A share belongs to one side. Each side is a `TrunkConnection` of its own, with its own replicas, and what is made again
after a failure is the identical request to a replica of the same side. `Sides` refuses a replica that both could reach.
"""

import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from cryptography import x509
from torch import Tensor

from fl_split import wire
from fl_split.address import is_local, split_address
from fl_split.attestation import key_hash
from fl_split.errors import ConfigError, TrunkMismatch
from fl_split.node.peer import certificate_of
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.node.vetting import public_key
from fl_split.proto import trunk_pb2 as pb
from fl_split.shares import split_gradient, step_of

logger = logging.getLogger(__name__)

_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}  # in the certificates of many servers


class Sides:
    """Who stands on which side of a gradient: what a replica is known by may be on one side only. For several threads.

    This finds mistakes, such as one address or one certificate in both lists. It cannot find out whether two operators
    work together.
    """

    def __init__(self, addresses: Sequence[str], credentials: Sequence[Credentials]) -> None:
        """Compare the addresses; nothing is sent.

        Args:
            addresses: Of the two sides, as `trunk.address`.
            credentials: Of the two sides.

        Raises:
            ConfigError: Both sides name the same place, or the same operator's key, or a place beyond loopback is to be
                reached without TLS.
        """
        self._credentials = credentials
        self._lock = threading.Lock()
        self._met: tuple[set[str], set[str]] = (set(), set())
        parts = [split_address(address) for address in addresses]
        places = [{place for part in side for place in _places(part)} for side in parts]
        if both := places[0] & places[1]:
            raise ConfigError(
                f"trunk.address={addresses[0]!r} and trunk.share-address={addresses[1]!r} both lead to "
                f"{sorted(both)[0]}: one operator would have both shares; name trunks of two operators"
            )
        names = ("trunk-operator-key", "trunk-share-operator-key")
        keys = [
            public_key(name, own.operator_key).public_bytes_raw()
            for name, own in zip(names, credentials, strict=True)
            if own.operator_key
        ]
        if len(set(keys)) < len(keys):
            raise ConfigError(
                f"{names[0]} and {names[1]} hold one key: one operator would have both shares; name trunks of two "
                "operators, and the key of each"
            )
        for side, own in zip(parts, credentials, strict=True):
            for address in side:
                if own.is_plain(address) and not is_local(address):
                    raise ConfigError(
                        f"the trunk at {address} would be reached without TLS, so nothing says whose it is: "
                        "surrogate.kind='shares' needs TLS beyond loopback; leave out trunk-allow-plaintext"
                    )
        if any(own.is_plain(address) for side, own in zip(parts, credentials, strict=True) for address in side):
            logger.warning(
                "a trunk on this machine is reached without TLS: nothing says whose it is, only that addresses differ"
            )

    def meet(self, side: int, address: str) -> None:
        """Look at a replica's certificate before it gets anything.

        Raises:
            TrunkMismatch: The other side has met the same key or name.
            TrunkUnavailable: There is no TLS server.
        """
        own = self._credentials[side]
        if own.is_plain(address):
            return
        marks = marks_of(certificate_of(address, own))
        with self._lock:
            if both := marks & self._met[1 - side]:
                raise TrunkMismatch(
                    f"the trunk at {address} is known by {sorted(both)[0]}, as is one on the other side of "
                    "surrogate.kind='shares': one operator would have both shares; name trunks of two operators, each "
                    "with a certificate of its own"
                )
            self._met[side].update(marks)


class SharesTrunk:
    """A `slots.ExactTrunk` made of two trunks that know nothing of each other."""

    def __init__(self, first: TrunkConnection, second: TrunkConnection, std: float) -> None:
        """Take two connections.

        Args:
            first: Runs forward, and gets the masks' seeds.
            second: Gets what is left of the gradients.
            std: See `shares.split_gradient`.

        Raises:
            TrunkMismatch: They are not of the same weights, or not fit for it.
            TrunkError: One of them cannot be reached.
        """
        self.first, self.second = first, second
        self._std = torch.tensor(std, dtype=torch.float32).item()  # as it is on the wire
        self._lock = threading.Lock()
        self.leak_bits = 0.0  # of all gradients so far, at most, to the second operator
        for connection in (first, second):
            connection.connect()
        if first.trunk_id != second.trunk_id:
            raise TrunkMismatch(
                f"the trunks at {first.address} ({first.trunk_id.hex()}) and {second.address} "
                f"({second.trunk_id.hex()}) are not of the same layers, weights and precision: the shares of a "
                "gradient would not add up; start both with the same [model]"
            )

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Run forward on the first trunk; see `slots.Trunk.start`."""
        return self.first.start(hidden_states, attention_mask, position_ids)

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """Pull dL/dh2 back; shapes as in `slots.Trunk.start`.

        Leave the node: h1 to both, a seed to the first, the masked gradient without its norm to the second.

        Raises:
            TrunkError: One of them fails for good. Nothing is asked of the other instead.
        """
        packed = wire.pack_batch(hidden_states.float(), attention_mask, position_ids)
        rows = wire.pack(gradient.float(), attention_mask)[0]
        both = wire.Packed(torch.cat([packed.rows, rows], 1).cpu(), packed.lengths, packed.positions)  # cut together
        size = min(self.first.tokens_per_share, self.second.tokens_per_share)
        calls = [self._submit(part) for part in wire.cut(both, size)]
        pulled = torch.cat([_add(one.result(), other.result(), norms) for one, other, norms in calls])
        return wire.unpack(
            pulled.to(device=gradient.device, dtype=gradient.dtype), attention_mask, hidden_states.shape[0]
        )

    def _submit(self, part: wire.Packed) -> "tuple[Future[Tensor], Future[Tensor], Tensor]":
        hidden_states, gradient = part.rows.chunk(2, 1)
        shares = split_gradient(gradient, part.lengths, self._std)
        mask = pb.Mask(seed=shares.seed, std=self._std, step=step_of(self._std))
        at = wire.Packed(hidden_states, part.lengths, part.positions)
        one, other = wire.encode_shares(at, mask, shares.rest)
        with self._lock:
            self.leak_bits += shares.leak_bits
        return self.first.share(one), self.second.share(other), shares.norms

    @property
    def bytes_sent(self) -> int:
        """To both."""
        return self.first.bytes_sent + self.second.bytes_sent


def _add(one: Tensor, other: Tensor, norms: Tensor) -> Tensor:
    return (one.double() + other.double()) * norms


def marks_of(certificate: x509.Certificate) -> set[str]:
    """What a server is known by: its public key, and its names but those of every machine."""
    names: set[str] = set()
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names.update(str(name.value).lower() for name in extension.value)
    except x509.ExtensionNotFound:
        pass  # then it is known by its key alone
    return {f"the key {key_hash(certificate).hex()[:16]}", *(f"the name {name}" for name in names - _LOOPBACK_NAMES)}


def _places(address: str) -> set[str]:
    """Where an address leads: the machine's own ones are all one."""
    if address.startswith("unix:"):
        return {f"unix:{Path(address.removeprefix('unix:')).resolve()}"}  # unix:///a is unix:/a
    host, _, port = address.rpartition(":")
    port = str(int(port))
    if is_local(address):
        return {f"loopback:{port}"}
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), proto=socket.IPPROTO_TCP)
    except OSError:
        return {address.lower()}
    return {f"{where[4][0]}:{port}" for where in found} | {address.lower()}
