"""A fitted surrogate comes whole or not at all."""

from pathlib import Path

import pytest

from fl_split.errors import SurrogateError, TrunkUnavailable
from fl_split.node.surrogate_file import fetch_published
from fl_split.proto import trunk_pb2 as pb


@pytest.mark.parametrize("failure", [TrunkUnavailable("gone"), None])
def test_a_surrogate_that_does_not_come_whole_leaves_nothing_behind(tmp_path: Path, failure: Exception | None) -> None:
    about = pb.DescribeReply(surrogate_digest=b"x" * 32, surrogate_bytes=10)

    def piece(offset: int) -> bytes:
        if failure is not None and offset:
            raise failure
        return b"12345"

    with pytest.raises(TrunkUnavailable if failure else SurrogateError, match="gone" if failure else "came damaged"):
        fetch_published(about, piece, tmp_path)
    assert not list(tmp_path.iterdir())
