"""A private row, and where a person finds it: what all readers yield, whatever they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MALFORMED = "malformed"
NOT_UTF8 = "not in UTF-8"

Say = Callable[[str], None]  # takes what a reader has to tell of a file: names and numbers, never content


@dataclass(frozen=True)
class Row:
    """One row; an error may hold its place, and never its values."""

    place: str  # such as "notes.jsonl line 7"
    values: dict[str, Any] | None  # None: it cannot be used
    fault: str = MALFORMED  # why


def kind_of(value: object) -> str:
    """What a value is, in a person's words."""
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
