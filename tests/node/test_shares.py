"""A gradient in two shares: their sum is the exact one, each alone is noise, and no operator ever gets both."""

import hashlib
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoConfig

from fl_split import wire
from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import ConfigError, TrainingError, TrunkMismatch, TrunkRefused, TrunkUnavailable
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.build import check_consent, connect_shares
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials
from fl_split.node.shares import SharesTrunk, Sides
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.plan.plan import make_plan
from fl_split.proto import trunk_pb2 as pb
from fl_split.shares import leak_bits, mask_of, split_gradient, step_of
from fl_split.tools.certificates import make_authority, make_operator_key, make_server_certificate
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.server import embedded

SEED = bytes(range(32))


def trunk_config(**sections: Any) -> TrunkConfig:
    return TrunkConfig.model_validate({"server": {"gradient-shares": True}, "metrics": {"enabled": False}, **sections})


def run_of(**keys: Any) -> RunConfig:
    here = {"trunk.address": "127.0.0.1:1", "trunk.share-address": "127.0.0.1:2"}
    return RunConfig.from_flat({"surrogate.kind": "shares", **here, **keys})


def reach(run: RunConfig, folder: Path, one: str, other: str, stack: ExitStack, **node: Any) -> SharesTrunk:
    return connect_shares(run, NodeConfig(**node), folder, (one, other), stack)


@pytest.fixture(scope="module")
def held(demo_model: Path) -> HeldLayers:
    return hold_layers(demo_model, 2, 2)


def example(held: HeldLayers) -> tuple[Tensor, Tensor, Tensor]:
    """h1, its mask, and a gradient of which the first token has most and one sequence nothing."""
    torch.manual_seed(0)
    h1, gradient = torch.randn(2, 4, 9, held.hidden_size)
    real = torch.ones(4, 9, dtype=torch.long)
    real[1, 5:] = 0
    gradient[:, 0] *= 30
    gradient[2] = 0
    return h1, real, gradient * 1e-4 * real[..., None]  # a loss has no gradient at padding


# --------------------------------------------------------------------------------------------------------- shares


def test_the_sum_of_both_answers_is_the_exact_gradient(demo_model: Path, held: HeldLayers) -> None:
    h1, real, gradient = example(held)
    exact = LocalTrunk(load_trunk(demo_model, 2, 2)).vjp(h1, real, None, gradient)
    errors = {}
    with ExitStack() as stack:
        one, other = (stack.enter_context(embedded(held, config=trunk_config())) for _ in range(2))
        for std in (1.0, 30.0, 300.0):
            trunk = reach(run_of(**{"surrogate.mask-std": std}), demo_model, one, other, stack)
            got = trunk.vjp(h1, real, None, gradient)
            errors[std] = float((got - exact)[real.bool()].norm() / exact[real.bool()].norm())
            assert not got[2].any()  # nothing, whatever the mask was
            assert trunk.leak_bits == pytest.approx(3 * leak_bits(std), rel=0.01)  # the fourth has nothing to leak
            assert torch.equal(trunk.start(h1, real, None).result()[2], trunk.first.start(h1, real, None).result()[2])
    assert errors[1.0] < 3e-5
    assert errors[30.0] < 1e-3
    assert errors[1.0] < errors[30.0] < errors[300.0]  # what rounding costs


def test_a_share_is_distributed_alike_whatever_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    monkeypatch.setattr("fl_split.shares.secrets.token_bytes", chance.bytes)
    torch.manual_seed(0)
    lengths = [300, 100]
    small, large = torch.randn(400, 64) * 1e-9, torch.zeros(400, 64)
    large[0], large[350, 3] = 1e6, -1e6  # all in two tokens, and 15 orders of magnitude more
    for std in (1.0, 30.0):
        shares = [split_gradient(gradient, lengths, std) for gradient in (small, large)]
        masks = [mask_of(share.seed, std, step_of(std), 400, 64) for share in shares]
        for values in ([s.rest for s in shares], masks):
            assert stats.ks_2samp(*(v.flatten().numpy() for v in values)).pvalue > 0.01
        for share in shares:
            assert stats.kstest(share.rest.flatten().numpy() / std, "norm").pvalue > 0.01
        rest = split_gradient(large, lengths, std).rest
        assert abs(np.corrcoef(rest.flatten(), large.flatten())[0, 1]) < 0.02
        assert len(torch.unique(masks[0])) > 0.9 * masks[0].numel()
    told = split_gradient(small, lengths, 0.001)  # the test would see a mask that is too small
    assert stats.kstest(told.rest.flatten().numpy() / 0.001, "norm").pvalue < 0.01


def test_no_bit_of_a_share_tells_which_gradient_it_is_of() -> None:
    """Numbers of both shares are whole multiples of one step: low bits of floats do not leak (Mironov 2012)."""
    gradient = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    for std in (1.0, 30.0, 1000.0):
        step, shares = step_of(std), split_gradient(gradient, [64], std)
        for numbers in (shares.rest, mask_of(shares.seed, std, step, 64, 50)):
            whole = numbers.double() / step
            assert torch.equal(whole, whole.round())
            assert whole.abs().max() < 2**24


def test_bound_of_the_leak_is_that_of_a_normal_channel() -> None:
    assert leak_bits(1.0) == pytest.approx(0.72, abs=0.002)
    assert leak_bits(30.0) == pytest.approx(0.72 / 900, rel=0.003)
    power = np.random.default_rng(0).dirichlet(np.ones(500))  # of coordinates, 1 in all
    capacity = np.log2(1 + power / 30.0**2).sum() / 2
    assert capacity <= leak_bits(30.0) == pytest.approx(capacity, rel=0.01)


def test_mask_is_what_the_proto_says() -> None:
    """Written out once more, number by number, without torch."""
    std, step = 30.0, step_of(30.0)
    got = mask_of(SEED, std, step, 3, 5)
    for row in range(3):
        data = hashlib.shake_256(SEED + row.to_bytes(8, "little")).digest(48)
        numbers = []
        for pair in range(3):
            u0, u1 = (
                ((int.from_bytes(data[at : at + 8], "little") >> 11) + 0.5) / 2**53 for at in (16 * pair, 16 * pair + 8)
            )
            radius = math.sqrt(-2 * math.log(u0))
            numbers += [radius * math.cos(2 * math.pi * u1), radius * math.sin(2 * math.pi * u1)]
        expected = [round(number * (std / step)) * step for number in numbers[:5]]
        torch.testing.assert_close(got[row], torch.tensor(expected), rtol=0, atol=step)
    assert torch.equal(mask_of(SEED, std, step, 3, 5)[:2], mask_of(SEED, std, step, 2, 5))  # by rows: calls may be cut
    assert not torch.equal(got, mask_of(bytes(32), std, step, 3, 5))
    assert split_gradient(torch.ones(1, 4), [1], 1.0).seed != split_gradient(torch.ones(1, 4), [1], 1.0).seed


def test_mask_does_not_depend_on_how_much_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask_of(SEED, 30.0, step_of(30.0), 7, 6)
    monkeypatch.setattr("fl_split.shares._PAIRS_AT_ONCE", 6)
    assert torch.equal(mask_of(SEED, 30.0, step_of(30.0), 7, 6), whole)


def test_small_gradients_are_not_rounded_away_on_average() -> None:
    gradient = torch.full((1, 4000), 1e-7)
    gradient[0, 0] = 1.0
    means = []
    for _ in range(40):
        share = split_gradient(gradient, [1], 30.0)
        sum_ = share.rest + mask_of(share.seed, 30.0, step_of(30.0), 1, 4000)
        means.append(float(sum_[0, 1:].mean()))
    assert np.mean(means) == pytest.approx(1e-7, rel=0.3)


def test_a_step_sends_what_the_plan_says_and_trains_the_bottom(demo_model: Path, held: HeldLayers) -> None:
    run = run_of(**{"train.batch-size": 2, "data.max-length": 12})
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    with ExitStack() as stack:
        one, other = (stack.enter_context(embedded(held, config=trunk_config())) for _ in range(2))
        trunk = reach(run, demo_model, one, other, stack)
        local = LocalTrunk(held.model)
        for kind, middle in (("exact", local), ("shares", trunk)):
            ends = load_ends(demo_model, 2, 2, middle, surrogate=kind)  # type: ignore[arg-type]
            model = adapters.attach(ends, run.lora, train_bottom=True, seed=0).train()
            accumulate(model, [{"input_ids": ids, "labels": ids}] * 3, in_flight=2)
            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append([g for name, g in named.items() if adapters.part_of(model, name) == "bottom" and "_B" in name])
        plan = make_plan(AutoConfig.from_pretrained(demo_model), run)
        assert trunk.bytes_sent == 3 * plan.request_bytes
        assert trunk.first.bytes_received + trunk.second.bytes_received == 3 * plan.reply_bytes
    exact, in_shares = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in found)
    assert (in_shares - exact).norm() < 0.02 * exact.norm()  # bfloat16 on the way forward, too


# ------------------------------------------------------------------------------------------------ never both to one


class Tapped:
    """A replica behind a proxy that notes what it was sent, and can be killed and come back."""

    def __init__(self, behind: str, stack: ExitStack) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._channel = stack.enter_context(grpc.insecure_channel(behind))
        self._lock = threading.Lock()
        self.port, self._server = 0, None
        self.start()
        stack.callback(self.kill)

    def start(self) -> None:
        tapped = self

        class Tap(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                call = tapped._channel.unary_unary(details.method)

                def handle(request: bytes, context: Any) -> bytes:
                    with tapped._lock:
                        tapped.sent.append((details.method, request))
                    try:
                        reply: bytes = call(request)
                    except grpc.RpcError as error:
                        context.abort(error.code(), error.details())
                    return reply

                return grpc.unary_unary_rpc_method_handler(handle)

        self._server = grpc.server(ThreadPoolExecutor(4), (Tap(),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def kill(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()  # open calls are cut off: the caller does not know if they arrived
            self._server = None

    @property
    def shares(self) -> list[pb.PullRequest]:
        return [pb.PullRequest.FromString(request) for method, request in self.sent if method.endswith("/Share")]


def test_no_share_goes_to_the_other_side_when_replicas_are_killed(demo_model: Path, held: HeldLayers) -> None:
    h1, real, gradient = example(held)
    exact = LocalTrunk(load_trunk(demo_model, 2, 2)).vjp(h1, real, None, gradient)
    with ExitStack() as stack:
        behind = [stack.enter_context(embedded(held, config=trunk_config())) for _ in range(2)]
        sides = [[Tapped(address, stack) for _ in range(2)] for address in behind]
        one, other = (",".join(f"127.0.0.1:{tap.port}" for tap in side) for side in sides)
        trunk = reach(run_of(**{"trunk.timeout-s": 60.0}), demo_model, one, other, stack)
        stop = threading.Event()

        def kill_in_turns() -> None:
            while not stop.wait(0.15):
                for side in sides:
                    for tap in side:
                        tap.kill()
                        stop.wait(0.1)
                        tap.start()

        killer = threading.Thread(target=kill_in_turns)
        killer.start()
        try:
            for _ in range(25):
                got = trunk.vjp(h1, real, None, gradient)
                assert (got - exact)[real.bool()].norm() < 2e-3 * exact[real.bool()].norm()
        finally:
            stop.set()
            killer.join()
        assert trunk.first.num_retries + trunk.second.num_retries > 0
        seen = [[request for tap in side for request in tap.shares] for side in sides]
        assert all(tap.shares for side in sides for tap in side)
    assert all(request.HasField("mask") and not request.gradient for request in seen[0])
    assert all(request.gradient and not request.HasField("mask") for request in seen[1])
    seeds = {request.mask.seed for request in seen[0]}
    rests = {request.gradient for request in seen[1]}
    assert len(seeds) == len(rests) == 25  # what was made again was the same: one of each kind for each gradient
    rows = [torch.frombuffer(bytearray(rest), dtype=torch.float32) for rest in rests]
    for seed in seeds:  # each mask belongs to one rest, which is on the other side
        made = mask_of(seed, 30.0, step_of(30.0), 32, held.hidden_size).flatten()
        assert sum(float((row + made).norm()) < 3 for row in rows) == 1


def test_when_one_side_is_gone_nothing_is_asked_of_the_other_instead(demo_model: Path, held: HeldLayers) -> None:
    h1, real, gradient = example(held)
    with ExitStack() as stack:
        behind = [stack.enter_context(embedded(held, config=trunk_config())) for _ in range(2)]
        first, second = (Tapped(address, stack) for address in behind)
        places = (f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}")
        trunk = reach(run_of(**{"trunk.timeout-s": 1.5}), demo_model, *places, stack)
        second.kill()
        with pytest.raises(TrunkUnavailable, match=f"no trunk answers at {places[1]}"):
            trunk.vjp(h1, real, None, gradient)
        assert [request.HasField("mask") for request in first.shares] == [True]
        assert not second.shares


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1:9470", "127.0.0.1:9470"),
        ("localhost:9470", "127.0.0.1:9470"),
        ("127.0.0.1:9470,127.0.0.1:9471", "127.0.0.1:9472,127.0.0.2:9471"),
        ("Trunk.invalid:9470", "trunk.invalid:9470"),
        ("127.0.0.1:09470", "127.0.0.1:9470"),
        ("192.0.2.1:09470", "192.0.2.1:9470"),
        ("unix:/run/trunk.sock", "unix:///run/trunk.sock"),
        ("unix:/run/trunk.sock", "unix:/run/../run//trunk.sock"),
    ],
)
def test_one_address_on_both_sides_is_refused(one: str, other: str) -> None:
    tls = Credentials(ca="ca.crt")
    with pytest.raises(ConfigError, match="both lead to .*one operator would have both shares"):
        Sides((one, other), (tls, tls))


def test_one_operators_key_on_both_sides_is_refused(tmp_path: Path) -> None:
    a, b = (make_operator_key(tmp_path / name)[1] for name in ("a", "b"))
    copy = shutil.copy(a, tmp_path / "copy.pub")
    one, same, other = (Credentials(ca="ca.crt", operator_key=str(file)) for file in (a, copy, b))
    places = ("192.0.2.1:9470", "192.0.2.2:9470")
    Sides(places, (one, other))
    with pytest.raises(ConfigError, match="trunk-operator-key and trunk-share-operator-key hold one key: one operator"):
        Sides(places, (one, same))


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_is_not_sent(demo_model: Path, held: HeldLayers, number: str) -> None:
    h1, real, gradient = example(held)
    gradient[0, 0, 0] = float(number)
    with ExitStack() as stack:
        one, other = (stack.enter_context(embedded(held, config=trunk_config())) for _ in range(2))
        trunk = reach(run_of(), demo_model, one, other, stack)
        with pytest.raises(TrainingError, match=r"dL/dh2 is not finite, and nothing of it was sent.* lower train\."):
            trunk.vjp(h1, real, None, gradient)
        assert trunk.bytes_sent == 0 and trunk.leak_bits == 0


def test_plaintext_is_refused_beyond_loopback_and_warned_of_on_it(caplog: pytest.LogCaptureFixture) -> None:
    plain = Credentials(allow_plaintext=True)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:9470 would be reached without TLS"):
        Sides(("127.0.0.1:9470", "192.0.2.1:9470"), (plain, plain))
    Sides(("127.0.0.1:9470", "127.0.0.1:9471"), (plain, plain))
    assert "without TLS: nothing says whose it is" in caplog.text


def test_trunks_that_do_not_offer_shares_or_round_too_much_or_differ_are_refused(
    demo_model: Path, held: HeldLayers, checkpoint: Callable[[str], Path]
) -> None:
    with ExitStack() as stack:
        good = stack.enter_context(embedded(held, config=trunk_config()))
        plain = stack.enter_context(embedded(held, config=trunk_config(server={"exact-gradient": True})))
        with pytest.raises(TrunkRefused, match=r"does not offer gradient shares.*server\.gradient-shares=true"):
            reach(run_of(), demo_model, good, plain, stack)
        rounded = hold_layers(demo_model, 2, 2, torch.bfloat16)
        coarse = stack.enter_context(embedded(rounded, config=trunk_config()))
        with pytest.raises(TrunkMismatch, match=r"computes in bfloat16.*needs float32"):
            reach(run_of(), demo_model, good, coarse, stack)
        identity = pb.DescribeReply()
        identity.CopyFrom(held.identity)
        identity.trunk_id = bytes(16)
        other = stack.enter_context(embedded(HeldLayers(held.model, identity, held.causal), config=trunk_config()))
        with pytest.raises(TrunkMismatch, match="not of the same layers, weights and precision"):
            reach(run_of(), demo_model, good, other, stack)


@contextmanager
def with_tls(held: HeldLayers, keys: Path, name: str) -> Iterator[str]:
    security = {"cert": str(keys / f"{name}.crt"), "key": str(keys / f"{name}.key")}
    with embedded(held, config=trunk_config(security=security)) as address:
        yield address


def test_certificates_of_one_operator_on_both_sides_are_refused(
    demo_model: Path, held: HeldLayers, tmp_path: Path
) -> None:
    make_authority(tmp_path)
    for name, host in (("a", "a.example"), ("b", "b.example"), ("again", "a.example")):
        make_server_certificate(tmp_path, name, [host])
    keys = {"trunk_ca": str(tmp_path / "ca.crt"), "trunk_share_ca": str(tmp_path / "ca.crt")}
    h1, real, gradient = example(held)
    with ExitStack() as stack:
        a, b, again, same = (stack.enter_context(with_tls(held, tmp_path, n)) for n in ("a", "b", "again", "a"))
        trunk = reach(run_of(), demo_model, a, b, stack, **keys)
        assert trunk.vjp(h1, real, None, gradient).any()
        with pytest.raises(TrunkMismatch, match="known by the key .*one operator would have both shares"):
            reach(run_of(), demo_model, a, same, stack, **keys)
        with pytest.raises(TrunkMismatch, match=r"known by the name a\.example"):
            reach(run_of(), demo_model, a, again, stack, **keys)
        plain = stack.enter_context(embedded(held, config=trunk_config()))
        with pytest.raises(TrunkUnavailable, match=f"no trunk answers at {plain}"):
            reach(run_of(**{"trunk.timeout-s": 1.0}), demo_model, a, plain, stack, **keys)
        sides = Sides((a, plain), [Credentials(ca=keys["trunk_ca"])] * 2)
        with pytest.raises(TrunkUnavailable, match="shows no certificate"):
            sides.meet(1, plain)


def test_institution_run_and_operator_must_all_allow_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of()
    check_consent(run, NodeConfig())  # a simulation cannot ask
    with pytest.raises(ConfigError, match="allow-gradient-shares=true in --node-config"):
        check_consent(run, NodeConfig(data_path="/data", allow_exact_gradient=True))
    with pytest.raises(ConfigError, match="allow-gradient-shares=true in --node-config"):
        check_consent(run, NodeConfig(trunk_ca="/ca.crt"))
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="allow-gradient-shares=true"):
        patched.setattr(sys, "argv", ["/venv/bin/flwr-clientapp"])  # a SuperNode that was told its number only
        check_consent(run, NodeConfig())
    check_consent(run, NodeConfig(data_path="/data", allow_gradient_shares=True))
    assert "at most 0.0008 bits" in caplog.text
    assert "only while the two operators do not collude" in caplog.text
    for sections in (
        {"model": {"dtype": "bfloat16"}},
        {"model": {"quantization": "torchao-int8"}},
        {"model": {"tensor-parallel": True}},
    ):
        with pytest.raises(ValueError, match=r"server\.gradient-shares=true needs model\.dtype='float32'"):
            trunk_config(**sections)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trunk.share-address": ""}, "needs two trunks of different operators"),
        ({"trunk.share-address": "embedded"}, "needs two trunks of different operators"),
        ({"trunk.share-address": "elsewhere"}, r"trunk\.share-address='elsewhere': expected host:port"),
        ({"surrogate.kind": "blocks"}, r"trunk\.share-address='127.0.0.1:2' is for surrogate\.kind='shares'"),
        ({"surrogate.mask-std": 0.5}, r"surrogate\.mask-std=0\.5: input should be greater"),
        (
            {"trunk.address": "embedded", "trunk.share-address": "embedded", "model.dtype": "bfloat16"},
            r"needs trunks in float32: model\.dtype='bfloat16'",
        ),
    ],
)
def test_runs_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(**keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": pb.BFLOAT16}, "shares travel as FLOAT32"),
        ({"seed": b"short"}, r"mask\.seed has 5 bytes: expected 32"),
        ({"std": 0.1}, r"mask\.std=0\.1: expected 1 to 4096"),
        ({"std": float("nan")}, r"mask\.std=nan"),
        ({"step": 1.0}, r"mask\.step=1: expected"),
        ({"gradient": b"1234"}, "gradient and mask are both there"),
    ],
)
def test_a_mask_that_is_none_is_refused_by_its_field(
    held: HeldLayers, demo_model: Path, changes: dict[str, Any], message: str
) -> None:
    rows = torch.zeros(2, held.hidden_size)
    at = wire.Packed(rows, [2], None)
    made = {"seed": SEED, "std": 30.0, "step": step_of(30.0), **changes}
    dtype, gradient = made.pop("dtype", pb.FLOAT32), made.pop("gradient", b"")
    request = pb.PullRequest(forward=wire.encode_request(at, dtype), mask=pb.Mask(**made), gradient=gradient)
    with embedded(held, config=trunk_config()) as address:
        expected = Expected.from_checkpoint(demo_model, 2, 2)
        with TrunkConnection(address, expected) as connection, pytest.raises(TrunkRefused, match=message):
            connection.share(request).result()
