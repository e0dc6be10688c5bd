"""Keys and values as people give them to `flwr run`: flat, from TOML files and ``key=value`` strings."""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_split.errors import ConfigError

KEYS = "the table of keys in docs/configuration.md"

_PAIR = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")  # as Flower finds them
_QUOTES = "strings need quotes, as in 'run.name=\"mine\"'"

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*", re.IGNORECASE)

Scalar = str | int | float | bool


def num_bytes(size: str) -> int:
    """Bytes of a size such as ``4GB`` or ``512 MiB``.

    Raises:
        ValueError: It is no size.
    """
    match = _SIZE.fullmatch(size)
    count = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    if not math.isfinite(count):
        raise ValueError(f"expected a number and MB, GB, MiB or GiB, such as '4GB', not {size!r}")
    return int(count)


def read_values(file: Path | None, overrides: list[str]) -> dict[str, Scalar]:
    """Flat keys and values as `flwr run -c` takes them: from a TOML file, then from ``key=value`` strings.

    They are merged key by key: `flwr run` itself keeps only the last ``-c`` of each table.

    Raises:
        ConfigError: There is no such file, or something cannot be parsed.
    """
    values = _read_file(file) if file else {}
    for given in overrides:
        values |= _read_file(Path(given)) if given.endswith(".toml") else _read_pairs(given)
    return values


def _read_file(file: Path) -> dict[str, Scalar]:
    try:
        return _flatten(tomllib.loads(file.expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}): expected a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as TOML ({type(error).__name__}): {_QUOTES}") from None


def _read_pairs(given: str) -> dict[str, Scalar]:
    pairs = _PAIR.findall(given)
    left = _PAIR.sub("", given).split()
    if left:
        spaced = "; no spaces around '=', and of a TOML file its path, not what is in it" if "=" in left else ""
        raise ConfigError(f"wrong key=value: {left[0]!r} has no key or no value; {_QUOTES}{spaced}")
    try:
        return _flatten(tomllib.loads("\n".join(f"{key} = {value}" for key, value in pairs)))
    except ValueError as error:
        raise ConfigError(f"wrong key=value ({type(error).__name__}): {_QUOTES}") from None


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            flat[f"{prefix}{key}"] = value
        else:
            raise ValueError(key)
    return flat


def check_given(given: Mapping[str, Scalar]) -> None:
    """Refuse what two ``-c`` of `flwr run` become, where that can be seen: the demo's model under another's keys.

    Args:
        given: What Flower has kept of the keys that a person gave.

    Raises:
        ConfigError: Keys of ``model`` without its name.
    """
    keys = [key for key in given if key.startswith("model.")]
    if keys and "model.name" not in given:
        raise ConfigError(
            f"{keys[0]} is given and model.name is not: of several -c with keys of one table, 'flwr run' keeps one and "
            "drops the others. Put all pairs into one -c '...'; for the demo's model, add model.name=\"demo\""
        )
