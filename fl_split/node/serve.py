"""An endpoint on the node that speaks OpenAI's protocol, so that what people have talks to what a node has trained.

Data path: HTTP request -> **checked, framed** -> answers -> trunk -> **JSON, or events as text comes** -> caller.

On loopback by default. Prompts and answers go to whoever called, hidden states to the trunk, and no text to any log.
"""

import asyncio
import hmac
import json
import logging
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fl_split.address import is_loopback
from fl_split.errors import ConfigError, DataError, FLSplitError, TrunkUnavailable
from fl_split.node.answers import Answer, Sampling, answer
from fl_split.node.protocol import Asked, Chat, Completion, Kind, Refused, error_of
from fl_split.node.tuned import Tuned

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request as HttpRequest

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # between two looks whether who asked is still there


def serve(
    tuned: Tuned,
    host: str,
    port: int,
    token_file: str,
    sampling: Sampling,
    said: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: Beyond loopback without a token, a port that cannot be had, or the packages of the extra ``serve``
            are missing.
    """
    token = _token(host, token_file)
    try:
        import uvicorn
    except ImportError:
        raise ConfigError("fl-split serve needs its extra: pip install 'fl-split[serve]'") from None
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    application = endpoint(tuned, sampling, token, local=is_loopback(host))
    said(f"{tuned.name} at http://{host}:{port}/v1, {'with a token' if token else 'without a token, on loopback only'}")
    if not is_loopback(host):
        said("this endpoint speaks plain HTTP: put it behind a proxy with TLS, or whoever is on the way reads along")
    # uvicorn's own words on an error quote the error's, which may hold text: `_answer_errors` says what can be said
    config = uvicorn.Config(application, log_level="critical", access_log=False, ws="none")
    with listening:
        uvicorn.Server(config).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"--host {host} with --port {port}: {error}; choose another port, stop what listens there "
            "('ss -ltnp' shows it), or give an address of this machine"
        ) from None


def _token(host: str, token_file: str) -> str:
    if not token_file:
        if not is_loopback(host):
            raise ConfigError(
                f"--host {host} is beyond loopback: set --api-token-file to a file with a token of your own"
            )
        return ""
    try:
        token = Path(token_file).expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"--api-token-file {token_file} cannot be read ({type(error).__name__})") from None
    if len(token) < 16:
        raise ConfigError(f"--api-token-file {token_file} holds less than 16 characters: anybody could guess it")
    return token


def endpoint(tuned: Tuned, sampling: Sampling, token: str = "", local: bool = True) -> "FastAPI":
    """The application.

    Args:
        tuned: Who answers.
        sampling: Where a request says nothing.
        token: What callers have to bring; empty: nothing.
        local: Take requests to loopback names only, so that no web page can reach it through a name of its own.
    """
    from fastapi import Depends, FastAPI, Header, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def allowed(authorization: Annotated[str, Header()] = "") -> None:
        if token and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "this endpoint needs its token as the API key", "authentication_error")

    app = FastAPI(title="fl-split", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(allowed)])
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    _answer_errors(app)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        entry = {"id": tuned.name, "object": "model", "created": 0, "owned_by": "fl-split"}
        return {"object": "list", "data": [entry]}

    def begin(ask: Asked, ids: list[int]) -> Answer:
        try:
            return answer(tuned, ids, ask.sampling(sampling))
        except DataError as error:
            raise Refused(400, str(error)) from error

    async def reply(ask: Asked, made: Answer, kind: Kind, caller: Request) -> Any:
        if ask.stream:
            usage = ask.stream_options is not None and ask.stream_options.include_usage
            return StreamingResponse(_events(made, kind, usage), media_type="text/event-stream")
        left = asyncio.create_task(_cancel_once_left(caller, made))
        try:
            text = await run_in_threadpool("".join, made)
        except FLSplitError as error:
            raise _failed(error) from error
        finally:
            left.cancel()
        return kind.whole(text, made)

    @app.post("/v1/chat/completions")
    async def chat(ask: Chat, caller: Request) -> Any:
        ask.check(tuned.name)
        try:
            ids = await run_in_threadpool(tuned.encode, [message.framed() for message in ask.messages])
        except DataError as error:
            raise Refused(400, str(error)) from error
        return await reply(ask, begin(ask, ids), Kind(tuned.name, chat=True), caller)

    @app.post("/v1/completions")
    async def completion(ask: Completion, caller: Request) -> Any:
        ask.check(tuned.name)
        ids = await run_in_threadpool(tuned.encode_text, ask.prompt)
        return await reply(ask, begin(ask, ids), Kind(tuned.name, chat=False), caller)

    return app


async def _cancel_once_left(caller: "HttpRequest", made: Answer) -> None:
    while not await caller.is_disconnected():
        await asyncio.sleep(_LOOK_S)
    made.cancel()


def _answer_errors(app: "FastAPI") -> None:
    """Make errors look as OpenAI's do."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    @app.exception_handler(Refused)
    def refused(_: Any, error: Refused) -> JSONResponse:
        return JSONResponse(error_of(str(error), error.kind), error.status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        where = [": ".join([*filter(None, [".".join(map(str, e["loc"][1:]))]), e["msg"]]) for e in error.errors()]
        return JSONResponse(error_of("; ".join(where), "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    def not_here(_: Any, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_of(error.detail, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    def unforeseen(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse(error_of(_unforeseen(error), "server_error"), 500)


def _unforeseen(error: Exception) -> str:
    """Log what nobody foresaw, without its words, which may hold text; returns what the caller is told."""
    frames = traceback.extract_tb(error.__traceback__)
    ways = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-6:]))
    logger.error("a request failed: %s at %s", type(error).__name__, ways)
    return f"this endpoint failed ({type(error).__name__}): its log says where"


def _failed(error: FLSplitError) -> Refused:
    status = 503 if isinstance(error, TrunkUnavailable) else 500
    return Refused(status, str(error), "server_error")


def _events(made: Answer, kind: Kind, usage: bool) -> Iterator[str]:
    """Server-sent events; when the caller is gone, the answer ends."""
    try:
        yield _event(kind.part("", begins=True))
        for text in made:
            yield _event(kind.part(text))
        yield _event(kind.part("", reason=made.reason))
        if usage:
            yield _event(kind.usage(made))
        yield "data: [DONE]\n\n"
    except FLSplitError as error:  # headers are out: the protocol's way is an event
        refused = _failed(error)
        yield _event(error_of(str(refused), refused.kind))
    except Exception as error:  # the outermost frame of a stream
        yield _event(error_of(_unforeseen(error), "server_error"))
    finally:
        made.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
