"""What `flwr run` sends to all nodes: the package and its wiring, nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_bundle_holds_what_nodes_need_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    app = tmp_path / "fl-split"
    own = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", "shared", "*.fab", "*.egg-info")
    shutil.copytree(ROOT, app, ignore=own)
    done = subprocess.run(
        [Path(sys.executable).parent / "flwr", "build"], cwd=app, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = app.glob("*.fab")
    names = {name for name in zipfile.ZipFile(bundle).namelist() if not name.startswith(".info/")}
    package = {str(file.relative_to(app)) for file in (app / "fl_split").rglob("*.py")}
    assert names == package | {"server_app.py", "client_app.py", "pyproject.toml", "README.md", "LICENSE"}
