"""`fl-split stop`: end the SuperLink that `flwr run` has left running on this machine, and nobody else's."""

import os
from contextlib import suppress

import psutil

from fl_split.errors import ConfigError

PORT_VARIABLE = "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"  # Flower's
_GRACE_S = 10.0


def local_port() -> int:
    """Where `flwr run` starts a SuperLink of its own, or finds one."""
    return int(os.environ.get(PORT_VARIABLE, "39091"))


def stop(port: int) -> int:
    """End this account's SuperLink on a port, and the runs that it has started; returns its process id.

    Raises:
        ConfigError: There is none, or it is somebody else's.
    """
    for process in psutil.process_iter(["cmdline", "uids", "pid"]):
        words = process.info["cmdline"] or []
        if not (any("flower-superlink" in word for word in words) and str(port) in words):
            continue
        if process.info["uids"] and process.info["uids"].real != os.getuid():
            raise ConfigError(
                f"the SuperLink on port {port} belongs to another account of this machine: use a port of your own, "
                f"{PORT_VARIABLE}"
            )
        runs: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            runs = process.children(recursive=True)  # a simulation would go on for minutes, and hold its folder
        for ended in ([process], runs):
            for one in ended:
                with suppress(psutil.NoSuchProcess):
                    one.terminate()
            _, alive = psutil.wait_procs(ended, timeout=_GRACE_S)
            for left in alive:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        return int(process.info["pid"])
    raise ConfigError(f"no SuperLink of this account listens on port {port}: nothing to stop")
