"""Configuration: every wrong key, type and combination is refused by the name the user wrote."""

import tomllib
from pathlib import Path

import pytest
import torch

from fl_split.config import Model, NodeConfig, RunConfig, Surrogate, check_given, read_values
from fl_split.errors import ConfigError

ROOT = Path(__file__).parent.parent


def flat(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in table.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def test_pyproject_holds_every_key_with_its_default() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flat(app["config"]) == RunConfig().to_flat()


def test_docs_name_every_key_with_its_default_and_meaning() -> None:
    docs = (ROOT / "docs" / "configuration.md").read_text()
    for row in key_table():
        assert row in docs, f"docs/configuration.md lacks the row {row}"


def key_table() -> list[str]:
    """One row of the docs per key."""
    rows = []
    defaults = RunConfig().to_flat()
    for name, field in RunConfig.model_fields.items():
        sections = {"": {name: field}} if field.annotation is None else {}
        inner = getattr(field.annotation, "model_fields", None)
        sections = {field.alias or name: inner} if inner else {"": {name: field}}
        for section, fields in sections.items():
            for key, info in fields.items():
                full = ".".join(filter(None, (section, info.alias or key)))
                default = str(defaults[full]).lower() if isinstance(defaults[full], bool) else defaults[full]
                rows.append(
                    f"| `{full}` | `{default}` | {info.description} |"
                    if default != ""
                    else f"| `{full}` | (empty) | {info.description} |"
                )
    return rows


def test_flat_form_round_trips() -> None:
    values = {**RunConfig().to_flat(), "train.batch-size": 3, "aggregation.share": "top"}
    assert RunConfig.from_flat(values).to_flat() == values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch-size", "8", r"train\.batch-size='8': input should be a valid integer"),
        ("train.batch-size", 0, r"train\.batch-size=0: input should be greater than or equal to 1"),
        ("train.batchsize", 8, r"train\.batchsize: no such key; did you mean train\.batch-size\? see the table"),
        ("nonsense.key", 1, r"nonsense: no such key"),
        ("model.dtype", "int8", r"model\.dtype='int8': input should be 'float32' or 'bfloat16'"),
        ("split.bottom-layers", True, r"split\.bottom-layers=True: input should be a valid integer"),
        ("surrogate.kind", "magic", r"surrogate\.kind='magic': input should be 'auto', 'none', 'identity'"),
        ("lora.dropout", 1.0, r"lora\.dropout=1\.0: input should be less than 1"),
        ("data.holdout", 0.0, r"data\.holdout=0\.0: input should be greater than 0"),
        ("data.partitioner", "column", r"data\.partitioner='column' goes by a column's values: name it in"),
        ("aggregation.share", "all", r"aggregation\.share='all': input should be 'none', 'bottom', 'top' or 'both'"),
        ("run.name", "a/b", r"run\.name='a/b': string should match pattern"),
        ("run.dir", "runs", r"run\.dir='runs' is relative"),
        ("run.resume", True, r"run\.resume=true needs run\.name"),
        ("trunk.address", "somewhere", r"trunk\.address='somewhere': expected 'embedded' or host:port"),
        ("num-server-rounds", 0, r"num-server-rounds=0: input should be greater"),
    ],
)
def test_wrong_value_is_refused_by_the_name_of_its_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat({**RunConfig().to_flat(), key: value})  # type: ignore[dict-item]


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)lora\.rank.*train\.steps"):
        RunConfig.from_flat({"train.steps": 0, "lora.rank": 0})


def test_sharing_a_bottom_adapter_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregation\.share='both' .* surrogate\.kind='none'"):
        RunConfig.from_flat({"surrogate.kind": "none", "aggregation.share": "both"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.labels": "a,b"}, r"data\.labels is for task='sequence-classification'"),
        ({"task": "sequence-classification"}, r"needs data\.labels.*data\.labels=''"),
        ({"task": "sequence-classification", "data.labels": "a,,b"}, r"at least two different names"),
        ({"task": "sequence-classification", "data.labels": "a, a"}, r"at least two different names"),
        ({"task": "sequence-classification", "data.labels": "a,b"}, r"needs data\.text"),
        ({"aggregation.share-head": True, "aggregation.share": "top"}, r"share-head=true .* needs task="),
    ],
)
def test_a_task_without_what_it_needs_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat(values)


def test_node_config_takes_its_own_keys_and_leaves_others() -> None:
    node = NodeConfig.from_flat({"partition-id": 1, "num-partitions": 3, "data-path": "/d", "other-app": 7})
    assert (node.partition_id, node.num_partitions, node.data_path) == (1, 3, "/d")
    with pytest.raises(ConfigError, match="node-config lacks partition-id"):
        NodeConfig.from_flat({"data-path": "/d"})
    with pytest.raises(ConfigError, match="partition-id='one'"):
        NodeConfig.from_flat({"partition-id": "one"})


def test_a_nodes_folder_is_its_own_out_dir_or_below_the_run() -> None:
    config = RunConfig.from_flat({"run.dir": "/runs"})
    assert NodeConfig(partition_id=2).folder(config, "x") == Path("/runs/x/nodes/2")
    assert NodeConfig(out_dir="/mine").folder(config, "x") == Path("/mine/x")
    with pytest.raises(ConfigError, match="out-dir='mine' is relative"):
        NodeConfig(out_dir="mine").folder(config, "x")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_run_configs_are_valid(path: Path) -> None:
    table = tomllib.loads(path.read_text())
    if "server" in table:
        pytest.skip("a trunk's configuration, tested with the trunk")
    RunConfig.from_flat({**RunConfig().to_flat(), **flat(table)})  # type: ignore[dict-item]


def test_several_pairs_of_one_table_are_merged_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\nname = "/m"\nrevision = "a"\n[train]\nsteps = 3\n')
    pairs = ['model.dtype="bfloat16" train.steps=4', 'model.revision="b"', "lora.rank=2"]
    assert read_values(file, pairs) == {
        "model.name": "/m", "model.revision": "b", "train.steps": 4, "model.dtype": "bfloat16", "lora.rank": 2,
    }  # fmt: skip
    assert read_values(None, [str(file), "train.steps=5"])["train.steps"] == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.steps", "'train.steps' has no key or no value"),
        ("a=1 b", "'b' has no key"),
        ('partition-id = 0\nout-dir = "/x"  # private', "no spaces around '=', and of a TOML file its path"),
        ("/no/such/node.toml", r"/no/such/node.toml cannot be read \(FileNotFoundError\): expected a TOML file$"),
        ("a=[1]", "wrong key=value"),
    ],
)
def test_what_is_no_pair_is_refused_and_not_dropped(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_values(None, [given])


def test_a_models_keys_without_its_name_are_refused_since_flower_may_have_dropped_it() -> None:
    check_given({"model.name": "demo", "model.dtype": "bfloat16", "train.steps": 3})
    check_given({"train.steps": 3})
    with pytest.raises(ConfigError, match=r"model\.dtype is given and model\.name is not: of several -c .* keeps one"):
        check_given({"model.dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("surrogate", "trains_bottom", "is_trained", "num_kept"),
    [
        (Surrogate(kind="none"), False, False, 0),
        (Surrogate(kind="identity"), True, False, 0),
        (Surrogate(kind="blocks", layers=3), True, False, 3),
        (Surrogate(kind="distilled", layers=3), True, True, 3),
        (Surrogate(kind="matched"), True, False, 0),
        (Surrogate(kind="matched", distill=True), True, True, 0),
        (Surrogate(kind="blocks", distill=True), True, False, 2),
        (Surrogate(kind="exact"), True, False, 0),
    ],
)
def test_what_follows_from_a_surrogate(
    surrogate: Surrogate, trains_bottom: bool, is_trained: bool, num_kept: int
) -> None:
    found = (surrogate.trains_bottom, surrogate.is_trained, surrogate.num_kept)
    assert found == (trains_bottom, is_trained, num_kept)


def test_what_follows_from_a_model() -> None:
    names = {"demo": True, "/models/x": True, "~/x": True, "owner/model": False, "models/x/y": False}
    assert {name: Model(name=name).is_local for name in names} == names
    assert Model(dtype="float32").torch_dtype == torch.float32
    assert Model(dtype="bfloat16").torch_dtype == torch.bfloat16
