"""A node that generates over the network: the full model's tokens, whatever happens to the trunk meanwhile."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from fl_split import wire
from fl_split.errors import TrunkRefused, TrunkUnavailable
from fl_split.model.ends import load_ends
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import decode, server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers

ROOT = Path(__file__).parents[2]
IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2])
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "use_cache": True, "pad_token_id": 0, "attention_mask": MASK}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def held(folder: Path) -> HeldLayers:
    return hold_layers(folder, 2, 2)


@pytest.fixture(scope="module")
def full(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def ends(folder: Path, address: str, **options: Any) -> Iterator[tuple[Any, TrunkConnection]]:
    expected = Expected.from_checkpoint(folder, 2, 2)
    with TrunkConnection(address, expected, **{"wire_dtype": "float32", "timeout_s": 20, **options}) as connection:
        model = load_ends(folder, 2, 2, connection, surrogate="none")
        model.generation_config.eos_token_id = None
        yield model, connection


def serving(held: HeldLayers, **limits: Any) -> Any:
    return server.embedded(held, config=TrunkConfig.model_validate({"limits": limits}))


class At(BaseStreamer):
    """Do something when so many tokens are there."""

    def __init__(self, moment: int, act: Callable[[], Any]) -> None:
        self.left, self.act = moment, act

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self) -> None: ...


def test_tokens_equal_the_full_models(folder: Path, held: HeldLayers, full: Any) -> None:
    with serving(held) as address, ends(folder, address) as (model, connection):
        for options in (
            OPTIONS,
            {**OPTIONS, "num_beams": 3},
            {**OPTIONS, "do_sample": True, "temperature": 1.5},
            {**OPTIONS, "attention_mask": None, "prompt_lookup_num_tokens": 3},
        ):
            ids = IDS * MASK if options["attention_mask"] is not None else IDS[:1, :3].repeat(1, 4)
            torch.manual_seed(3)
            expected = full.generate(ids, **options)
            torch.manual_seed(3)
            assert torch.equal(model.generate(ids, **options), expected)
        assert connection.num_retries == 0


def test_int8_and_bfloat16_travel(folder: Path, held: HeldLayers) -> None:
    with serving(held) as address:
        for wire_dtype in ("bfloat16", "int8"):
            with ends(folder, address, wire_dtype=wire_dtype) as (model, _):
                assert model.generate(IDS * MASK, **OPTIONS).shape == (3, 33)


def test_a_bfloat16_trunk_writes_the_bfloat16_models_tokens(demo_model: Path) -> None:
    full: Any = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    expected = Expected.from_checkpoint(demo_model, 2, 2)
    with server.embedded(hold_layers(demo_model, 2, 2, torch.bfloat16)) as address:
        with TrunkConnection(address, expected, wire_dtype="bfloat16") as connection:
            model: Any = load_ends(demo_model, 2, 2, connection, surrogate="none", dtype=torch.bfloat16)
            for ids in (IDS[:1], IDS[1:2, :5], IDS[2:, :1]):
                options = {**OPTIONS, "attention_mask": torch.ones_like(ids)}
                assert torch.equal(model.generate(ids, **options), full.generate(ids, **options))


def test_a_long_prompt_travels_in_several_messages(
    folder: Path, held: HeldLayers, full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrunkConnection, "tokens_per_call", lambda self: 4)
    with serving(held) as address, ends(folder, address) as (model, _):
        assert torch.equal(model.generate(IDS * MASK, **OPTIONS), full.generate(IDS * MASK, **OPTIONS))


def test_what_is_sent_is_counted_and_is_one_token_a_step(folder: Path, held: HeldLayers) -> None:
    with serving(held) as address, ends(folder, address) as (model, connection):
        model.generate(IDS * MASK, **OPTIONS)
        tokens = int(MASK.sum()) + 3 * 23
        assert tokens * 32 * 4 < connection.bytes_sent < tokens * (32 * 4 + 16)
        assert tokens * 32 * 4 < connection.bytes_received < tokens * (32 * 4 + 32)
        assert connection.forward_s > 0


def test_an_answer_survives_the_kill_of_its_replica(folder: Path, held: HeldLayers, full: Any) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fl_split.trunk.layers import hold_layers; "
        "from fl_split.trunk.server import embedded\n"
        "with embedded(hold_layers(Path(sys.argv[1]), 2, 2)) as address:\n print(address, flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    doomed = process.stdout.readline().strip()
    killed = []

    def kill() -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append(True)

    with serving(held) as address, ends(folder, f"{doomed},{address}") as (model, connection):
        ids, options = IDS[:1], {**OPTIONS, "attention_mask": None}
        found = model.generate(ids, streamer=At(10, kill), **options)
        assert killed and connection.num_retries > 0
        assert torch.equal(found, full.generate(ids, **options))
    process.stdout.close()


def test_an_answer_goes_on_after_its_idle_stream_was_closed(folder: Path, held: HeldLayers, full: Any) -> None:
    ids, options = IDS[:1], {**OPTIONS, "attention_mask": None}
    with serving(held, **{"stream-idle-s": 0.5}) as address, ends(folder, address) as (model, connection):
        found = model.generate(ids, streamer=At(8, lambda: time.sleep(1.5)), **options)
        assert connection.num_retries > 0
        assert torch.equal(found, full.generate(ids, **options))


def test_no_room_is_waited_for_and_then_named(folder: Path, held: HeldLayers) -> None:
    room = {"cache-mb": 1}  # 61 sequences of 64 tokens
    with serving(held, **room) as address, ends(folder, address, timeout_s=2.5) as (model, _):
        with ends(folder, address) as (other, _):
            ids = IDS[:1].repeat(40, 1)
            options = {**OPTIONS, "attention_mask": None, "max_new_tokens": 50}
            refusals: list[bool] = []

            def ask() -> None:
                with pytest.raises(TrunkUnavailable, match="had no room for trunk.timeout-s=2.5"):
                    model.generate(ids, **options)
                refusals.append(True)

            other.generate(ids[:, :9], streamer=None, **{**options, "max_new_tokens": 2})
            first = other.generate(ids, return_dict_in_generate=True, **options)  # its cache is alive
            ask()
            assert refusals and first is not None
            del first
            assert model.generate(ids, **options).shape == (40, 59)


def test_what_would_never_fit_is_named_at_once(folder: Path, held: HeldLayers) -> None:
    with serving(held, **{"cache-mb": 1}) as address, ends(folder, address) as (model, _):
        with pytest.raises(TrunkRefused, match=r"70 answers of .. tokens, .* do not fit .*limits.cache-mb=1,.*fewer"):
            model.generate(IDS[:1].repeat(70, 1), **{**OPTIONS, "attention_mask": None, "max_new_tokens": 50})


def test_a_trunk_that_does_not_offer_it_is_named(folder: Path, held: HeldLayers) -> None:
    with serving(held, **{"cache-mb": 0}) as address, ends(folder, address) as (model, _):
        with pytest.raises(TrunkRefused, match=r"does not offer generation with a cache \(limits.cache-mb=0"):
            model.generate(IDS, **{**OPTIONS, "attention_mask": None})


def test_a_trunk_that_does_not_answer_in_time_is_named(
    folder: Path, held: HeldLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = decode.run_pieces
    slow = lambda *args: (time.sleep(1.0), run(*args))[1]  # noqa: E731
    with serving(held) as address, ends(folder, address, timeout_s=0.4) as (model, connection):
        connection.connect()
        monkeypatch.setattr(decode, "run_pieces", slow)
        with pytest.raises(TrunkUnavailable, match="did not answer within trunk.timeout-s=0.4"):
            model.generate(IDS, **{**OPTIONS, "attention_mask": None})


def test_nothing_but_hidden_states_and_small_numbers_is_sent(folder: Path, held: HeldLayers, full: Any) -> None:
    """All bytes of a stream, between node and trunk: rows of real tokens, lengths, room."""
    sent: list[bytes] = []
    with serving(held) as behind, grpc.insecure_channel(behind) as channel:

        class Tap(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                if details.method.endswith("Describe"):
                    call = channel.unary_unary(details.method)
                    return grpc.unary_unary_rpc_method_handler(lambda request, context: call(request))

                def handle(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
                    def noted() -> Iterator[bytes]:
                        for request in requests:
                            sent.append(request)
                            yield request

                    yield from channel.stream_stream(details.method)(noted())

                return grpc.stream_stream_rpc_method_handler(handle)

        tap = grpc.server(ThreadPoolExecutor(4), (Tap(),))
        port = tap.add_insecure_port("127.0.0.1:0")
        tap.start()
        seen: list[Tensor] = []
        with ends(folder, f"127.0.0.1:{port}") as (model, _):
            layer = model.base_model.layers[1]
            layer.register_forward_hook(lambda module, args, out: seen.append(out))
            model.generate(IDS * MASK, num_beams=2, **OPTIONS)
        tap.stop(0).wait()
    kinds = [pb.DecodeRequest.FromString(data).WhichOneof("action") for data in sent]
    assert kinds[0] == "open" and set(kinds[1:]) == {"step", "reorder"}
    steps = [pb.DecodeRequest.FromString(data).step for data in sent if b"" != data]
    rows = [
        wire.decode_rows(step.hidden_states, step.dtype, (), sum(step.lengths), 32) for step in steps if step.lengths
    ]
    real = [seen[0][MASK.repeat_interleave(2, 0).bool()], *(out[:, 0] for out in seen[1:])]
    assert torch.equal(torch.cat(rows), torch.cat(real))
    for data in sent:
        request = pb.DecodeRequest.FromString(data)
        request.step.ClearField("hidden_states")
        assert request.ByteSize() < 40
