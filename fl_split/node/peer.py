"""Who answers at an address: the certificate that it shows, before anything is sent there."""

import socket
import ssl
from pathlib import Path

from cryptography import x509

from fl_split.errors import TrunkUnavailable
from fl_split.node.replicas import Credentials

_HANDSHAKE_S = 10.0


def certificate_of(address: str, credentials: Credentials) -> x509.Certificate:
    """The certificate of a TLS server, if the node trusts it: name, dates and CA have been checked.

    Raises:
        TrunkUnavailable: There is no TLS server, or one that is not trusted.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(
            cadata=Path(credentials.ca).expanduser().read_text() if credentials.ca else None
        )
        if credentials.cert:
            context.load_cert_chain(Path(credentials.cert).expanduser(), Path(credentials.key).expanduser())
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), _HANDSHAKE_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError) as error:
        raise TrunkUnavailable(
            f"the trunk at {address} shows no certificate ({type(error).__name__}), and this node has to see whose it "
            "is: check trunk-ca and trunk-share-ca, and that it speaks TLS"
        ) from error
