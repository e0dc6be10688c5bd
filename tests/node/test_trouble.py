"""Four ways not to reach a trunk have four messages; the texts of gRPC are those that version 1.8x gives."""

from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fl_split.errors import TrunkUnavailable
from fl_split.node.replicas import Credentials
from fl_split.node.trouble import explain
from fl_split.tools.watch import describe, ping

LOST = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        (
            LOST,
            "errors resolving x.invalid:9470: [hostname lookup error: Domain name not found]",
            "the name 'x.invalid'",
        ),
        (LOST, "last error: ipv4:1.2.3.4:1: Failed to connect to remote host: Connection refused", "nothing listens"),
        (
            LOST,
            "Tls handshake failed: CERTIFICATE_VERIFY_FAILED: unable to get local issuer: OK",
            "(unable to get local",
        ),
        (LOST, "Tls handshake failed (X): SSL_ERROR_SSL: WRONG_VERSION_NUMBER: Invalid", "it speaks no TLS"),
        (LOST, "ipv4:127.0.0.1:8000: Cannot check peer: missing selected ALPN property.", "perhaps the SuperLink"),
        (
            LOST,
            "Failed parsing HTTP/2 (Trying to connect an http1.x server (HTTP status 400))",
            "perhaps the SuperLink",
        ),
        (LOST, "Ssl handshake failed: TSI_PROTOCOL_FAILURE", "trunk-cert and trunk-key"),
        (LOST, "last error: UNAVAILABLE: ipv4:127.0.0.1:29471: Socket closed", "wants TLS"),
        (LOST, "last error: Timeout occurred: FD Shutdown", "a firewall may be in between"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "a firewall may be in between"),
        (grpc.StatusCode.UNAUTHENTICATED, "this trunk needs a token", "fl-split trunk token add"),
    ],
)
def test_each_cause_has_its_own_words(code: grpc.StatusCode, details: str, message: str) -> None:
    error: Any = SimpleNamespace(code=lambda: code, details=lambda: details)
    assert message in explain(error, "x.invalid:9470")


@pytest.mark.parametrize("look", [ping, describe])
def test_ping_and_describe_tell_a_wrong_name_from_a_closed_port(look: Any) -> None:
    for address, message in (("127.0.0.1:9", "nothing listens"), ("no-such-host.invalid:9470", "is not known")):
        with pytest.raises(TrunkUnavailable, match=message):
            look(address, Credentials(allow_plaintext=True), 5.0)
