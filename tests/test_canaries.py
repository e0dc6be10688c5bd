"""What fl-split leans on in libraries without their promise: each fails here, by name, when its library changes.

`scripts/check_versions.sh` runs them, and more, with the oldest and the newest versions that fl-split allows.
"""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common.logger import FLOWER_LOGGER
from flwr.server.superlink.fleet.vce import vce_api
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from flwr.serverapp.strategy import strategy as strategy_loop
from flwr.supercore.exit import exit as flower_exit
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import SubprocessExecutor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from fl_split import cli
from fl_split.config import Dp, RunConfig
from fl_split.errors import ConfigError
from fl_split.log import FLOWER
from fl_split.model.adapters import _means_experts
from fl_split.model.trunk import load_trunk
from fl_split.node import executor
from fl_split.server.flower import flower_strategy, restore_server_state, server_state


def test_flowers_loop_asks_for_an_executor() -> None:  # node/executor.py
    assert "get_executor" in superexec.run_superexec.__code__.co_names
    assert {"launch", "reconcile"} <= vars(SubprocessExecutor).keys() | vars(SubprocessExecutor.__mro__[1]).keys()
    expected = {"runtime_api_address", "insecure", "root_certificates_path", "runtime_dependency_install"}
    assert expected <= inspect.signature(superexec.run_superexec).parameters.keys()


def test_an_executor_that_flower_would_not_ask_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(**_: Any) -> None:
        raise AssertionError("must not run")

    monkeypatch.setattr(superexec, "run_superexec", changed)
    with pytest.raises(ConfigError, match="cannot be given an executor: expected the versions that fl-split asks for"):
        executor.serve("127.0.0.1:1", None)
    done = CliRunner().invoke(cli.app, ["executor", "127.0.0.1:1"])
    assert done.exit_code == 1 and done.stderr.startswith("error: Flower ")


@pytest.mark.parametrize(("strategy", "names"), [(FedAdam, {"m_t", "v_t"}), (FedAvgM, {"momentum_vector"})])
def test_flowers_strategies_keep_their_state_where_it_was(strategy: type[FedAvg], names: set[str]) -> None:
    source = "".join(inspect.getsource(each) for each in strategy.__mro__ if each is not object)
    assert all(source.count(f"self.{name}") > 1 for name in names)  # server/flower.py
    assert names <= vars(strategy()).keys()


@pytest.mark.parametrize("mode", ["server-fixed", "client-fixed", "server-adaptive", "client-adaptive"])
def test_flowers_privacy_strategies_keep_their_state_where_it_was(mode: str) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    changes = {
        "aggregation.share": "top",
        "aggregation.weighting": "equal",
        "dp.mode": mode,
        "dp.noise-multiplier": 0.1,
    }
    config = RunConfig.from_flat(changes)
    strategy = flower_strategy(config.aggregation, config.dp)
    assert isinstance(vars(strategy)["clipping_norm"], float)  # server/flower.py
    state = server_state(strategy, [])
    assert state.keys() == ({"clipping-norm", "accountant"} if "fixed" in mode else {"clipping-norm"})
    restore_server_state(strategy, state)


@pytest.mark.parametrize(("name", "attribute", "state"), [
    ("fedadam", "v_t", {"m|x": torch.ones(1), "v|x": torch.ones(1)}),
    ("fedavgm", "momentum_vector", {"momentum|x": torch.ones(1)}),
])  # fmt: skip
def test_state_for_which_flower_has_no_place_is_refused(name: str, attribute: str, state: dict[str, Any]) -> None:
    config = RunConfig.from_flat({"aggregation.share": "top", "aggregation.strategy": name})
    strategy = flower_strategy(config.aggregation, Dp())
    restore_server_state(strategy, state)
    delattr(strategy, attribute)
    with pytest.raises(ConfigError, match=f"keeps no {attribute} in .*: go on with the run under the"):
        restore_server_state(strategy, state)


def test_transformers_is_told_which_weights_are_anothers(  # model/loading.py
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO, "transformers"):
            load_trunk(checkpoint("llama"), 2, 2)
    finally:
        transformers_logging.disable_propagation()
    assert not [record for record in caplog.records if "UNEXPECTED" in record.getMessage()]
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    assert callable(PreTrainedModel._init_weights)  # model/family.py


def test_transformers_takes_weights_that_are_not_read_yet(  # model/loading.py
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    needed = load_trunk(tmp_path, 2, 2).state_dict()
    for file in tmp_path.glob("model-*.safetensors"):
        if not any(f"layers.{i}." in _keys(file) for i in (2, 3)):
            file.unlink()
    assert len(list(tmp_path.glob("model-*"))) < 20
    again = load_trunk(tmp_path, 2, 2).state_dict()
    assert needed.keys() == again.keys() and all(torch.equal(needed[name], again[name]) for name in needed)


def _keys(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return " ".join(tensors.keys())


def test_transformers_says_how_long_a_cache_may_become() -> None:  # model/generation.py
    assert "max_cache_length" in inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters


def test_transformers_layers_checkpoint_by_a_function_that_they_are_given() -> None:  # model/ends.py
    class Layer(GradientCheckpointingLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer, given = Layer().train(), []
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda run, *args: given.append(args) or run(*args)  # type: ignore[assignment]
    assert layer(torch.ones(1, requires_grad=True)).item() == 2
    assert len(given) == 1


def test_transformers_takes_another_attention_by_a_name_in_the_configuration() -> None:  # plan/step_memory.py
    called: list[nn.Module] = []

    def attend(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return value.transpose(1, 2), None

    AttentionInterface.register("canary", attend)
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    config._attn_implementation = "canary"
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert len(called) == 2


def test_torch_tells_which_tables_are_in_no_checkpoint() -> None:  # model/streamed.py
    module = nn.Module()
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("table", torch.ones(1), persistent=False)
    assert module._non_persistent_buffers_set == {"table"}
    assert list(module._buffers) == ["saved", "table"]


def test_torch_tells_storages_apart_and_has_shapes_without_numbers() -> None:  # plan/step_memory.py, model/family.py
    one, other = torch.ones(2, 2), torch.ones(2, 2)
    assert one.untyped_storage()._cdata == one[0].untyped_storage()._cdata != other.untyped_storage()._cdata
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert (torch.ones(3, 7) @ torch.ones(7, 2)).shape == (3, 2)


def test_peft_says_which_names_mean_experts() -> None:  # model/adapters.py
    config = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name: _means_experts(model, name) for name in ("w1", "w2", "q_proj")} == {
        "w1": True, "w2": True, "q_proj": False,
    }  # fmt: skip


def test_flowers_log_has_the_files_and_the_last_line_that_ours_replaces() -> None:
    for module, folder in ((strategy_loop, "/serverapp/strategy/"), (vce_api, "/fleet/vce/")):
        assert folder in Path(str(module.__file__)).as_posix()
    assert 'f"Exit Code: {code}' in inspect.getsource(flower_exit.flwr_exit)
    assert FLOWER_LOGGER.name == FLOWER
