"""Where the base model's files are, and digests by which two parties see that they hold the same model.

From the hub a party fetches only the files that hold weights of its own part.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PretrainedConfig

from fl_split import demo
from fl_split.config import KindOrAuto, is_local_model
from fl_split.errors import ConfigError, SplitError
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries, file_of_weights, layer_of, weight_files
from fl_split.model.surrogate import kept_layers

_ABOUT = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, index
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
_SAMPLED_ROWS = 16

Needs = Callable[[str], bool]  # whether a party needs a weight, by its name in the checkpoint
Place = tuple[Path, str]  # a file of a checkpoint, and a weight's name in it


def node_needs(
    bottom_layers: int, top_layers: int, surrogate: KindOrAuto, layers: int
) -> Callable[[PretrainedConfig], Needs]:
    """What a node needs of a checkpoint: its ends, all that lies outside the layers, and its surrogate's layers."""

    def needs(config: PretrainedConfig) -> Needs:
        cut = Boundaries.of(examine(config, AutoModel), bottom_layers, top_layers)
        kept = cut.trunk if surrogate == "streamed" else kept_layers(surrogate, layers, cut.first, cut.end)
        held = {*cut.bottom, *cut.top, *kept}
        return lambda key: (layer := layer_of(key, cut.layers_name)) is None or layer in held

    return needs


def trunk_needs(bottom_layers: int, top_layers: int) -> Callable[[PretrainedConfig], Needs]:
    """What a trunk needs of a checkpoint: its layers, and the few weights that all layers use."""

    def needs(config: PretrainedConfig) -> Needs:
        anatomy = examine(config, AutoModel)
        cut = Boundaries.of(anatomy, bottom_layers, top_layers)

        def needed(key: str) -> bool:
            layer = layer_of(key, cut.layers_name)
            return key.endswith(anatomy.common) if layer is None else layer in cut.trunk

        return needed

    return needs


def resolve_model(name: str, revision: str, needs: Callable[[PretrainedConfig], Needs] | None = None) -> Path:
    """Find the folder of a base model, fetching it if need be.

    Args:
        name: ``demo``, an absolute or ``~`` path, or a Hugging Face model id.
        revision: Branch, tag or commit on the hub; "" for the default one.
        needs: From `node_needs` or `trunk_needs`: of a checkpoint in several files only those with such weights are
            fetched. Without it, all.

    Raises:
        ConfigError: There is no such model; names the key to change.
    """
    if name == "demo":
        return demo.model_folder()
    if is_local_model(name):
        folder = Path(name).expanduser()
        _check_no_adapter(name, folder)
        if not (folder / "config.json").is_file():
            found = "no config.json in this folder" if folder.is_dir() else "there is no such folder"
            raise ConfigError(f"model.name={name!r}: {found}; expected a Hugging Face model folder")
        return folder
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_ABOUT)))
        _check_no_adapter(name, folder)
        weights = _files_needed(folder, needs)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*_ABOUT, *weights]))
    except HFValidationError as error:
        raise ConfigError(
            f"model.name={name!r} is neither 'demo', nor an absolute or ~ path, nor a Hugging Face id (owner/name); "
            "relative paths are not taken, since Flower runs the app in a folder of its own"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.name={name!r} (revision {revision or 'default'}) could not be fetched from the Hugging Face hub: "
            f"{_of_hub(error)}"
        ) from error


def _check_no_adapter(name: str, folder: Path) -> None:
    """Refuse what transformers would load a second model for, or put into the base that all parties agree on."""
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model.name={name!r} holds a PEFT adapter (adapter_config.json), which would be loaded with the model: "
            "give the base model, or take the adapter out, or save what its merge_and_unload() makes of both"
        )


def _of_hub(error: BaseException) -> str:
    """Say what the hub, or the way to it, did not give, and the remedy; by the innermost error that tells."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(GatedRepoError):
        return "its owner gives it to named accounts only: accept its terms on its page, and set HF_TOKEN"
    if among(RevisionNotFoundError):
        return "it has no such revision: check model.revision"
    if among(RepositoryNotFoundError):
        return "there is no such model, or it is private: check model.name, and set HF_TOKEN if it is private"
    if among(LocalEntryNotFoundError, OfflineModeIsEnabled):
        return (
            "the hub does not answer and this machine's cache has no copy: check network, proxy, HF_ENDPOINT and "
            "HF_HUB_OFFLINE; or bring the model's folder here, and give its path"
        )
    return f"{type(error).__name__}; check the id and the network, or give the path of a local folder"


def read_config(name: str, revision: str = "") -> PretrainedConfig:
    """A model's configuration, without its weights.

    Args:
        name: As `model.name`.
        revision: As `model.revision`.

    Raises:
        ConfigError: There is none.
    """
    try:
        place = resolve_model(name, "") if is_local_model(name) else name
        config: PretrainedConfig = AutoConfig.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False
        )
        return config
    except (OSError, ValueError) as error:
        if not is_local_model(name) and isinstance(error, OSError):
            raise ConfigError(
                f"model.name={name!r} (revision {revision or 'default'}): no configuration can be read; "
                f"{_of_hub(error)}"
            ) from error
        raise ConfigError(
            f"model.name={name!r} (revision {revision or 'default'}): no configuration can be read "
            f"({type(error).__name__}); expected 'demo', an absolute or ~ path, or a Hugging Face id, of a type that "
            "this version of transformers knows: code that a model brings along is not run"
        ) from error


def config_digest(config: PretrainedConfig) -> str:
    """SHA-256 (hex) over what defines the model, without versions, paths and dtypes."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(folder: Path, layers_name: str, layers: range) -> str | None:
    """SHA-256 (hex) over a sample of some layers' weights in a checkpoint, without loading them.

    The sample is up to 16 evenly spaced rows of each tensor, rounded to bf16, so that it takes a moment for any
    size and does not depend on the dtype of the file. It tells a wrong checkpoint, not a malicious one.

    Args:
        folder: The checkpoint (safetensors).
        layers_name: Last component of the layers' path, such as ``layers`` or ``h``.
        layers: Indices in the full model.

    Returns:
        None if the checkpoint's files for these layers are not here.
    """
    if missing_files(folder, layers_name, layers):  # a digest of what is here would be another one
        return None
    digest, seen = hashlib.sha256(), set()
    for (layer, name), (file, key) in sorted(layer_places(folder, layers_name, layers).items()):
        seen.add(layer)
        with safe_open(file, "pt") as tensors:
            rows = tensors.get_slice(key)
            shape = rows.get_shape()
            step = max(1, shape[0] // _SAMPLED_ROWS)
            digest.update(f"{layer}.{name}{shape}".encode())
            for i in range(0, shape[0], step) if len(shape) > 1 else [slice(None)]:
                sample: torch.Tensor = rows[i]
                digest.update(sample.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if seen == set(layers) else None


def missing_files(folder: Path, layers_name: str, layers: range) -> list[str]:
    """Names of the checkpoint's files that hold weights of these layers and are not here."""
    needed = {file for key, file in file_of_weights(folder).items() if layer_of(key, layers_name) in layers}
    return sorted(file for file in needed if not (folder / file).is_file())


def layer_places(folder: Path, layers_name: str, layers: range) -> dict[tuple[int, str], Place]:
    """Where the weights of some layers lie, by layer and by name in it.

    Raises:
        SplitError: A file is damaged.
    """
    pattern = re.compile(rf"(?:^|\.){re.escape(layers_name)}\.(\d+)\.(.+)$")
    places: dict[tuple[int, str], Place] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    if (match := pattern.search(key)) and int(match[1]) in layers:
                        places[int(match[1]), match[2]] = (file, key)
        except SafetensorError as error:
            raise SplitError(f"{file} is not a complete safetensors file: fetch it again") from error
    return places


def _files_needed(folder: Path, needs: Callable[[PretrainedConfig], Needs] | None) -> list[str]:
    """Name the files with needed weights, or give a pattern; all else of the checkpoint is in `folder` already."""
    files = file_of_weights(folder)
    if needs is None or not files:
        return ["*.safetensors"]
    needed = needs(AutoConfig.from_pretrained(folder))
    return sorted({file for key, file in files.items() if needed(key)})
