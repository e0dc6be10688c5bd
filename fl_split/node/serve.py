"""An endpoint on the node that speaks OpenAI's protocol, so that what people have talks to what a node has trained.

Data path: HTTP request -> **checked, framed** -> answers -> trunk -> **JSON, or events as text comes** -> caller.

On loopback by default. Prompts and answers go to whoever called, hidden states to the trunk, and no text to any log.
"""

import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fl_split.address import is_loopback
from fl_split.errors import ConfigError, DataError, FLSplitError, TrunkUnavailable
from fl_split.node.answers import Answer, Sampling, answer
from fl_split.node.tuned import Tuned

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_REFUSED = {  # fields that would change an answer, and what they mean when they ask for nothing
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
}


class _Refused(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completions have."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling(self, default: Sampling) -> Sampling:
        """The defaults with what is asked for."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return replace(
            default,
            max_tokens=self.max_completion_tokens or self.max_tokens or default.max_tokens,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            stop=tuple(s for s in stop if s),
            seed=default.seed if self.seed is None else self.seed,
        )

    def check(self, served: str) -> None:
        """Refuse what cannot be done, rather than do something else."""
        if self.model and self.model != served:
            raise _Refused(404, f"there is no model {self.model!r} here: this endpoint serves {served!r}")
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise _Refused(400, f"{name} is not supported by this endpoint: leave it out")


class Chat(Request):
    """A request of /v1/chat/completions."""

    messages: list[Message]


class Completion(Request):
    """A request of /v1/completions."""

    prompt: str


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
        ConfigError: Beyond loopback without a token, or the packages of the extra ``serve`` are missing.
    """
    token = _token(host, token_file)
    try:
        import uvicorn
    except ImportError:
        raise ConfigError("fl-split serve needs its extra: pip install 'fl-split[serve]'") from None
    application = endpoint(tuned, sampling, token, local=is_loopback(host))
    said(f"{tuned.name} at http://{host}:{port}/v1, {'with a token' if token else 'without a token, on loopback only'}")
    if not is_loopback(host):
        said("this endpoint speaks plain HTTP: put it behind a proxy with TLS, or whoever is on the way reads along")
    uvicorn.run(application, host=host, port=port, log_level="warning", access_log=False, ws="none")


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
    from fastapi import Depends, FastAPI, Header
    from fastapi.responses import StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def allowed(authorization: Annotated[str, Header()] = "") -> None:
        if token and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise _Refused(401, "this endpoint needs its token as the API key", "authentication_error")

    app = FastAPI(title="fl-split", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(allowed)])
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    _answer_errors(app)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        entry = {"id": tuned.name, "object": "model", "created": 0, "owned_by": "fl-split"}
        return {"object": "list", "data": [entry]}

    def reply(request: Request, ids: list[int], kind: _Kind) -> Any:
        try:
            made = answer(tuned, ids, request.sampling(sampling))
        except DataError as error:
            raise _Refused(400, str(error)) from error
        if request.stream:
            usage = request.stream_options is not None and request.stream_options.include_usage
            return StreamingResponse(_events(made, kind, usage), media_type="text/event-stream")
        try:
            text = "".join(made)
        except FLSplitError as error:
            raise _failed(error) from error
        return kind.whole(text, made)

    @app.post("/v1/chat/completions")
    def chat(request: Chat) -> Any:
        request.check(tuned.name)
        try:
            ids = tuned.encode([message.model_dump() for message in request.messages])
        except DataError as error:
            raise _Refused(400, str(error)) from error
        return reply(request, ids, _Kind(tuned.name, chat=True))

    @app.post("/v1/completions")
    def completion(request: Completion) -> Any:
        request.check(tuned.name)
        return reply(request, tuned.encode_text(request.prompt), _Kind(tuned.name, chat=False))

    return app


def _answer_errors(app: "FastAPI") -> None:
    """Make errors look as OpenAI's do."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    @app.exception_handler(_Refused)
    def refused(_: Any, error: _Refused) -> JSONResponse:
        return JSONResponse(_error(str(error), error.kind), error.status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        where = [".".join(str(part) for part in e["loc"][1:]) + f": {e['msg']}" for e in error.errors()]
        return JSONResponse(_error("; ".join(where), "invalid_request_error"), 400)


def _failed(error: FLSplitError) -> _Refused:
    status = 503 if isinstance(error, TrunkUnavailable) else 500
    return _Refused(status, str(error), "server_error")


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Kind:
    """How chat and plain completions look; one object for one answer."""

    def __init__(self, model: str, chat: bool) -> None:
        self._model, self._chat = model, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _frame(self, part: bool, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        name = ("chat.completion.chunk" if part else "chat.completion") if self._chat else "text_completion"
        about = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return {**about, "choices": list(choices), **more}

    def whole(self, text: str, made: Answer) -> dict[str, Any]:
        """The answer at once."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, "finish_reason": made.reason, "logprobs": None, **content}
        return self._frame(False, [choice], usage=_usage(made))

    def part(self, text: str, reason: str | None = None, begins: bool = False) -> dict[str, Any]:
        """A piece of it."""
        role = {"role": "assistant"} if begins else {}
        content = {"delta": {**role, **({"content": text} if text else {})}} if self._chat else {"text": text}
        return self._frame(True, [{"index": 0, "finish_reason": reason, "logprobs": None, **content}])

    def usage(self, made: Answer) -> dict[str, Any]:
        """What it took, as the last piece."""
        return self._frame(True, [], usage=_usage(made))


def _usage(made: Answer) -> dict[str, int]:
    prompt, completion = made.num_prompt_tokens, made.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(made: Answer, kind: _Kind, usage: bool) -> Iterator[str]:
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
        yield _event(_error(str(refused), refused.kind))
    finally:
        made.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
