"""Every error fl-split raises on purpose.

    FLSplitError
    ├── ConfigError          a key, a value or a combination that cannot work; named as the user wrote it
    ├── SplitError           a model that cannot be split, or not where it was asked to be
    ├── DataError            private data that cannot be read; never quotes a row
    ├── SurrogateError       a fitted surrogate that is damaged, or of another trunk
    ├── WireError            a message whose bytes, shapes or dtypes do not fit
    ├── TrunkError           the trunk service
    │   ├── TrunkUnavailable     nobody answers, in spite of retries
    │   ├── TrunkMismatch        it serves another model, other layers or other weights
    │   └── TrunkRefused         it answered, and said no
    ├── TrainingError        a local round whose numbers are no longer finite
    ├── NodeStateError       what a node or a run left on disk does not fit this run
    ├── AggregationError     what nodes share cannot be combined
    └── RoundFailed          fewer nodes finished a round than the run asks for

Messages travel: Flower sends the text of a node's exception to the server. None may hold private data.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FLSplitError(Exception):
    """Root of every error that fl-split raises on purpose."""


class ConfigError(FLSplitError):
    """A key, a value or a combination of them that cannot work."""


class SplitError(FLSplitError):
    """A model that cannot be split, or not at the layers asked for."""


class DataError(FLSplitError):
    """Private data that cannot be read or used."""


class SurrogateError(FLSplitError):
    """A fitted surrogate that cannot be used with this model."""


class WireError(FLSplitError):
    """A message whose bytes, shapes or dtypes do not fit together."""


class TrunkError(FLSplitError):
    """Anything the trunk service is the cause of."""


class TrunkUnavailable(TrunkError):
    """No trunk answers at the address, in spite of retries."""


class TrunkMismatch(TrunkError):
    """The trunk serves another model, other layers or other weights than the node expects."""


class TrunkRefused(TrunkError):
    """The trunk answered a call with a refusal that asking again would not change."""


class TrainingError(FLSplitError):
    """A local round whose loss, gradient or weights are no longer finite."""


class NodeStateError(FLSplitError):
    """What a node or a run left on disk cannot be used by this run."""


class AggregationError(FLSplitError):
    """Arrays that nodes share do not belong together."""


class RoundFailed(FLSplitError):
    """Fewer nodes finished a round than ``aggregation.min-nodes``."""


def explain_invalid(error: "ValidationError", see: str, known: Iterable[str] = ()) -> str:
    """Say what is wrong with a configuration: a line for each key, as the user wrote it.

    Args:
        error: Of the whole configuration.
        see: Where its keys are listed.
        known: Its keys: the nearest one is named where there is none of a name.
    """
    lines, keys = [], list(known)
    for each in error.errors():
        key, text = ".".join(str(part) for part in each["loc"]), each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            near = get_close_matches(key, keys, 1)
            lines.append(f"  {key}: no such key; {f'did you mean {near[0]}? ' if near else ''}see {see}")
        elif each["type"] == "value_error":  # a combination: its input is a whole section
            lines.append(f"  {key}: {text}" if key else f"  {text}")
        else:
            lines.append(f"  {key}={each['input']!r}: {text[0].lower()}{text[1:]}" if key else f"  {text}")
    return "\n".join(lines)
