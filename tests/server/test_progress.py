"""What is seen of a round while it runs, and whose error it was."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fl_split.errors import RoundFailed
from fl_split.log import FlowerLog, clock
from fl_split.server import progress
from fl_split.server.progress import Institutions, WatchedGrid


def grid_of(*names: str) -> Grid:
    nodes = [SimpleNamespace(node_id=1000 + i, name=name) for i, name in enumerate(names)]
    return cast(Grid, SimpleNamespace(get_nodes=lambda: nodes))


OUT_OF_MEMORY = "killed due to the node running low on memory"  # by Ray


def test_institutions_go_by_number_and_registered_name() -> None:
    known = Institutions({1000: 4})
    assert known.look(grid_of("hospital-a", "hospital-b", "")) == [1000, 1001, 1002]
    assert known.name(1000) == "node 4 (hospital-a)"
    assert known.name(1001) == "hospital-b"
    assert known.name(1002) == "the node with Flower's id 1002"
    known.learn(1002, 7)
    assert known.name(1002) == "node 7"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<class 'fl_split.errors.DataError'>:<'node 3: no rows:\n  a.jsonl'>", "no rows:\n  a.jsonl"),
        ("<class 'a.B'>:<'\nException ClientAppException occurred. Message: node 3: no trunk'>", "no trunk"),
        ("<class 'ray.X'>:<'Traceback\n  File\nValueError: x'>", "ValueError: x"),
        ("Error: Node Unavailable", "Error: Node Unavailable"),
        (f"1 worker(s) were {OUT_OF_MEMORY}. Top 10 users: 9 2.03 python /home/x/secret.py", progress._NO_MEMORY),
        (None, "no reason given"),
    ],
)
def test_a_nodes_error_is_one_sentence_and_tells_its_number(text: str | None, reason: str) -> None:
    known = Institutions()
    assert known.reason(1, text) == reason
    assert known.name(1) == ("node 3" if text and "node 3" in text else "the node with Flower's id 1")


def test_each_reply_is_told_as_it_comes_and_so_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    monkeypatch.setattr(progress, "_FIRST_WORD_S", 0.05)
    messages = [Message(RecordDict(), dst_node_id=i, message_type="train") for i in (5, 6)]
    looks: list[set[str]] = []

    def pull(ids: set[str]) -> list[Message]:
        looks.append(set(ids))
        found = {1: "a", 4: "b"}.get(len(looks))
        if found is None:
            return []
        message = messages["ab".index(found)]
        message.metadata.__dict__["_message_id"] = found
        return [Message(Error(2, "x"), reply_to=message)]

    said: list[Any] = []
    grid = cast(Grid, SimpleNamespace(push_messages=lambda messages: ["a", "b", None], pull_messages=pull))
    watched = WatchedGrid(grid, lambda reply, *counts: said.append(counts[:2]), lambda *counts: said.append("silence"))
    assert len(watched.send_and_receive(messages, timeout=30)) == 2
    assert (said[0], said[-1]) == ((1, 2), (2, 2)) and "silence" in said[1:-1]
    assert looks[0] == {"a", "b"} and looks[-1] == {"b"}


def test_seconds_are_read_like_a_clock() -> None:
    assert [clock(s) for s in (0.9, 48, 61, 3723)] == ["0:00", "0:48", "1:01", "1:02:03"]


def record(path: str, level: int, text: str, error: BaseException | None = None) -> logging.LogRecord:
    return logging.LogRecord("flwr", level, path, 1, text, (), (type(error), error, None) if error else None)


def test_flowers_screen_ends_with_our_sentence_and_the_traceback_is_in_a_file(tmp_path: Any) -> None:
    log = FlowerLog()
    log.file = tmp_path / "errors.log"
    error = RoundFailed("round 1: 0 nodes finished")
    raised = record("flwr/simulation/app.py", logging.ERROR, "Simulation raised an exception", error)
    assert log.filter(raised)
    assert raised.getMessage() == f"where it was raised: {log.file}\nRoundFailed: round 1: 0 nodes finished"
    assert raised.exc_info is None
    assert not log.filter(record("flwr/supercore/exit.py", logging.ERROR, "Exit Code: 700\nAn unhandled"))
    node = "Traceback ... fl_split.errors.DataError: node 1: no rows"
    assert not log.filter(record("flwr/server/superlink/fleet/vce/vce_api.py", logging.ERROR, node))
    assert "RoundFailed" in log.file.read_text() and "no rows" in log.file.read_text()


def test_flowers_own_notes_on_rounds_are_dropped_and_its_warnings_and_errors_are_not() -> None:
    log = FlowerLog()
    assert not log.filter(record("flwr/serverapp/strategy/strategy.py", logging.INFO, "[ROUND 1/1]"))
    assert log.filter(record("flwr/serverapp/strategy/fedavg.py", logging.WARNING, "something is wrong"))
    assert log.filter(record("flwr/server/superlink/fleet/vce/vce_api.py", logging.ERROR, "ActorDiedError"))
    other = record("flwr/simulation/app.py", logging.ERROR, "raised", ValueError("a bug"))
    assert log.filter(other) and other.exc_info is not None
    assert log.filter(record("flwr/supercore/exit.py", logging.ERROR, "Exit Code: 700"))
