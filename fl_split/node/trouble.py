"""Why a trunk cannot be reached, in words: a wrong name, a closed port, TLS and a token have different remedies."""

import re

import grpc

from fl_split.errors import TrunkUnavailable

_Code = grpc.StatusCode
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([\w ]+)")


def unavailable(address: str, error: grpc.RpcError) -> TrunkUnavailable:
    """The error of a trunk that did not answer a question."""
    return TrunkUnavailable(f"no trunk answers at {address} ({error.code().name}): {explain(error, address)}")


def explain(error: grpc.RpcError, address: str) -> str:
    """Say what keeps a caller from a trunk, and what whoever reads it can do; an institution cannot start a trunk.

    Args:
        error: gRPC's.
        address: What was called, ``host:port``.
    """
    code, details = error.code(), error.details() or ""
    host = address.rpartition(":")[0]
    if code in (_Code.UNAUTHENTICATED, _Code.PERMISSION_DENIED):
        return (
            f"it does not let this caller in ({code.name}: {details}): an institution checks trunk-token-file "
            "(--token-file) and asks the operator for a new one, which 'fl-split trunk token add' makes"
        )
    if re.search(r"lookup|resol|domain name|name or service", details, re.IGNORECASE):
        return (
            f"the name {host!r} is not known: check trunk-address in node-config, and trunk.address of the run, for a "
            "wrong letter, and that this machine's DNS knows the name"
        )
    if found := re.search(r"certificate (has expired|is not yet valid)", details):
        return (
            f"TLS handshake failed, its certificate {found[1]} by this machine's clock: if the clock is right, the "
            "operator makes a new one with 'fl-split keys server'"
        )
    if found := _CERTIFICATE.search(details):
        return (
            f"TLS handshake failed, its certificate is not accepted ({found[1].strip()}): check trunk-ca (--ca), which "
            f"is the operator's ca.crt, and that the certificate names {host!r} ('fl-split keys server ... --host')"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return "TLS handshake failed, it speaks no TLS: check the address, or leave trunk-ca and trunk-cert out"
    if re.search(r"ALPN|http1|parsing HTTP/2", details):
        return "something else than a trunk listens on this port, perhaps the SuperLink: check trunk-address"
    if re.search(r"handshake|ssl|tls", details, re.IGNORECASE):
        return "TLS handshake failed: check trunk-ca, trunk-cert and trunk-key (--ca, --cert, --key)"
    if re.search(r"socket closed|reset", details, re.IGNORECASE):
        return (
            "it closed the connection: it was stopped just now, or it wants TLS: set trunk-ca (--ca) to the operator's "
            "ca.crt"
        )
    if "refused" in details.lower():
        return (
            f"nothing listens on this port of {host!r}: an institution checks trunk-address and asks the operator; the "
            "operator starts a trunk with 'fl-split trunk serve'"
        )
    return (
        "no answer in time: a firewall may be in between, or the machine is off or overloaded; an institution asks the "
        "operator, the operator looks at 'fl-split trunk serve' and its log"
    )
