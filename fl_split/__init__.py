"""Institutions fine-tune one language model together; data, labels and gradients stay where they are."""

__version__ = "0.1.0"
__all__ = ["__version__"]
