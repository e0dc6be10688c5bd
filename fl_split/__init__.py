"""Institutions fine-tune one language model together; data, labels and gradients stay where they are.

The names in `__all__` are for users' own code: docs/api.md says what each is. They load when they are first used, since
torch and transformers take seconds. All else may change from version to version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_split.config import Lora
    from fl_split.errors import FLSplitError
    from fl_split.model.adapters import attach, export
    from fl_split.model.ends import load_ends
    from fl_split.model.slots import Trunk
    from fl_split.model.trunk import LocalTrunk, load_trunk
    from fl_split.node.expected import Expected
    from fl_split.node.replicas import Credentials
    from fl_split.node.trunk_connection import TrunkConnection

__version__ = "0.1.0"
__all__ = [
    "Credentials",
    "Expected",
    "FLSplitError",
    "LocalTrunk",
    "Lora",
    "Trunk",
    "TrunkConnection",
    "__version__",
    "attach",
    "export",
    "load_ends",
    "load_trunk",
]

_WHERE = {
    "Credentials": "fl_split.node.replicas",
    "Expected": "fl_split.node.expected",
    "FLSplitError": "fl_split.errors",
    "LocalTrunk": "fl_split.model.trunk",
    "Lora": "fl_split.config",
    "Trunk": "fl_split.model.slots",
    "TrunkConnection": "fl_split.node.trunk_connection",
    "attach": "fl_split.model.adapters",
    "export": "fl_split.model.adapters",
    "load_ends": "fl_split.model.ends",
    "load_trunk": "fl_split.model.trunk",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"fl_split has no {name!r}: expected one of {', '.join(__all__)}, or a module of it")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
