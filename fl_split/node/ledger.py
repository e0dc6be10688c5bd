"""What left a node: a line for each message, in the node's own folder, written before the message is sent.

Each line holds a hash over all lines before it, so that none can be changed or taken out unseen; who keeps the last
hash elsewhere also sees when lines are missing at the end. A line that a kill or a full disk tore off is of a message
that was not sent: it is dropped, which is a line of its own, and the chain goes on. What cannot be written down is not
sent.

It counts messages as they are handed over to gRPC or Flower, without headers and TLS; a call that did not get through
and was made again is in it twice. No text, token or tensor is in it; of hidden states a short hash for each sequence,
by which one that is sent again is found out, unless it is in int8, whose bytes depend on the batch.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from filelock import FileLock

from fl_split.errors import NodeStateError
from fl_split.proto import trunk_pb2 as pb

NAME = "ledger.jsonl"
_KINDS = {
    "Describe": "question",
    "Forward": "hidden-states",
    "Surrogate": "question",
    "Decode": "generation",
    "Pull": "hidden-states-and-gradient",
    "Share": "hidden-states-and-gradient-share",
}
_START = "0" * 64

Note = Callable[[str, str, bytes], None]


class Ledger:
    """A ledger that is written to; for several threads and processes."""

    def __init__(self, file: Path, server_round: int = 0) -> None:
        """Prepare to go on after its last whole line; the folder is made if need be.

        Args:
            file: The ledger's.
            server_round: What its lines are of; 0: no round.
        """
        self._file, self._round, self._lock = file, server_round, threading.Lock()
        self._others = FileLock(file.with_name(f".{file.name}.lock"), thread_local=False)
        self._size, self._number, self._hash = -1, 0, _START
        file.parent.mkdir(parents=True, exist_ok=True)

    def call(self, to: str, method: str, message: bytes) -> None:
        """Note a message to a trunk, before it is sent."""
        kind = _KINDS[method.rpartition("/")[2]]
        lengths, digests = _sequences(kind, message)
        more: dict[str, Any] = {"sequences": len(lengths), "digests": digests} if lengths else {}
        self.note(f"trunk {to}", kind, len(message), **more)

    def note(self, to: str, kind: str, size_bytes: int, **more: Any) -> None:
        """Add a line.

        Raises:
            NodeStateError: It cannot be written, or its end is no line of a ledger.
        """
        with self._lock:
            try:
                with self._others:
                    self._catch_up()
                    self._write({"to": to, "kind": kind, "bytes": size_bytes, **more})
            except OSError as error:
                raise NodeStateError(
                    f"the ledger {self._file} cannot be written ({type(error).__name__}), and what is not written down "
                    "is not sent: make room, or give the node's user the right to write there"
                ) from error

    def _catch_up(self) -> None:
        """Read the end of the file, if somebody else has written to it, or nobody has read it yet."""
        size = self._file.stat().st_size if self._file.exists() else 0
        if size == self._size:
            return
        data = self._file.read_bytes() if size else b""
        whole = data[: data.rfind(b"\n") + 1]
        last = whole.splitlines()[-1] if whole else b""
        self._number, self._hash = 0, _START
        if last:
            entry = _parse(last, self._file, whole.count(b"\n"))
            self._number, self._hash = entry["n"], entry["hash"]
        self._size = size
        if torn := len(data) - len(whole):
            os.truncate(self._file, len(whole))
            self._size = len(whole)
            self._write({"to": "", "kind": "torn-line", "bytes": 0, "dropped": torn})

    def _write(self, entry: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        whole = {"n": self._number + 1, "time": now, "round": self._round, **entry}
        digest = _chain(self._hash, whole)
        line = (json.dumps({**whole, "hash": digest}) + "\n").encode()
        with self._file.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError("a part of a line was written")
        self._number, self._hash, self._size = self._number + 1, digest, self._size + len(line)


class NotingChannel:
    """A gRPC channel of which every message is noted before it is sent."""

    def __init__(self, channel: grpc.Channel, address: str, note: Note) -> None:
        self._channel, self._address, self._note = channel, address, note

    def unary_unary(self, method: str, request_serializer: Any, **options: Any) -> Any:
        """As a channel's own."""
        call = self._channel.unary_unary(method, **options)  # of bytes: what gRPC serialises may not raise
        return lambda request, **given: call(self._noted(method, request_serializer(request)), **given)

    def stream_stream(self, method: str, request_serializer: Any, **options: Any) -> Any:
        """As a channel's own."""
        call = self._channel.stream_stream(method, **options)
        return lambda requests, **given: call(
            (self._noted(method, request_serializer(request)) for request in requests), **given
        )

    def _noted(self, method: str, message: bytes) -> bytes:
        self._note(self._address, method, message)
        return message


@dataclass
class Sums:
    """What a ledger comes to."""

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by receiver and kind
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: set[int] = field(default_factory=set)
    sequences: int = 0  # of which hidden states were sent
    repeated: int = 0  # whose very bytes were sent before
    told_apart: bool = True  # whether all of them could be compared
    examples: int = 0  # of the node, when it was last asked
    redacted: dict[str, int] = field(default_factory=dict)  # what was replaced before, by kind
    shown: dict[str, dict[str, str]] = field(default_factory=dict)  # what each trunk last had to show, by address
    torn: int = 0
    head: str = _START  # the last hash

    @property
    def passes(self) -> float:
        """How often an example was sent, on average."""
        return self.sequences / self.examples if self.examples else 0.0


def read_ledger(file: Path, head: str = "") -> Sums:
    """Check a ledger's chain and sum it up.

    Args:
        file: ``ledger.jsonl``.
        head: A hash that has to be in it: of its last line at an earlier time.

    Raises:
        NodeStateError: It is no ledger, lines were changed or taken out, or `head` is not in it.
    """
    sums, seen, found, known = Sums(), set[str](), not head, _START
    for number, entry in _entries(file):
        digest = entry.pop("hash")
        if entry.get("n") != number or digest != _chain(known, entry):
            raise NodeStateError(
                f"{file}: line {number} does not follow from those before it: the ledger was changed there or just "
                "before; compare it with a copy"
            )
        known, found = digest, found or digest == head
        _add(sums, entry, seen)
    if not found:
        raise NodeStateError(f"{file} has no line with the hash {head}: lines are missing, or it is another ledger")
    sums.head = known
    return sums


def rows_of(sums: Sums) -> list[dict[str, str | int]]:
    """A line for each receiver and kind."""
    return [
        {"to": to, "kind": kind, "messages": sums.calls[to, kind], "bytes": size}
        for (to, kind), size in sorted(sums.bytes.items())
    ]


def say_passes(sums: Sums) -> str:
    """How often the same was sent, in words."""
    text = f"hidden states of {sums.sequences} sequences were sent; the node has {sums.examples} examples"
    if not sums.told_apart:
        return f"{text}: {sums.passes:.1f} times each, on average"
    return f"{text}; {sums.repeated} of the sequences were sent before, byte for byte"


def say_shown(sums: Sums) -> list[str]:
    """What each trunk had to show before it got anything else, a line each."""
    lines = []
    for address, shown in sorted(sums.shown.items()):
        names = " and ".join(name for name in ("statement", "evidence") if name in shown)
        lines.append(f"the trunk at {address} has shown its {names}, for the TLS key {shown['tls-key'][:16]}")
    return lines


def _add(sums: Sums, entry: dict[str, Any], seen: set[str]) -> None:
    key = entry["to"], entry["kind"]
    sums.rounds.add(entry["round"])
    sums.examples = entry.get("examples", sums.examples)
    sums.redacted = entry.get("redacted", sums.redacted)
    sums.torn += entry["kind"] == "torn-line"
    if entry["kind"] == "trunk-shown":
        sums.shown[entry["trunk"]] = entry
    if not entry["to"]:
        return
    sums.bytes[key] += entry["bytes"]
    sums.calls[key] += 1
    count, digests = entry.get("sequences", 0), entry.get("digests", [])
    sums.sequences += count
    sums.told_apart &= len(digests) == count
    sums.repeated += sum(digest in seen for digest in digests)
    seen.update(digests)


def _entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise NodeStateError(f"{file} cannot be read ({type(error).__name__}): expected a node's {NAME}") from None
    for number, line in enumerate(lines[:-1], 1):  # behind the last end of line there is nothing, or a torn line
        yield number, _parse(line, file, number)


def _parse(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
        if {"n", "round", "to", "kind", "bytes", "hash"} <= entry.keys():
            return entry
    except (ValueError, AttributeError):
        pass
    raise NodeStateError(f"{file}: line {number} is no line of a ledger: it was changed; compare it with a copy")


def _chain(known: str, entry: dict[str, Any]) -> str:
    return hashlib.sha256((known + json.dumps(entry, sort_keys=True)).encode()).hexdigest()


def _sequences(kind: str, message: bytes) -> tuple[list[int], list[str]]:
    """Lengths of the sequences whose hidden states a message holds, and a short hash of each if they can be told."""
    if kind == "hidden-states":
        request = pb.ForwardRequest.FromString(message)
    elif kind.startswith("hidden-states"):
        request = pb.PullRequest.FromString(message).forward
    else:
        return [], []
    lengths = list(request.lengths)
    if request.dtype == pb.INT8:
        return lengths, []
    data, digests, end = memoryview(request.hidden_states), [], 0
    row_bytes = len(data) // sum(lengths)
    for length in lengths:
        start, end = end, end + length * row_bytes
        digests.append(hashlib.sha256(data[start:end]).hexdigest()[:16])
    return lengths, digests
