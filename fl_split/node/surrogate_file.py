"""The fitted surrogate that a trunk publishes, fetched once and kept under its digest."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fl_split.errors import SurrogateError
from fl_split.proto import trunk_pb2 as pb


def fetch_published(description: pb.DescribeReply, piece: Callable[[int], bytes], cache: Path) -> Path:
    """Find the published file in `cache`, or fetch it into that.

    Args:
        description: What the trunk says of itself.
        piece: Fetches the bytes from an offset on; empty at the end.
        cache: Folder of files named by their digest.

    Raises:
        SurrogateError: None is published, or what came is not what was announced.
    """
    if not description.surrogate_digest:
        raise SurrogateError(
            "surrogate.kind='matched' needs a surrogate that the trunk publishes, and this trunk publishes none: its "
            "owner can fit one with 'fl-split surrogate fit'; until then use surrogate.kind='blocks'"
        )
    target = cache / f"{description.surrogate_digest.hex()}.safetensors"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    file = tempfile.NamedTemporaryFile(dir=cache, delete=False)
    try:
        with file:
            while file.tell() < description.surrogate_bytes and (data := piece(file.tell())):
                digest.update(data)
                file.write(data)
        if digest.digest() != description.surrogate_digest:
            raise SurrogateError("the trunk's surrogate came damaged: its digest is not the announced one; try again")
        os.replace(file.name, target)
    except BaseException:
        os.unlink(file.name)
        raise
    return target
