import errno
import io
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.errors import ConfigError
from fl_split.tools import certificates


def handshake(authority: Path, certificate: Path, key: Path, host: str) -> None:
    """One TLS connection to a server with this certificate, as a client that trusts this authority."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as accepted:
                accepted.recv(1)
        except OSError:  # the client says what went wrong
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with here, ssl.create_default_context(cafile=authority).wrap_socket(here, server_hostname=host):
            pass
    finally:
        thread.join()


@pytest.mark.parametrize("host", ["trunk.example", "10.1.2.3", "localhost", "127.0.0.1"])
def test_server_certificate_is_taken_for_its_hosts(tmp_path: Path, host: str) -> None:
    authority, _ = certificates.make_authority(tmp_path)
    certificate, key = certificates.make_server_certificate(tmp_path, "trunk", ["trunk.example", "10.1.2.3"])
    handshake(authority, certificate, key, host)


def test_server_certificate_is_refused_for_other_hosts_and_by_those_who_trust_another_authority(tmp_path: Path) -> None:
    authority, _ = certificates.make_authority(tmp_path)
    stranger, _ = certificates.make_authority(tmp_path / "other")
    certificate, key = certificates.make_server_certificate(tmp_path, "trunk", ["trunk.example"])
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'else.example'"):
        handshake(authority, certificate, key, "else.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed|unable to get local issuer"):
        handshake(stranger, certificate, key, "trunk.example")


def test_private_files_are_their_owners_and_a_node_key_is_one_that_flower_reads(tmp_path: Path) -> None:
    _, authority_key = certificates.make_authority(tmp_path)
    _, server_key = certificates.make_server_certificate(tmp_path, "superlink", [])
    private, public = certificates.make_node_key(tmp_path / "node")
    assert {file.stat().st_mode & 0o777 for file in (authority_key, server_key, private)} == {0o600}
    key = load_ssh_private_key(private.read_bytes(), None)
    assert key.public_key() == load_ssh_public_key(public.read_bytes())


def test_nothing_is_replaced_and_no_certificate_without_an_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no authority"):
        certificates.make_server_certificate(tmp_path, "trunk", ["a"])
    certificates.make_node_key(tmp_path / "node")
    with pytest.raises(ConfigError, match="node is there already and is not replaced"):
        certificates.make_node_key(tmp_path / "node")


def test_an_authority_with_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    _, key = certificates.make_authority(tmp_path)
    other = ed25519.Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(other.private_bytes(*form))
    with pytest.raises(ConfigError, match="not an elliptic curve key"):
        certificates.make_server_certificate(tmp_path, "trunk", ["a"])


def test_verbs_write_the_files_and_name_them(tmp_path: Path) -> None:
    run = CliRunner().invoke
    folder = str(tmp_path)
    assert run(app, ["keys", "authority", folder]).output.split() == [f"{folder}/ca.crt", f"{folder}/ca.key"]
    server = run(app, ["keys", "server", folder, "trunk", "--host", "trunk.example"])
    assert server.output.split() == [f"{folder}/trunk.crt", f"{folder}/trunk.key"]
    assert run(app, ["keys", "node", f"{folder}/mine"]).output.split() == [f"{folder}/mine", f"{folder}/mine.pub"]
    assert run(app, ["keys", "node", f"{folder}/mine"]).exit_code == 1


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if self.raw.name == "public":
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def full(descriptor: int, mode: str) -> Any:
        raw = io.FileIO(descriptor, mode)
        raw.name = "public" if (tmp_path / "key.pub").exists() else "private"
        return Full(raw)

    monkeypatch.setattr(certificates, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        certificates.make_node_key(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(certificates.make_node_key(tmp_path / "key")) == 2
