"""The trunk's configuration: a file, flags over it, and errors that name the key as written."""

from pathlib import Path

import pytest

from fl_split.errors import ConfigError
from fl_split.trunk.config import TrunkConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batching.max-wait-ms=-1", r"batching\.max-wait-ms=-1: input should be greater"),
        ("batching.size=1", r"batching\.size: no such key; .*see docs/trunk\.md"),
        ("server.port=70000", r"server\.port=70000: input should be less"),
        ("model.quantization=int3", r"model\.quantization='int3': input should be"),
        ("limits.queue-tokens=100", r"limits\.queue-tokens=100 is less than limits\.max-tokens=8192"),
        ("nonsense", r"--set 'nonsense': expected section\.key=value"),
    ],
)
def test_wrong_configuration_is_named_as_written(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrunkConfig.load(None, [override])


def test_tensor_parallelism_serves_no_gradients() -> None:
    with pytest.raises(ConfigError, match=r"model\.tensor-parallel and server\.exact-gradient do not work together"):
        TrunkConfig.load(None, ["model.tensor-parallel=true", "server.exact-gradient=true"])


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trunk.toml"
    file.write_text('[server]\nport = 1\n[model]\nname = "/m"\n')
    config = TrunkConfig.load(file, ["server.port=2", "model.threads=3", "log.format=text"])
    assert (config.server.port, config.model.name, config.model.threads) == (2, "/m", 3)
    file.write_text("model = 3")
    with pytest.raises(
        ConfigError, match=r"model=3 in the file: expected a section \[model\], for --set 'model.name=x'"
    ):
        TrunkConfig.load(file, ["model.name=x"])
    for damage in ("port = ", "\x00"):
        file.write_text(damage)
        with pytest.raises(ConfigError, match="cannot be read as TOML"):
            TrunkConfig.load(file)
