"""A trunk as a process of its own: load, warm up, serve until SIGTERM, drain, exit 0."""

import asyncio
import errno
import gc
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from fl_split.errors import ConfigError
from fl_split.malloc import keep_heap, share_heap
from fl_split.trunk import tensor_parallel
from fl_split.trunk.access import TokenBook, server_credentials
from fl_split.trunk.config import Log, TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_configured
from fl_split.trunk.metrics import serve_metrics
from fl_split.trunk.server import TrunkServer

logger = logging.getLogger(__name__)


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and what the record's `event` holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "event", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Text(logging.Formatter):
    """For people: the same, in words."""

    def format(self, record: logging.LogRecord) -> str:
        event = " ".join(f"{key}={value}" for key, value in getattr(record, "event", {}).items())
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{when} {record.levelname.lower():7} {record.getMessage()} {event}".rstrip()


def show_log(config: Log) -> None:
    """Send fl-split's log to standard error as configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if config.format == "json" else _Text())
    root = logging.getLogger("fl_split")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(config.level.upper())


def serve(config: TrunkConfig) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends it at once.

    Raises:
        ConfigError: The configuration names something that is not there, or an address that is taken.
        SplitError: The model cannot be split as asked.
        TrunkError: The trunk can serve no more, whatever the reason.
    """
    show_log(config.log)
    share_heap()
    keep_heap()
    transformers_logging.disable_progress_bar()
    _check_first(config)
    started = time.monotonic()
    held = hold_configured(config.model)
    about = held.identity
    logger.info(
        "loaded layers %d to %d of %s in %.1f s",
        about.first_layer,
        about.end_layer - 1,
        about.model_type,
        time.monotonic() - started,
    )
    if config.model.tensor_parallel and dist.get_rank() > 0:
        tensor_parallel.follow(held)
        return
    try:
        asyncio.run(_serve(held, config))
    except OSError as error:
        raise _no_address(config, error) from error


def _check_first(config: TrunkConfig) -> None:
    """Find what would end the trunk after its model, which may take minutes, is loaded."""
    server_credentials(config.security)
    if config.security.tokens:
        TokenBook(Path(config.security.tokens))
    if config.server.port and not config.model.tensor_parallel:  # there, one process of several listens
        family = socket.AF_INET6 if ":" in config.server.host else socket.AF_INET
        try:
            socket.create_server((config.server.host, config.server.port), family=family).close()
        except OSError as error:
            raise _no_address(config, error) from error


def _no_address(config: TrunkConfig, error: OSError) -> ConfigError:
    return ConfigError(
        f"server.host={config.server.host!r} with server.port={config.server.port}, or metrics.host="
        f"{config.metrics.host!r}: {error}; choose another port, stop what listens there ('ss -ltnp' shows it), or "
        "give an address of this machine"
    )


async def _serve(held: HeldLayers, config: TrunkConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop, number)
    if config.model.tensor_parallel:
        held.identity.ClearField("decode")  # a pass with a cache would be one of this rank alone
        held = tensor_parallel.SharedLayers(held.model, held.identity, held.causal)
    server = TrunkServer(held, config)
    server.metrics.info.info(
        {
            "model_type": held.identity.model_type,
            "layers": f"{held.identity.first_layer}-{held.identity.end_layer - 1}",
            "trunk_id": held.identity.trunk_id.hex(),
            "version": held.identity.version,
        }
    )
    stop_metrics: Callable[[], None] = lambda: None  # noqa: E731
    if config.metrics.enabled:
        try:
            port, stop_metrics = serve_metrics(server.metrics, config.metrics.host, config.metrics.port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            port, stop_metrics = serve_metrics(server.metrics, config.metrics.host, 0)
            logger.warning(
                "metrics.port=%d is in use, by another replica perhaps: it is a free one instead", config.metrics.port
            )
        logger.info("metrics at http://%s:%d/metrics", config.metrics.host, port)
    try:
        await server.start()
        await server.warm_up()
        gc.collect()
        gc.freeze()  # what torch and the model made stays: the collector need not walk over it again and again
        gc.collect()  # and forgets how much that was: else it would wait for a quarter as much before a full round
        logger.info("ready at %s:%d", config.server.host, server.port)
        await server.run_until(stop.wait())
        logger.info("stopped")
    finally:
        stop_metrics()
        if config.model.tensor_parallel:
            tensor_parallel.end()


def _on_signal(stop: asyncio.Event, number: signal.Signals) -> None:
    stop.set()
    signal.signal(number, signal.SIG_DFL)  # asking twice ends it at once
