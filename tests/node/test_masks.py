"""Masks that cancel in the sum of all nodes: what is hidden, what comes out, and everything that must not pass."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fl_split import ring
from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import AggregationError, ConfigError, FLSplitError, NodeStateError
from fl_split.node import masks
from fl_split.node.masks import Identity, SignedKey
from fl_split.ring import STEP, WEIGHT, Ring
from fl_split.server.secure import mean
from fl_split.tools.certificates import make_node_key

ABOUT, WEIGHTS = b"run 1\n", (7, 1, 1192)


def arrays(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("b", (3, 5)), ("a", (4,)))}


class Nodes:
    """Three nodes and what goes between them."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / str(i) for i in range(3)]
        self.who = [Identity.of(NodeConfig(partition_id=i, num_partitions=3)) for i in range(3)]
        self.signed_keys: list[SignedKey] = []

    def state(self) -> list[SignedKey]:
        pairs = zip(self.who, self.folders, strict=True)
        self.signed_keys = [masks.sign_key(who, folder, ABOUT) for who, folder in pairs]
        return self.signed_keys

    def agree(self, node: int, told: bytes = b"") -> list[tuple[int, bytes]]:
        return masks.agree(self.who[node], self.folders[node], ABOUT, self.signed_keys, told)

    def masked(self, told: tuple[bytes, ...] = (b"", b"", b"")) -> list[dict[str, Ring]]:
        self.state()
        return [masks.mask(arrays(i), WEIGHTS[i], self.agree(i, told[i])) for i in range(3)]


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the sum


def test_sum_is_that_of_the_rings_steps_and_the_mean_is_exact_to_a_step(nodes: Nodes) -> None:
    parts = nodes.masked()
    for name in ("a", "b"):
        clear = ring.add([ring.to_ring(name, arrays(i)[name], WEIGHTS[i], 3) for i in range(3)])
        assert np.array_equal(ring.add([part[name] for part in parts]), clear)
        expected = sum(w * arrays(i)[name].double() for i, w in enumerate(WEIGHTS)) / sum(WEIGHTS)
        torch.testing.assert_close(torch.from_numpy(ring.from_ring(clear)) / sum(WEIGHTS), expected, rtol=0, atol=STEP)
        torch.testing.assert_close(mean(parts)[name], torch.as_tensor(expected).float(), rtol=1e-6, atol=STEP)
    assert mean(parts).keys() == {"a", "b"}


def test_what_is_sent_is_uniform_whatever_is_shared(nodes: Nodes) -> None:
    """Chi-square over the bytes of what a node sends, 100 keys; with 255 degrees of freedom 400 is 6 sigma."""
    zeros = {"a": torch.zeros(500)}
    sent = []
    for _ in range(100):
        nodes.state()
        sent.append(masks.mask(zeros, 5, nodes.agree(0)))
        assert int(sent[-1][WEIGHT][0]) != 5 << 32
    octets = np.concatenate([part["a"].view(np.uint8).reshape(-1, 8) for part in sent])
    for place in range(8):
        counts = np.bincount(octets[:, place], minlength=256)
        expected = len(octets) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400, place
    assert len(np.unique(np.concatenate([part["a"] for part in sent]))) == 50_000  # no key is used twice


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_without_one_node_nothing_comes_out(nodes: Nodes, gone: int) -> None:
    parts = nodes.masked()
    del parts[gone]
    with pytest.raises(AggregationError, match="masks of this round do not cancel"):
        mean(parts)


def test_nodes_that_were_told_different_things_do_not_sum(nodes: Nodes) -> None:
    """A server that starts the others where they cannot move would read the sum as one node's part."""
    honest, other = masks.digest(arrays(1), "config"), masks.digest(arrays(2), "config")
    assert len({honest, other, masks.digest(arrays(1), "another config"), masks.digest({}, "config")}) == 4
    assert honest == masks.digest(arrays(1), "config")
    with pytest.raises(AggregationError, match="do not cancel: nodes were told different things"):
        mean(nodes.masked((honest, honest, other)))
    assert mean(nodes.masked((honest, honest, honest)))


def test_nodes_of_different_ranks_are_refused(nodes: Nodes) -> None:
    parts = nodes.masked()
    parts[1]["b"] = parts[1]["b"][:2]
    with pytest.raises(AggregationError, match=r"masked different arrays, such as b: all need the same lora\.rank"):
        mean(parts)


@pytest.mark.parametrize("value", [2.0**31 / 3, -(2.0**40), float("nan"), float("inf")])
def test_a_number_that_could_wrap_round_is_refused_on_the_node(value: float) -> None:
    with pytest.raises(AggregationError, match=r"a times this node's weight is not below 7\.1\d+e\+08 everywhere"):
        ring.to_ring("a", torch.tensor([0.0, value]), 1, 3)
    assert ring.to_ring("a", torch.tensor([2.0**31 / 3 - 128]), 1, 3)[0] < 2**63 // 3


# --------------------------------------------------------------------------------------------------------- the keys


def unknown(nodes: Nodes) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    identity = Identity(stranger, frozenset())
    nodes.signed_keys[1] = masks.sign_key(identity, nodes.folders[1], ABOUT)


def between(nodes: Nodes) -> None:
    nodes.signed_keys[1] = replace(nodes.signed_keys[1], public=bytes(32))


def late(nodes: Nodes) -> None:
    nodes.signed_keys[1] = masks.sign_key(nodes.who[1], nodes.folders[1], b"run 0\n")


def lost(nodes: Nodes) -> None:
    del nodes.signed_keys[1]


def twice(nodes: Nodes) -> None:
    nodes.signed_keys.append(nodes.signed_keys[1])


def hidden(nodes: Nodes) -> None:
    nodes.signed_keys[0] = masks.sign_key(nodes.who[0], nodes.folders[1], ABOUT)


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (unknown, "signed by an institution that is not in secure-peers"),
        (between, "wrong signature: it is another round's, or somebody sits between"),
        (late, "wrong signature: it is another round's"),
        (lost, "2 keys came for the 3 institutions of secure-peers, and 1 have none"),
        (twice, "4 keys came for the 3 institutions"),
        (hidden, "passed on another key for this node than its own"),
    ],
)
def test_a_key_that_is_not_a_peers_of_this_round_is_refused(
    nodes: Nodes, happens: Callable[[Nodes], None], message: str
) -> None:
    nodes.state()
    happens(nodes)
    with pytest.raises(AggregationError, match=message):
        nodes.agree(0)


def test_a_key_serves_one_message_and_nobody_else_can_read_it(nodes: Nodes) -> None:
    nodes.state()
    assert (nodes.folders[0] / "mask-key").stat().st_mode & 0o777 == 0o600
    nodes.agree(0)
    with pytest.raises(NodeStateError, match="a round's masks are used once"):
        nodes.agree(0)


def test_a_node_alone_is_refused_since_nothing_would_mask_its_part(nodes: Nodes) -> None:
    [signed, *_] = nodes.state()
    alone = Identity(nodes.who[0].key, frozenset([signed.identity]))
    with pytest.raises(AggregationError, match="this node is alone: the mean over it is its own part"):
        masks.agree(alone, nodes.folders[0], ABOUT, [signed], b"")


# ------------------------------------------------------------------------------------------------- an institution's


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """A deployed node's configuration: its SuperNode's key, and two peers."""
    key, public = make_node_key(tmp_path / "me")
    _, other = make_node_key(tmp_path / "other")
    lines = f"# who takes part\n{public.read_text().strip()} me@here\n\n{other.read_text()}"
    (tmp_path / "peers").write_text(lines)
    return {"partition-id": 0, "secure-key": str(key), "secure-peers": str(tmp_path / "peers")}


def test_keys_of_supernodes_are_the_identities(own: dict[str, Any]) -> None:
    identity = Identity.of(NodeConfig.from_flat(own))
    assert len(identity.peers) == 2


def test_wrong_keys_of_an_institution_are_refused(own: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str, **changes: str) -> None:
        given = {**own, **{name.replace("_", "-"): value for name, value in changes.items()}}
        with pytest.raises(ConfigError, match=message):
            Identity.of(NodeConfig.from_flat(given))

    refused("set secure-key, the SuperNode's private key, and secure-peers", secure_peers="")
    refused(r"cannot be read \(FileNotFoundError\)", secure_key="/nowhere")
    refused(r"cannot be read \(ValueError\)", secure_key=own["secure-peers"])
    edwards = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (tmp_path / "edwards").write_bytes(edwards)
    refused("secure-key is no elliptic curve key", secure_key=str(tmp_path / "edwards"))
    refused("public key of secure-key is not in secure-peers", secure_peers=str(tmp_path / "other.pub"))


def test_keys_are_made_up_in_a_simulation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = NodeConfig.from_flat({"partition-id": 0, "num-partitions": 3})
    assert len(Identity.of(numbers).peers) == 3
    monkeypatch.setattr(sys, "argv", ["/venv/bin/flwr-clientapp"])  # a SuperNode that was told its number only
    with pytest.raises(ConfigError, match="set secure-key, the SuperNode's private key, and secure-peers"):
        Identity.of(numbers)


def test_a_peer_whose_key_is_of_another_kind_is_refused(nodes: Nodes) -> None:
    public = Ed25519PrivateKey.generate().public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    nodes.state()
    nodes.signed_keys[1] = replace(nodes.signed_keys[1], identity=line)
    nodes.who[0] = Identity(nodes.who[0].key, nodes.who[0].peers | {line})
    with pytest.raises(AggregationError, match="a key of secure-peers is no elliptic curve key"):
        nodes.agree(0)


def test_a_node_with_peers_shares_nothing_in_clear(own: dict[str, Any]) -> None:
    node = NodeConfig.from_flat(own)
    with pytest.raises(ConfigError, match=r"has secure-peers, and the run has aggregation\.secure=false"):
        masks.check_consent(RunConfig.from_flat({"aggregation.share": "top"}), node)
    masks.check_consent(RunConfig.from_flat({"aggregation.share": "top", "aggregation.secure": True}), node)
    masks.check_consent(RunConfig(), node)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregation.share": "none"}, r"share='none': nothing is shared"),
        ({"aggregation.combine": "svd"}, r"combine='svd': it needs each node's product"),
        ({"aggregation.combine": "stack"}, r"combine='stack'"),
        ({"aggregation.strategy": "krum", "aggregation.min-nodes": 3}, r"strategy='krum': it compares single nodes"),
        ({"aggregation.strategy": "fedmedian"}, r"strategy='fedmedian'"),
        ({"dp.mode": "server-fixed", "aggregation.weighting": "equal"}, r"dp\.mode='server-fixed': the server cannot"),
        ({"aggregation.fraction": 0.5}, r"fraction=0\.5: the difference of two rounds' sums"),
    ],
)
def test_what_needs_a_single_nodes_part_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"aggregation.share": "top", "aggregation.secure": True, **changes}
    with pytest.raises(FLSplitError, match=rf"aggregation\.secure=true does not go with .*{message}"):
        RunConfig.from_flat(given)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation.personal": True, "aggregation.min-nodes": 3},
        {"aggregation.strategy": "fedavgm"},
        {"aggregation.tensors": "a-only"},
        {"dp.mode": "client-fixed", "aggregation.weighting": "equal"},
    ],
)
def test_what_is_linear_in_the_nodes_parts_goes_with_masks(changes: dict[str, Any]) -> None:
    config = RunConfig.from_flat({"aggregation.share": "top", "aggregation.secure": True, **changes})
    assert config.aggregation.secure
