"""What OpenAI's protocol asks and gets: the shapes of requests, replies and errors."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fl_split.node.answers import Answer, Sampling

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


class Refused(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def _whole_letters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a letter, which JSON can spell and no text holds") from None
    return text


_Stop = Annotated[str, AfterValidator(_whole_letters)]


class TextPart(BaseModel):
    """A part of a message; there is no other kind here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, AfterValidator(_whole_letters)]
    content: str | list[TextPart]

    def framed(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of completions have."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: _Stop | list[_Stop] | None = None
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
            raise Refused(404, f"there is no model {self.model!r} here: this endpoint serves {served!r}")
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise Refused(400, f"{name} is not supported by this endpoint: leave it out")


class Chat(Asked):
    """A request of /v1/chat/completions."""

    messages: list[Message]


class Completion(Asked):
    """A request of /v1/completions."""

    prompt: str


class Kind:
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


def error_of(message: str, kind: str) -> dict[str, Any]:
    """An error as an answer."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
