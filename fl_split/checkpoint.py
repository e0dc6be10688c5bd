"""Where the base model's files are, and digests by which two parties see that they hold the same model."""

import hashlib
import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from fl_split import demo
from fl_split.errors import ConfigError, SplitError

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
_SAMPLED_ROWS = 16


def resolve_model(name: str, revision: str) -> Path:
    """Find the folder of a base model, fetching it if need be.

    Args:
        name: ``demo``, an absolute or ``~`` path, or a Hugging Face model id.
        revision: Branch, tag or commit on the hub; "" for the default one.

    Raises:
        ConfigError: There is no such model; names the key to change.
    """
    if name == "demo":
        return demo.model_folder()
    if name.startswith(("/", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name={name!r}: no config.json in this folder; expected a Hugging Face model folder"
            )
        return folder
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise ConfigError(
            f"model.name={name!r} is neither 'demo', nor an absolute or ~ path, nor a Hugging Face id (owner/name); "
            "relative paths are not taken, since Flower runs the app in a folder of its own"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.name={name!r} (revision {revision or 'default'}) could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}; check the id and the network, or give the path of a local folder"
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
    pattern = re.compile(rf"(?:^|\.){re.escape(layers_name)}\.(\d+)\.(.+)$")
    digest, seen = hashlib.sha256(), set()
    places: dict[tuple[int, str], tuple[Path, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    if (match := pattern.search(key)) and int(match[1]) in layers:
                        places[int(match[1]), match[2]] = (file, key)
        except SafetensorError as error:
            raise SplitError(f"{file} is not a complete safetensors file: fetch it again") from error
    for (layer, name), (file, key) in sorted(places.items()):
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
