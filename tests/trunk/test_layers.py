"""The layers that a trunk holds, as it is configured to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trunk_service import HIDDEN

from fl_split.errors import ConfigError
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import layers
from fl_split.trunk.config import TrunkConfig, TrunkModel
from fl_split.trunk.layers import HeldLayers


def test_missing_quantization_package_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(layers, "import_module", missing)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ConfigError, match="model.quantization='torchao-int8' needs the package torchao"):
        layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), quantization="torchao-int8"))


def test_missing_device_map_package_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **options: Any) -> None:
        assert options == {"device_map": "auto"}
        raise ImportError("Using a `device_map` requires `accelerate`.\nMore")

    monkeypatch.setattr(layers, "hold_layers", missing)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ConfigError, match=r"model\.device-map='auto' .* not installed: Using a .* `accelerate`\.$"):
        layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), device_map="auto"))


@pytest.mark.parametrize(("compile", "calls"), [(False, []), (True, [{"dynamic": True}])])
def test_layers_are_compiled_only_if_asked(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, compile: bool, calls: list[dict[str, bool]]
) -> None:
    seen: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), compile=compile))
    assert seen == calls


@pytest.mark.parametrize(("threads", "taken"), [(0, 8), (3, 3)])
def test_a_trunk_takes_the_threads_it_is_given(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, threads: int, taken: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(layers, "num_cpus", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), threads=threads))
    assert seen == [taken]


def test_device_map_goes_to_transformers(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    folder = str(checkpoint("llama"))
    plain = layers.hold_configured(TrunkModel(name=folder))
    mapped = layers.hold_configured(TrunkModel(name=folder, device_map="cpu"))
    probe = torch.randn(1, 4, HIDDEN)
    assert torch.equal(plain.run(probe, None, None), mapped.run(probe, None, None))
    assert plain.identity == mapped.identity


def test_models_whose_result_depends_on_the_batch_are_not_batched(held: HeldLayers) -> None:
    config = TrunkConfig().batching
    assert held.allowed(config).enabled
    eight, four = (pb.DescribeReply(quantization=f"bitsandbytes-{bits}bit") for bits in (8, 4))
    assert not replace(held, identity=eight).allowed(config).enabled
    assert replace(held, identity=four).allowed(config).enabled
    model = type("M", (), {"config": type("C", (), {"rope_parameters": {"rope_type": "dynamic"}})})
    assert not replace(held, model=model).allowed(config).enabled  # type: ignore[arg-type]
