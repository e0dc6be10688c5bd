"""What a call to the trunk can end in: lost, to be made again, or an error of ours for gRPC's."""

import grpc

from fl_split import wire
from fl_split.errors import TrunkError, TrunkMismatch, TrunkRefused, TrunkUnavailable
from fl_split.node.trouble import explain

_Code = grpc.StatusCode
LOST = {_Code.UNAVAILABLE, _Code.ABORTED, _Code.CANCELLED}


class _Found(grpc.RpcError):  # type: ignore[misc]
    """An error in gRPC's words that the node finds out itself."""

    status, text = _Code.UNAVAILABLE, ""

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.text

    def trailing_metadata(self) -> tuple[()]:
        return ()


class AnotherTrunk(_Found):
    """A reply of a trunk that was not checked (one name may stand for several): as good as lost."""

    status, text = _Code.ABORTED, "a reply of another trunk"


class NoHandshake(_Found):
    """A replica whose certificate cannot be looked at: as good as lost."""

    def __init__(self, cause: BaseException | None) -> None:
        self.text = f"{cause}" if isinstance(cause, OSError) else "handshake"


class LateReply(_Found):
    """A reply that did not come in time."""

    status = _Code.DEADLINE_EXCEEDED


def translate(error: grpc.RpcError, address: str, call: str, trunk: str, timeout_s: float) -> TrunkError:
    """Make an error of ours from gRPC's; this is the one place that does.

    Args:
        error: gRPC's.
        address: Of the replica that was called.
        call: Its number, as it stands in the trunk's log.
        trunk: All addresses of the trunk.
        timeout_s: Seconds that the call could take.
    """
    code = error.code()
    if isinstance(error, AnotherTrunk):
        return TrunkMismatch(
            f"replies at {address} come from another trunk than the one that answered Describe: start all replicas "
            "behind this name with the same [model]"
        )
    if code in LOST:
        return TrunkUnavailable(f"no trunk answers at {trunk} (tried for {timeout_s:.0f} s): {explain(error, address)}")
    if code is _Code.UNAUTHENTICATED:
        return TrunkRefused(f"the trunk at {address}: {explain(error, address)}")
    if code is _Code.DEADLINE_EXCEEDED:
        return TrunkUnavailable(
            f"the trunk at {address} did not answer within trunk.timeout-s={timeout_s:g}: it is "
            "overloaded or far away; raise trunk.timeout-s or send less at once (train.batch-size)"
        )
    if code is _Code.RESOURCE_EXHAUSTED and wire.PUSHBACK in dict(error.trailing_metadata() or ()):
        return TrunkUnavailable(
            f"the trunk at {address} had no room for trunk.timeout-s={timeout_s:g}: it is overloaded; raise "
            "trunk.timeout-s, or add replicas"
        )
    if code is _Code.UNIMPLEMENTED:
        return TrunkRefused(
            f"the trunk at {address} does not offer exact gradients: its operator has to start it with "
            "server.exact-gradient=true; or use another surrogate.kind"
        )
    return TrunkRefused(f"the trunk at {address} refused call {call} ({code.name}): {error.details()}")
