"""Addresses as users write them: ``host:port``."""

import ipaddress

from fl_split.errors import ConfigError

_NO_WEB = ("http://", "https://", "grpc://", "grpcs://")


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays on this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(address: str) -> bool:
    """Whether ``host:port`` is on this machine."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].rpartition("/")[2])


def split_address(address: str) -> list[str]:
    """``a:1, b:2`` -> its parts.

    Raises:
        ConfigError: A part without a port, or none at all.
    """
    parts = [part.strip() for part in address.split(",") if part.strip()]
    for part in parts:
        port = part.rpartition(":")[2]
        if not part.startswith("unix:") and not (
            port.isdecimal() and 0 < int(port) < 65536 and len(part) > len(port) + 1
        ):
            raise ConfigError(f"trunk.address={address!r}: {part!r} is not host:port; separate several with commas")
        if part.startswith(_NO_WEB):
            raise ConfigError(
                f"trunk.address={address!r}: expected host:port without {part.partition('//')[0]}//: it is no web "
                "page, and trunk-ca (--ca) asks for TLS"
            )
    if not parts:
        raise ConfigError("trunk.address is empty: expected 'embedded', or host:port, several with commas between")
    return parts
