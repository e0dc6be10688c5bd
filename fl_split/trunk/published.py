"""The fitted surrogate that a trunk publishes, given out in pieces.

It was fitted to public text by the trunk's owner; fetching it tells the trunk nothing but that a node wants it.
"""

import hashlib
from pathlib import Path

from fl_split.model.thin import check_card, read_card
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
