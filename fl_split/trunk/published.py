"""The fitted surrogate that a trunk publishes, and the node's way to it: fetched once, checked, cached.

It was fitted to public text by the trunk's owner; fetching it tells the trunk nothing but that a node wants it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fl_split.errors import SurrogateError
from fl_split.model.surrogate import check_card, read_card
from fl_split.proto import trunk_pb2 as pb

_PIECE_BYTES = 2**20


class NothingPublished(Exception):
    """A node asks for a surrogate, and there is none."""


class Published:
    """The trunk's side: a file, in memory, and its digest in the trunk's description."""

    def __init__(self, file: str, description: pb.DescribeReply) -> None:
        """Read the file, if one is named, and note it in `description`.

        Raises:
            SurrogateError: It is no fitted surrogate, or one of another trunk.
        """
        self._data = b""
        if not file:
            return
        path = Path(file).expanduser()
        check_card(
            read_card(path),
            config_digest=description.config_digest,
            weights_digest=description.weights_digest,
            first=description.first_layer,
            end=description.end_layer,
        )
        self._data = path.read_bytes()
        description.surrogate_digest = hashlib.sha256(self._data).digest()
        description.surrogate_bytes = len(self._data)

    def piece(self, offset: int) -> bytes:
        """Up to 1 MiB from `offset` on.

        Raises:
            NothingPublished: There is no file.
        """
        if not self._data:
            raise NothingPublished
        return self._data[offset : offset + _PIECE_BYTES]


def fetch(description: pb.DescribeReply, piece: Callable[[int], bytes], cache: Path) -> Path:
    """The node's side: the published file, from `cache` or fetched into it.

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
