"""Institutions fine-tune one language model together; data, labels and gradients stay where they are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_split.node.replicas import Credentials
    from fl_split.node.tuned import load_tuned

__version__ = "0.1.0"
__all__ = ["Credentials", "__version__", "load_tuned"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import fl_split` stays light."""
    if name == "Credentials":
        from fl_split.node.replicas import Credentials

        return Credentials
    if name == "load_tuned":
        from fl_split.node.tuned import load_tuned

        return load_tuned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
