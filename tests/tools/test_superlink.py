"""`fl-split stop` ends one SuperLink, by its port."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.errors import ConfigError
from fl_split.tools import superlink

RUN = "import os, time; open('{pid}.new', 'w').write(str(os.getpid())); os.rename('{pid}.new', '{pid}'); time.sleep(60)"


def test_the_superlink_of_a_port_is_ended_with_its_runs_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "flower-superlink"
    pid = tmp_path / "pid"  # of a run that it has started
    script.write_text(f"""
import subprocess, sys, time
if "39991" in sys.argv:
    subprocess.Popen([sys.executable, "-c", {RUN.format(pid=pid)!r}], start_new_session=True)
time.sleep(60)
""")
    one, two = (subprocess.Popen([sys.executable, script, "--port", port]) for port in ("39991", "39992"))
    try:
        while (
            not all("flower-superlink" in str(psutil.Process(p.pid).cmdline()) for p in (one, two)) or not pid.exists()
        ):
            time.sleep(0.05)
        monkeypatch.setenv(superlink.PORT_VARIABLE, "39991")
        assert superlink.local_port() == 39991
        done = CliRunner().invoke(app, ["stop"])
        assert done.exit_code == 0 and f"stopped the SuperLink on port 39991 (process {one.pid})" in done.output
        assert not psutil.pid_exists(one.pid) and not psutil.pid_exists(int(pid.read_text())) and two.poll() is None
        with pytest.raises(ConfigError, match="no SuperLink of this account listens on port 39991"):
            superlink.stop(39991)
        monkeypatch.setattr(superlink.os, "getuid", lambda: -1)
        with pytest.raises(ConfigError, match="port 39992 belongs to another account .* FLWR_LOCAL_SUPERLINK"):
            superlink.stop(39992)
    finally:
        for process in (one, two):
            process.kill()
            process.wait()
