"""The endpoint, driven by OpenAI's own client: answers, streams, usage, errors in its format."""

import json
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from openai import OpenAI
from test_tuned import QUESTIONS, adapter, address, expected, full  # noqa: F401  # fixtures

from fl_split.errors import ConfigError, TrunkUnavailable
from fl_split.node import serve as serving
from fl_split.node.answers import Sampling
from fl_split.node.serve import endpoint, serve
from fl_split.node.tuned import Tuned, load_tuned

TOKEN = "a-token-of-some-length"


@contextmanager
def running(tuned: Tuned, token: str = "") -> Iterator[OpenAI]:
    application = endpoint(tuned, Sampling(16), token)
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token or "unused", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture
def tuned(adapter: Path, address: str) -> Iterator[Tuned]:  # noqa: F811
    with load_tuned(adapter, address) as tuned:
        yield tuned


@pytest.fixture
def client(tuned: Tuned) -> Iterator[OpenAI]:
    with running(tuned) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["adapter"]


def test_chat(client: OpenAI, full: Any, demo_model: Path) -> None:  # noqa: F811
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    made = client.chat.completions.create(model="adapter", messages=messages, max_tokens=12)
    text = expected(full, demo_model, QUESTIONS[0], 12)
    assert made.choices[0].message.content == text
    assert made.choices[0].message.role == "assistant"
    assert made.usage is not None and made.usage.completion_tokens <= 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.choices[0].finish_reason == ("length" if made.usage.completion_tokens == 12 else "stop")
    parts = list(
        client.chat.completions.create(
            model="adapter", messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == made.choices[0].finish_reason
    assert parts[-1].usage == made.usage


def test_completions(client: OpenAI) -> None:
    made = client.completions.create(model="adapter", prompt=f"{QUESTIONS[0]}\n", max_tokens=10)
    parts = client.completions.create(model="adapter", prompt=f"{QUESTIONS[0]}\n", max_tokens=10, stream=True)
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text != ""
    word = made.choices[0].text.split()[1]
    stopped = client.completions.create(model="adapter", prompt=f"{QUESTIONS[0]}\n", max_tokens=10, stop=word)
    assert stopped.choices[0].text == made.choices[0].text[: made.choices[0].text.index(word)]


def test_sampling_is_seeded(client: OpenAI) -> None:
    texts = [
        client.completions.create(model="adapter", prompt="What\n", temperature=1.5, top_p=0.9, seed=seed)
        .choices[0]
        .text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_several_callers_at_once(client: OpenAI, full: Any, demo_model: Path) -> None:  # noqa: F811
    found: dict[str, Any] = {}

    def ask(question: str) -> None:
        messages: Any = [{"role": "user", "content": question}]
        found[question] = client.chat.completions.create(model="adapter", messages=messages).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {question: expected(full, demo_model, question, 16) for question in QUESTIONS}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "serves 'adapter'"),
        ({"n": 2}, openai.BadRequestError, "n is not supported"),
        ({"logprobs": 3}, openai.BadRequestError, "logprobs is not supported"),
        ({"prompt": "private words " * 300}, openai.BadRequestError, "a prompt has 2... tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input should be greater"),
    ],
)
def test_what_cannot_be_done_is_refused(client: OpenAI, options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        client.completions.create(**{"model": "adapter", "prompt": "private words", **options})
    assert "private" not in str(caught.value)


HALF = chr(0xD800)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "match"),
    [
        ("POST", "chat/completions", "{", 400, "JSON decode error"),
        ("POST", "chat/completions", "null", 400, "Field required"),
        ("POST", "chat/completions", "[" * 100_000, 400, "parsing the body"),
        ("POST", "completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens: Input should be greater"),
        ("POST", "completions", '{"prompt": "a", "max_tokens": ' + "9" * 5000 + "}", 400, "parsing the body"),
        ("POST", "completions", {"prompt": "a", "stop": [HALF]}, 400, "stop.*half of a letter"),
        ("POST", "chat/completions", {"messages": [{"role": HALF, "content": "a"}]}, 400, "role: .*half of a letter"),
        (
            "POST",
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "'text'",
        ),
        ("GET", "completions", "", 405, "Method Not Allowed"),
        ("POST", "embeddings", {}, 404, "Not Found"),
    ],
)
def test_whatever_is_refused_is_refused_in_their_format(
    client: OpenAI, method: str, path: str, body: Any, status: int, match: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    response = httpx.request(
        method, f"{client.base_url}{path}", content=text, headers={"Content-Type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert re.search(match, error["message"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_is_an_error_in_their_format_and_no_text_in_a_log(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("private words")

    monkeypatch.setattr(tuned.model, "generate", fails)
    with running(tuned) as client, pytest.raises(openai.APIError, match="RuntimeError") as caught:
        list(client.completions.create(model="adapter", prompt="a", stream=stream))  # type: ignore[call-overload]
    assert "private" not in str(caught.value)
    (line,) = [record for record in caplog.records if record.name == "fl_split.node.serve"]
    assert re.search(r"a request failed: RuntimeError at test_serve\.py:\d+ <- answers\.py", line.getMessage())
    assert "private" not in line.getMessage() and line.exc_info is None


def test_text_may_come_in_parts(client: OpenAI) -> None:
    def ask(content: Any) -> str | None:
        messages: Any = [{"role": "user", "content": content}]
        return client.chat.completions.create(model="adapter", messages=messages).choices[0].message.content

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "asthma?"}]
    assert ask(parts) == ask("What is asthma?")


def test_messages_that_cannot_be_framed_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="expected messages with a role"):
        client.chat.completions.create(model="adapter", messages=[])


def test_a_token_is_asked_for(tuned: Tuned) -> None:
    with running(tuned, TOKEN) as client:
        assert len(list(client.models.list())) == 1
        with pytest.raises(openai.AuthenticationError, match="needs its token"):
            client.with_options(api_key="another").models.list()


def test_a_page_under_another_name_does_not_reach_it(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="400"):
        client.models.list(extra_headers={"Host": "evil.example"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_trunk_that_is_gone_is_an_error_in_their_format(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def gone(*args: Any, **options: Any) -> Any:
        raise TrunkUnavailable("no trunk answers")

    monkeypatch.setattr(tuned.model, "generate", gone)
    with running(tuned) as client, pytest.raises(openai.APIError, match="no trunk answers"):
        list(client.completions.create(model="adapter", prompt="a", stream=stream))  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_ends_its_answer(tuned: Tuned, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    lengths: queue.SimpleQueue[int] = queue.SimpleQueue()
    generate = tuned.model.generate

    def watched(**options: Any) -> Any:
        def slow(ids: Any, scores: Any) -> Any:
            began.set()
            time.sleep(0.05)
            scores[:, tuned.tokenizer.eos_token_id] = -torch.inf
            return scores

        out = generate(**{**options, "logits_processor": [slow]})
        lengths.put(out.shape[1])
        return out

    began = threading.Event()
    monkeypatch.setattr(tuned.model, "generate", watched)
    with running(tuned) as client:
        body = {"prompt": "What\n", "max_tokens": 200, "stream": stream}
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as caller:
            text = json.dumps(body)
            caller.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
            )
            assert began.wait(20)
        assert lengths.get(timeout=20) < 100


def test_beyond_loopback_a_token_is_a_must(tuned: Tuned, tmp_path: Path) -> None:
    def begin(host: str, file: Path | str = "") -> None:
        serve(tuned, host, 0, str(file), Sampling())

    with pytest.raises(ConfigError, match="set --api-token-file"):
        begin("0.0.0.0")
    with pytest.raises(ConfigError, match="cannot be read"):
        begin("0.0.0.0", tmp_path / "none")
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(ConfigError, match="less than 16 characters"):
        begin("0.0.0.0", tmp_path / "short")


def test_what_is_said_at_start(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: seen.append((self.config, sockets[0].getsockname()))
    )
    lines: list[str] = []
    serve(tuned, "127.0.0.1", 0, "", Sampling(), lines.append)
    assert lines == [f"adapter at http://127.0.0.1:{seen[0][1][1]}/v1, without a token, on loopback only"]
    (tmp_path / "token").write_text(TOKEN)
    serve(tuned, "0.0.0.0", 0, str(tmp_path / "token"), Sampling(), lines.append)
    assert "with a token" in lines[1] and "plain HTTP" in lines[2]
    assert [config.access_log for config, _ in seen] == [False, False]


def test_a_port_that_cannot_be_had_is_named_before_anything_is_promised(tuned: Tuned) -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: .*in use.*; choose another port"):
            serve(tuned, "127.0.0.1", port, "", Sampling(), lines.append)
    assert lines == []


def test_without_the_extra_it_says_so(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'fl-split\[serve\]'"):
        serving.serve(tuned, "127.0.0.1", 8000, "", Sampling())
