"""Freed memory that C's allocator holds on to, and how to make it let go.

An aligned request, as all of torch's are, does not fit the hole that a tensor of its own size left on glibc's heap. So
temporaries that were freed between tensors that live leave holes that nothing fills.
"""

import ctypes
import sys
from functools import cache
from typing import Any


def give_back_freed() -> None:
    """Return every whole page of freed memory to the system; nothing where there is no glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None
