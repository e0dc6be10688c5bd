"""What a trunk counts, for Prometheus. Institutions are labels, addresses and values of tensors never are.

`configs/grafana-trunk.json` is built on these names.
"""

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536)
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class TrunkMetrics:
    """One server's metrics in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"fl_split_trunk_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ("institution",)) -> Counter:
            return Counter(f"fl_split_trunk_{name}", text, labels, registry=registry)

        self.calls = counter("calls", "Finished calls by gRPC status", ("method", "code", "institution"))
        self.tokens = counter("tokens", "Tokens computed")
        self.bytes_in = counter("received_bytes", "Bytes of requests")
        self.bytes_out = counter("sent_bytes", "Bytes of replies")
        self.call_s = histogram("call_seconds", "Whole call, from its headers to its reply", _SECONDS)
        self.queue_s = histogram("queue_seconds", "From decoded to the start of its forward pass", _SECONDS)
        self.compute_s = histogram("compute_seconds", "Forward pass of one batch", _SECONDS)
        self.batch_tokens = histogram("batch_tokens", "Tokens in one batch", _TOKENS)
        self.batch_calls = histogram("batch_calls", "Calls in one batch", (1, 2, 4, 8, 16, 32, 64))
        self.batch_fill = histogram("batch_fill", "Share of a batch's tokens that is not padding", _SHARES)
        self.decode_s = histogram("decode_seconds", "Forward passes of one batch of generation steps", _SECONDS)
        self.decode_steps = histogram("decode_steps", "Streams in one batch of steps", (1, 2, 4, 8, 16, 32, 64, 128))
        self.streams = Gauge("fl_split_trunk_streams", "Open generation streams", registry=registry)
        self.cache_bytes = Gauge("fl_split_trunk_cache_bytes", "Reserved for keys and values", registry=registry)
        self.open_calls = Gauge("fl_split_trunk_open_calls", "Calls being served", registry=registry)
        self.queued_tokens = Gauge("fl_split_trunk_queued_tokens", "Tokens waiting", registry=registry)
        self.ready = Gauge("fl_split_trunk_ready", "1 while calls are taken, else 0", registry=registry)
        self.info = Info("fl_split_trunk", "What is served", registry=registry)


def serve_metrics(metrics: TrunkMetrics, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Serve metrics over HTTP from a thread of their own; returns the port, and what stops it.

    Raises:
        OSError: The address cannot be bound.
    """
    server: WSGIServer
    thread: threading.Thread
    server, thread = start_http_server(port, host, metrics.registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), stop
