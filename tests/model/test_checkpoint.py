"""Each party fetches and reads only the files that hold weights of its own part."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from families import CLASSIFIERS, DECODERS, LABELS, Family
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file

from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import ConfigError, SplitError
from fl_split.model.checkpoint import node_needs, read_config, resolve_model, trunk_needs, weights_digest
from fl_split.model.ends import load_ends
from fl_split.model.loading import INDEX, WHOLE
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.tools.doctor import diagnose

Hub = Callable[[Path, Path], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """`hub(repo, cache)`: from now on the hub is a folder, and what is fetched from it is copied to another."""

    def open_hub(repo: Path, cache: Path) -> None:
        def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
            cache.mkdir(exist_ok=True)
            for file in repo.iterdir():
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, cache / file.name)
            return str(cache)

        monkeypatch.setattr("fl_split.model.checkpoint.snapshot_download", download)

    return open_hub


def in_shards(family: Family, folder: Path) -> Path:
    """A checkpoint with about a layer a file."""
    family.save(folder / "once")
    model = family.auto.from_pretrained(folder / "once")
    model.save_pretrained(folder / "repo", max_shard_size="20KB")
    return folder / "repo"


def layers_in(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys |= set(tensors.keys())
    return keys


@pytest.mark.parametrize(("name", "classifier"), [("llama", False), ("gpt2", False), ("mpnet", True), ("bert", True)])
def test_parties_fetch_and_read_their_own_files_and_equal_the_full_model(
    tmp_path: Path, hub: Hub, name: str, classifier: bool
) -> None:
    family = next(f for f in (CLASSIFIERS if classifier else DECODERS) if f.name == name)
    repo = in_shards(family, tmp_path)
    num_files = len(list(repo.glob("*.safetensors")))
    assert num_files > 6

    hub(repo, tmp_path / "trunk")
    folder = resolve_model("owner/model", "", trunk_needs(1, 2))
    assert folder == tmp_path / "trunk" and len(list(folder.glob("*.safetensors"))) < num_files
    trunk = load_trunk(folder, 1, 2)
    layers = {"llama": "layers", "gpt2": "h"}.get(name, "layer")
    assert weights_digest(folder, layers, range(1, 4)) == weights_digest(repo, layers, range(1, 4)) is not None

    hub(repo, tmp_path / "node")
    folder = resolve_model("owner/model", "main", node_needs(1, 2, "blocks", 1))
    assert len(list(folder.glob("*.safetensors"))) < num_files
    weight_map = json.loads((repo / INDEX).read_text())["weight_map"]
    own = {file for key, file in weight_map.items() if not any(f"{layers}.{i}." in key for i in (2, 3))}
    assert {file.name for file in folder.glob("*.safetensors")} == own
    assert weights_digest(folder, layers, range(1, 4)) is None  # it cannot check what it does not have
    labels = LABELS if classifier else ()
    client = load_ends(folder, 1, 2, LocalTrunk(trunk), surrogate="blocks", surrogate_layers=1, labels=labels)
    assert client.name_or_path == str(folder)

    ids = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        full = family.auto.from_pretrained(repo).eval()
        assert torch.equal(client(input_ids=ids).logits, full(input_ids=ids).logits)
    with pytest.raises(SplitError, match="lacks weights"):
        load_ends(folder, 3, 1, LocalTrunk(trunk), surrogate="none", labels=labels)  # more than was fetched for


def test_whole_checkpoint_is_fetched_for_those_who_need_it_and_where_it_is_one_file(tmp_path: Path, hub: Hub) -> None:
    llama = next(f for f in DECODERS if f.name == "llama")
    repo = in_shards(llama, tmp_path)
    hub(repo, tmp_path / "all")
    assert layers_in(resolve_model("owner/model", "")) == layers_in(repo)
    hub(tmp_path / "once", tmp_path / "single")
    assert layers_in(resolve_model("owner/model", "", trunk_needs(1, 2))) == layers_in(repo)


def test_a_streamed_surrogate_needs_the_trunks_files_as_well(tmp_path: Path, hub: Hub) -> None:
    repo = in_shards(next(f for f in DECODERS if f.name == "llama"), tmp_path)
    hub(repo, tmp_path / "node")
    folder = resolve_model("owner/model", "", node_needs(1, 2, "identity", 1))
    trunk = LocalTrunk(load_trunk(repo, 1, 2))
    with pytest.raises(SplitError, match=r"lacks \d+ files of them, such as model-.*: fetch the whole checkpoint"):
        load_ends(folder, 1, 2, trunk, surrogate="streamed")
    keys = {"model.name": str(folder), "split.bottom-layers": 1, "run.dir": str(tmp_path)}
    config = RunConfig.from_flat({**keys, "surrogate.kind": "streamed"})
    model = next(check for check in diagnose(config, NodeConfig()) if check.name == "model")
    assert model.status == "fail" and "lacks the trunk's layers, which surrogate.kind='streamed' reads" in model.text
    assert layers_in(resolve_model("owner/model", "", node_needs(1, 2, "streamed", 1))) == layers_in(repo)
    load_ends(folder, 1, 2, trunk, surrogate="streamed")


def test_doctor_fetches_what_the_node_needs_and_no_more(tmp_path: Path, hub: Hub) -> None:
    repo = in_shards(next(f for f in DECODERS if f.name == "llama"), tmp_path)
    hub(repo, tmp_path / "node")
    keys = {"model.name": "owner/model", "split.bottom-layers": 1, "surrogate.layers": 1, "run.dir": str(tmp_path)}
    model = next(check for check in diagnose(RunConfig.from_flat(keys), NodeConfig()) if check.name == "model")
    assert model.status == "pass", model.text
    hub(repo, tmp_path / "needed")
    needed = layers_in(resolve_model("owner/model", "", node_needs(1, 2, "blocks", 1)))
    assert layers_in(tmp_path / "node") == needed < layers_in(repo)


def refused(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    """As the hub's client raises it."""
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("owner/model", LocalEntryNotFoundError("offline"), "could not be fetched .* the hub does not answer and this"),
        ("owner/model", OfflineModeIsEnabled("offline"), "could not be fetched .* the hub does not answer and this"),
        ("owner/model", refused(RepositoryNotFoundError), "there is no such model, or it is private: check model.name"),
        ("owner/model", refused(GatedRepoError), "accept its terms on its page, and set HF_TOKEN"),
        ("owner/model", refused(RevisionNotFoundError), "it has no such revision: check model.revision"),
        ("owner/model", OSError("?"), "could not be fetched .* OSError; check the id and the network"),
        ("a/b/c", None, "neither 'demo', nor an absolute"),
        ("/nowhere", None, "there is no such folder"),
    ],
)
def test_models_that_cannot_be_had_are_refused(
    name: str, error: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error  # type: ignore[misc]

    if error is not None:
        monkeypatch.setattr("fl_split.model.checkpoint.snapshot_download", fail)
    with pytest.raises(ConfigError, match=message):
        resolve_model(name, "")


def test_a_configuration_that_the_hub_does_not_give_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("as transformers says it") from LocalEntryNotFoundError("offline")

    monkeypatch.setattr("fl_split.model.checkpoint.AutoConfig.from_pretrained", fail)
    with pytest.raises(ConfigError, match="no configuration can be read; the hub does not answer and this machine"):
        read_config("owner/model")


def test_weights_that_may_not_be_read_are_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
        file.symlink_to(tmp_path / "nothing")  # which nobody may read
    with pytest.raises(SplitError, match=r"this account may not read model\.safetensors: give it the right to"):
        load_trunk(folder, 2, 2)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small model's folder, to be spoilt."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def test_other_files_beside_a_checkpoint_are_none_of_it(copy: Path) -> None:
    """Mistral's folders have the same weights twice, by other names; else two parties would hold different models."""
    expected = weights_digest(copy, "layers", range(2))
    save_file(
        {f"layers.{i}.attention.wq.weight": torch.zeros(4, 4) for i in range(6)}, copy / "consolidated.safetensors"
    )
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.layers.0.x.weight": "gone-1-of-1.safetensors"}}))
    assert weights_digest(copy, "layers", range(2)) == expected is not None
    load_ends(copy, 2, 2, LocalTrunk(load_trunk(copy, 2, 2)))


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", "{}", "[]"])
def test_an_index_that_says_nothing_is_refused(copy: Path, text: str) -> None:
    (copy / WHOLE).unlink()
    (copy / INDEX).write_text(text)
    with pytest.raises(SplitError, match=r"index\.json does not say which file holds which weight .*: fetch it again"):
        load_ends(copy, 2, 2, LocalTrunk(load_trunk(copy, 2, 2)))


@pytest.mark.parametrize("size", [0, 40, 9000])
def test_weights_that_break_off_are_refused_by_both_parties(copy: Path, size: int) -> None:
    (copy / WHOLE).write_bytes((copy / WHOLE).read_bytes()[:size])
    with pytest.raises(SplitError, match="a safetensors file in it is not complete: fetch it again"):
        load_trunk(copy, 2, 2)
    with pytest.raises(SplitError, match="a safetensors file in it is not complete: fetch it again"):
        load_ends(copy, 2, 2, lambda *_: None)  # type: ignore[arg-type]


def test_shards_without_an_index_fail_in_doctor_as_in_the_run(demo_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    (folder / WHOLE).rename(folder / "model-00001-of-00001.safetensors")
    config = RunConfig.from_flat({"model.name": str(folder), "surrogate.kind": "none"})
    found = {check.name: check for check in diagnose(config, NodeConfig())}["model"]
    assert found.status == "fail" and f"has neither {WHOLE} nor {INDEX}" in found.text


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_in_the_place_of_a_model_is_refused(copy: Path, alone: bool, hub: Hub, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    if alone:
        (copy / "config.json").unlink()
    for name in (str(copy), "owner/model"):
        hub(copy, tmp_path / "cache")
        with pytest.raises(ConfigError, match="holds a PEFT adapter .*: give the base model, or take the adapter out"):
            resolve_model(name, "")


def test_code_that_a_model_brings_along_is_neither_run_nor_asked_about(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    (copy / "config.json").write_text(json.dumps(about))
    (copy / "configuration_x.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(
        ConfigError, match="of a type that this version of transformers knows: code that a model brings"
    ):
        read_config(str(copy))
