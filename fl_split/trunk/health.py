"""Health and reflection: answered without a token, so they get little. They hold nothing of anybody.

A message of theirs has a few bytes, one of `trunk.proto` may have a hundred megabytes, and gRPC has one limit for all:
so they are received by turns, as calls are, but with a gate of their own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from fl_split import wire
from fl_split.trunk.admission import Gate
from fl_split.trunk.calls import Call, NoMessage, Refusal
from fl_split.trunk.config import Limits

_LIMITS = Limits(calls=128, calls_per_caller=32, reading=4, reading_per_caller=2)
_MESSAGE_BYTES = 4096
_TIMEOUT_S = 10.0  # of a message
_NAMES = (wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
_Status = health_pb2.HealthCheckResponse


class OpenServices:
    """`grpc.health.v1` and reflection. Lives in one event loop."""

    def __init__(self) -> None:
        self._gate = Gate(_LIMITS)
        self._status = _Status.NOT_SERVING
        self._changed = asyncio.Event()  # replaced at each change
        self._ending = False
        self._reflection = reflection.aio.ReflectionServicer(_NAMES)

    def set_ready(self, ready: bool) -> None:
        """Tell everybody."""
        self._status = _Status.SERVING if ready else _Status.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """Tell those who watch that it is over, and end their calls: a server that stops waits for its calls."""
        self._ending = True
        self.set_ready(False)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """The methods, as streams of bytes."""
        methods = {
            health.SERVICE_NAME: {"Check": self._check, "Watch": self._watch},
            reflection.SERVICE_NAME: {"ServerReflectionInfo": self._reflect},
        }
        return [
            grpc.method_handlers_generic_handler(
                service,
                {name: grpc.stream_stream_rpc_method_handler(self._wrap(name, f)) for name, f in answers.items()},
            )
            for service, answers in methods.items()
        ]

    def _wrap(self, name: str, answer: Callable[[Call], Coroutine[Any, Any, None]]) -> Any:
        async def handle(_: Any, context: grpc.aio.ServicerContext) -> None:
            call = Call(name, context, caller=context.peer().rpartition(":")[0])
            try:
                async with self._gate.call(call.caller):
                    await answer(call)
            except Exception as error:  # the outermost frame
                Refusal.of(error, call.id).answer(context)

        return handle

    async def _read(self, call: Call) -> bytes:
        async with self._gate.reading(call.caller):
            return await call.read(_TIMEOUT_S, _MESSAGE_BYTES)

    async def _service(self, call: Call) -> str:
        return str(health_pb2.HealthCheckRequest.FromString(await self._read(call)).service)

    async def _check(self, call: Call) -> None:
        if await self._service(call) not in (health.OVERALL_HEALTH, wire.SERVICE):
            call.context.set_code(grpc.StatusCode.NOT_FOUND)
            return
        await call.context.write(_Status(status=self._status).SerializeToString())

    async def _watch(self, call: Call) -> None:
        known = await self._service(call) in (health.OVERALL_HEALTH, wire.SERVICE)
        last = None
        while True:
            changed, status = self._changed, self._status if known else _Status.SERVICE_UNKNOWN
            if status != last:
                await call.context.write(_Status(status=status).SerializeToString())
                last = status
            if self._ending:
                return
            await changed.wait()

    async def _reflect(self, call: Call) -> None:
        async def requests() -> AsyncIterator[Any]:
            try:
                while True:
                    yield reflection_pb2.ServerReflectionRequest.FromString(await self._read(call))
            except NoMessage:
                return

        async for reply in self._reflection.ServerReflectionInfo(requests(), call.context):
            await call.context.write(reply.SerializeToString())
