"""Masks over what a node shares, which cancel in the sum of all nodes and nowhere else: `aggregation.secure`.

Data path: shared arrays, clipped if asked -> ring (`fl_split.ring`) -> **masks** -> reply.

Every round each node makes an X25519 key, signs it with its SuperNode's key, and learns the others' from the server.
Each pair of nodes derives one mask, which one of them adds and the other takes away (Bonawitz et al. 2017, without its
shares: a node that is lost fails the round). An institution lists whom it takes part with in ``secure-peers``: exactly
these, in every round, so that no difference of two sums is one node's part. Masks depend on all that the server told a
node, so that they cancel only where it told all nodes the same.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import AggregationError, ConfigError, NodeStateError
from fl_split.ring import WEIGHT, Ring, add, to_ring

logger = logging.getLogger(__name__)

_SSH = serialization.Encoding.OpenSSH
_SIGNED = b"fl-split: key of secure aggregation\n"


@dataclass(frozen=True)
class SignedKey:
    """A node's key of one round; all of it goes to the server and to the other nodes."""

    public: bytes  # X25519
    identity: bytes  # who signs: the SuperNode's public key, as in its .pub file
    signature: bytes


@dataclass(frozen=True)
class Identity:
    """Who a node is, and with whom it takes part."""

    key: ec.EllipticCurvePrivateKey
    peers: frozenset[bytes]  # public keys, the own one among them

    @classmethod
    def of(cls, node: NodeConfig) -> "Identity":
        """Read a node's keys; nodes of a simulation get made-up ones, which hide nothing.

        Raises:
            ConfigError: A file is missing or no such key, or the node's own key is not among its peers'.
        """
        if not node.is_deployed:
            logger.warning(
                "aggregation.secure=true in a simulation is a trial: keys are made up, and nothing is hidden"
            )
            keys = [ec.derive_private_key(i + 1, ec.SECP384R1()) for i in range(node.num_partitions)]
            return cls(keys[node.partition_id], frozenset(_public(key) for key in keys))
        if not (node.secure_key and node.secure_peers):
            raise ConfigError(
                "this run has aggregation.secure=true: set secure-key, the SuperNode's private key, and secure-peers, "
                "a file of the public keys of all institutions that take part, in --node-config"
            )
        try:
            key = serialization.load_ssh_private_key(Path(node.secure_key).expanduser().read_bytes(), None)
            lines = Path(node.secure_peers).expanduser().read_bytes().splitlines()
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"secure-key or secure-peers cannot be read ({type(error).__name__}): expected what "
                "'fl-split keys node' makes, a private key, and lines of .pub files"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError("secure-key is no elliptic curve key: expected a SuperNode's, of 'fl-split keys node'")
        peers = frozenset(b" ".join(line.split()[:2]) for line in lines if line.strip() and not line.startswith(b"#"))
        if _public(key) not in peers:
            raise ConfigError("the public key of secure-key is not in secure-peers: add the line of its .pub file")
        return cls(key, peers)


def check_consent(config: RunConfig, node: NodeConfig) -> None:
    """Refuse to share in clear where an institution has named the peers of a sum.

    Raises:
        ConfigError: The run shares, without masks.
    """
    if node.secure_peers and config.aggregation.share != "none" and not config.aggregation.secure:
        raise ConfigError(
            "this node has secure-peers, and the run has aggregation.secure=false: what this node shares would be "
            "read by the server; set aggregation.secure=true, or take secure-peers out of --node-config"
        )


def sign_key(identity: Identity, folder: Path, about: bytes) -> SignedKey:
    """Make this round's key: the private one stays in the node's folder, until `agree`.

    Args:
        identity: Signs.
        folder: The node's own.
        about: Which round of which run.
    """
    key = X25519PrivateKey.generate()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mask-key"
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(key.private_bytes_raw())
    public = key.public_key().public_bytes_raw()
    signature = identity.key.sign(_SIGNED + about + public, ec.ECDSA(hashes.SHA384()))
    return SignedKey(public, _public(identity.key), signature)


def agree(
    identity: Identity, folder: Path, about: bytes, signed_keys: Sequence[SignedKey], told: bytes
) -> list[tuple[int, bytes]]:
    """Find the masks' keys, one for each other node, and whether this node adds (1) or takes away (-1) that mask.

    Args:
        identity: This node's.
        folder: Where this round's private key is; it is used once.
        about: Which round of which run, as the others signed.
        signed_keys: What the server has passed on, this node's own among it.
        told: All else that the server has told the node: see `digest`.

    Raises:
        AggregationError: Not exactly the peers, each with a signature of its own, or not this node's key.
        NodeStateError: This round's private key is gone.
    """
    file = folder / "mask-key"
    if not file.exists():
        raise NodeStateError("the key of this round's masks was used before: a round's masks are used once; try again")
    key = X25519PrivateKey.from_private_bytes(file.read_bytes())
    file.unlink()
    for signed in signed_keys:
        _check_signature(signed, about, identity.peers)
    if len(identity.peers) < 2:
        raise AggregationError(
            "this node is alone: the mean over it is its own part, which nothing masks; list the other institutions in "
            "secure-peers, or in a simulation start more nodes"
        )
    missing = len(identity.peers - {signed.identity for signed in signed_keys})
    if missing or len(signed_keys) != len(identity.peers):
        raise AggregationError(
            f"{len(signed_keys)} keys came for the {len(identity.peers)} institutions of secure-peers, and {missing} "
            "have none: all take part in every round, once; start the missing nodes, or let all institutions agree on "
            "another secure-peers"
        )
    own = key.public_key().public_bytes_raw()
    if own not in [signed.public for signed in signed_keys]:
        raise AggregationError("the server has passed on another key for this node than its own: it may sit between")
    publics = sorted(signed.public for signed in signed_keys)
    context = hashlib.sha256(b"".join([about, told, *publics])).digest()
    secrets = []
    for public in publics:
        if public != own:
            shared = key.exchange(X25519PublicKey.from_public_bytes(public))
            derived = HKDF(hashes.SHA256(), 32, None, b"fl-split: mask" + context).derive(shared)
            secrets.append((1 if own < public else -1, derived))
    return secrets


def mask(arrays: Mapping[str, Tensor], weight: int, secrets: Sequence[tuple[int, bytes]]) -> dict[str, Ring]:
    """Hide weighted arrays, and the weight: each number is uniform over the ring to whoever lacks a key.

    Args:
        arrays: What is shared.
        weight: Of this node in the mean.
        secrets: From `agree`; each is used once.

    Raises:
        AggregationError: A number is too large for the ring.
    """
    num_nodes = len(secrets) + 1
    hidden = {name: to_ring(name, arrays[name], weight, num_nodes) for name in sorted(arrays)}
    hidden[WEIGHT] = np.array([weight << 32], dtype=np.int64)
    for sign, secret in secrets:
        stream = Cipher(algorithms.ChaCha20(secret, bytes(16)), mode=None).encryptor()
        for name, ring in hidden.items():
            noise = np.frombuffer(stream.update(bytes(ring.nbytes)), dtype="<u8").reshape(ring.shape)
            hidden[name] = add([ring, (noise if sign > 0 else np.uint64(0) - noise).view(np.int64)])
    return hidden


def digest(arrays: Mapping[str, Tensor], *texts: str) -> bytes:
    """Stand for arrays and texts in 32 bytes."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    for name in sorted(arrays):
        total.update(hashlib.sha256(f"{name} {tuple(arrays[name].shape)}".encode()).digest())
        total.update(arrays[name].detach().cpu().numpy().tobytes())
    return total.digest()


def _check_signature(signed: SignedKey, about: bytes, peers: frozenset[bytes]) -> None:
    if signed.identity not in peers:
        raise AggregationError(
            "a key is signed by an institution that is not in secure-peers: add its .pub, or refuse it"
        )
    try:
        public = serialization.load_ssh_public_key(signed.identity)
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise AggregationError("a key of secure-peers is no elliptic curve key: expected SuperNodes' .pub files")
        public.verify(signed.signature, _SIGNED + about + signed.public, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise AggregationError(
            "a key of this round has a wrong signature: it is another round's, or somebody sits between the nodes"
        ) from None


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(_SSH, serialization.PublicFormat.OpenSSH)
