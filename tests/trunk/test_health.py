"""Health and reflection: what they say, when, and how little they take."""

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from trunk_service import Gated, forward, request, running, serving, wait_until

from fl_split import wire
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers

_Code = grpc.StatusCode


def test_health_and_reflection(held: HeldLayers) -> None:
    with serving(held) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", wire.SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        assert wire.SERVICE in {service.name for service in answer.list_services_response.service}
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=wire.SERVICE)
        [answer] = list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        assert b"ForwardRequest" in answer.file_descriptor_response.file_descriptor_proto[0]


def test_health_and_reflection_take_little(held: HeldLayers) -> None:
    """They need no token: neither large messages nor many open calls must get far."""
    with running(held, server={"drain-s": 20.0}) as (trunk, channel):
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError, match="expected at most 4096") as error:
            health.Check(health_pb2.HealthCheckRequest(service="x" * 200_000), timeout=5)
        assert error.value.code() is _Code.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5)
        assert error.value.code() is _Code.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="x"), timeout=30)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 200_000)
        with pytest.raises(grpc.RpcError, match="expected at most 4096"):
            list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(40)]
        wait_until(lambda: sum(watch.done() for watch in watches) == 9)  # 32 calls of one caller, one is open
        assert {watch.code() for watch in watches if watch.done()} == {_Code.RESOURCE_EXHAUSTED}
        assert forward(channel)(request(), timeout=5)
        started = time.monotonic()
    assert time.monotonic() - started < 5  # watches do not make a drain longer


def test_a_server_is_ready_only_when_warm_and_not_while_it_drains(held: HeldLayers) -> None:
    async def main() -> list[int]:
        gated = Gated.of(held)
        running = server.TrunkServer(gated, TrunkConfig.model_validate({"server": {"port": 0}}))
        seen = []
        await running.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            call = channel.unary_unary(f"/{wire.SERVICE}/Forward", None, None)

            async def status() -> int:
                return (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status

            seen.append(await status())
            await running.warm_up()
            seen.append(await status())
            watch = health.Watch(health_pb2.HealthCheckRequest(service=wire.SERVICE), timeout=30)
            assert (await watch.read()).status == seen[-1]
            before = gated.close()
            open_call = call(request(), timeout=30)
            while len(gated.lengths) == before:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(running.drain())
            seen.append((await watch.read()).status)
            assert await watch.read() is grpc.aio.EOF  # it does not wait for those who watch
            assert not draining.done()
            gated.gate.set()
            assert len(await open_call) > 0
            await draining
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(request(), timeout=1)
            assert error.value.code() is _Code.UNAVAILABLE
        return seen

    not_serving, is_serving = (
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
    )
    assert asyncio.run(main()) == [not_serving, is_serving, not_serving]
