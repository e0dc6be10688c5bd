"""What an operator sees of a running trunk: describe, ping, and a live view of its metrics."""

import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from fl_split.errors import TrunkUnavailable
from fl_split.node.replicas import Credentials, description_of
from fl_split.node.trouble import unavailable
from fl_split.proto import trunk_pb2 as pb

_PREFIX = "fl_split_trunk_"


def describe(address: str, credentials: Credentials, timeout_s: float = 5.0) -> dict[str, Any]:
    """Ask a trunk what it is; keys in kebab case.

    Raises:
        TrunkUnavailable: It does not answer, or does not let this caller in.
    """
    reply = description_of(address, credentials, timeout_s)
    return {
        "model-type": reply.model_type,
        "layers": f"{reply.first_layer}-{reply.end_layer - 1}",
        "hidden-size": reply.hidden_size,
        "wire-dtypes": ", ".join(sorted(name.lower() for name, value in pb.DType.items() if value in reply.dtypes)),
        "max-tokens": reply.max_tokens,
        "max-sequence-length": reply.max_sequence_length,
        "max-message-bytes": reply.max_message_bytes,
        "config-digest": reply.config_digest,
        "weights-digest": reply.weights_digest,
        "trunk-id": reply.trunk_id.hex(),
        "dtype": reply.compute_dtype,
        "quantization": reply.quantization or "none",
        "exact-gradient": reply.exact_gradient,
        "generation": f"{reply.decode.cache_bytes // 10**6} MB" if reply.HasField("decode") else "none",
        "cache-bytes-per-token": reply.decode.bytes_per_token,
        "gradient-shares": reply.gradient_shares,
        "surrogate": reply.surrogate_digest.hex() or "none",
        "version": reply.version,
    }


def ping(address: str, credentials: Credentials, timeout_s: float = 5.0) -> tuple[str, float]:
    """A trunk's health (``SERVING`` or ``NOT_SERVING``), and the seconds that asking for it took.

    Raises:
        TrunkUnavailable: It does not answer.
    """
    with credentials.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["Trunk"].full_name)
        try:
            stub.Check(request, timeout=timeout_s)  # connects
            started = time.monotonic()
            reply = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise unavailable(address, error) from error
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status), time.monotonic() - started


# ----------------------------------------------------------------------------------------------------- live view


@dataclass
class Snapshot:
    """A trunk's metrics at one moment: sums over labels, and per institution."""

    at: float
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    info: dict[str, str] = field(default_factory=dict)


def scrape(url: str, timeout_s: float = 5.0) -> Snapshot:
    """Read a trunk's metrics.

    Raises:
        TrunkUnavailable: Nobody answers at `url`, or not with metrics.
    """
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("not an http address")
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    except (OSError, ValueError) as error:
        raise TrunkUnavailable(
            f"no metrics at {url} ({type(error).__name__}): give the address of metrics.port, such as "
            "http://127.0.0.1:9471/metrics"
        ) from error
    snapshot = Snapshot(time.monotonic())
    for metric in (metric for family in families for metric in family.samples):
        name, labels = metric.name.removeprefix(_PREFIX), metric.labels
        if not name.endswith("_bucket"):
            snapshot.totals[name] += metric.value
        if name == "tokens_total":
            snapshot.tokens[labels["institution"]] += metric.value
        elif name == "calls_total":
            snapshot.calls[labels["institution"], labels["code"]] += metric.value
        elif name == "info":
            snapshot.info = labels
    return snapshot


def table(before: Snapshot, now: Snapshot) -> Table:
    """Rates between two snapshots, and the state at the second: one line per institution."""
    seconds = max(now.at - before.at, 1e-9)

    def rate(name: str) -> float:
        return (now.totals[name] - before.totals[name]) / seconds

    def mean(name: str) -> float:
        count = now.totals[f"{name}_count"] - before.totals[f"{name}_count"]
        return (now.totals[f"{name}_sum"] - before.totals[f"{name}_sum"]) / count if count else 0.0

    ready = "ready" if now.totals["ready"] else "NOT READY"
    view = Table(
        title=f"{ready}   layers {now.info.get('layers', '?')}   {rate('tokens_total'):,.0f} tokens/s   "
        f"{rate('compute_seconds_sum'):.0%} busy   queue {now.totals['queued_tokens']:,.0f} tokens",
        caption=f"means: batch {mean('batch_tokens'):,.0f} tokens of {mean('batch_calls'):.1f} calls, "
        f"fill {mean('batch_fill'):.0%}, queue {mean('queue_seconds') * 1e3:.1f} ms, "
        f"compute {mean('compute_seconds') * 1e3:.1f} ms, "
        f"in {rate('received_bytes_total') / 1e6:.2f} MB/s, out {rate('sent_bytes_total') / 1e6:.2f} MB/s",
    )
    for heading in ("institution", "tokens/s", "calls/s", "refused/s", "calls in all"):
        view.add_column(heading, justify="left" if heading == "institution" else "right")
    for name in sorted({institution for institution, _ in now.calls}):
        rates = {
            code: (count - before.calls[name, code]) / seconds
            for (institution, code), count in now.calls.items()
            if institution == name
        }
        total = sum(count for (institution, _), count in now.calls.items() if institution == name)
        tokens = (now.tokens[name] - before.tokens[name]) / seconds
        refused = sum(value for code, value in rates.items() if code != "OK")
        view.add_row(name, f"{tokens:,.0f}", f"{rates.get('OK', 0):.1f}", f"{refused:.1f}", f"{total:,.0f}")
    return view
