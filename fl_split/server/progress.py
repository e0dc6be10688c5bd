"""What is seen while a round runs: a line as each node answers, and institutions by name, not by Flower's ids."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

logger = logging.getLogger(__name__)

_FIRST_WORD_S, _LAST_WORD_S = 30.0, 600.0  # a line at least this often although nobody answers: first, later
_LONGEST_PAUSE_S = 2.0  # between two looks for replies
_AROUND = re.compile(r"^<class '[\w.]+'>:<'|'>$")  # what Flower puts around an error's text
_OUT_OF_MEMORY = re.compile(r"killed due to the node running low on memory|OutOfMemoryError")
_NO_MEMORY = (
    "this machine ran out of memory, and Ray ended the process that simulated it: simulate fewer nodes at once "
    "(--federation-config 'client-resources-num-cpus=N', N of this machine's cores for each), lower train.batch-size "
    "or data.max-length, or end what else runs here"
)
_OWN_NUMBER = re.compile(r"^node (\d+): ")  # as a node's error begins


class Institutions:
    """Names of nodes by Flower's ids: the partition-id that they tell, and what they are registered as.

    Args:
        numbers: Partition-ids that are known from earlier rounds.
    """

    def __init__(self, numbers: Mapping[int, int] | None = None) -> None:
        self._numbers = dict(numbers or {})
        self._registered: dict[int, str] = {}

    def look(self, grid: Grid) -> list[int]:
        """The ids of the nodes that are online; remembers the names that they are registered by."""
        nodes = list(grid.get_nodes())
        self._registered |= {node.node_id: node.name for node in nodes if node.name}
        return [node.node_id for node in nodes]

    def learn(self, node_id: int, number: int) -> None:
        """Remember a node's partition-id."""
        self._numbers[node_id] = number

    def registered(self, node_id: int) -> str:
        """What the operator has registered a node as; empty if nothing is known."""
        return self._registered.get(node_id, "")

    def name(self, node_id: int) -> str:
        """A node for people, such as ``node 0 (hospital-a)``."""
        number, registered = self._numbers.get(node_id), self.registered(node_id)
        if number is None:
            return registered or f"the node with Flower's id {node_id}"
        return f"node {number} ({registered})" if registered else f"node {number}"

    def reason(self, node_id: int, text: str | None) -> str:
        """A node's own words out of an error that came for it, without what Flower and Ray put around them.

        A node that fails in its first round says its number only in there.
        """
        words = _AROUND.sub("", (text or "").strip()).rpartition("occurred. Message: ")[2].strip()
        if _OUT_OF_MEMORY.search(words):  # Ray's own text lists the largest processes of the machine
            return _NO_MEMORY
        if own := _OWN_NUMBER.match(words):
            self.learn(node_id, int(own[1]))
        elif "Traceback" in words:
            words = words.splitlines()[-1].strip()
        return _OWN_NUMBER.sub("", words) or "no reason given"


class WatchedGrid:
    """What Flower's strategy loop needs of a grid, with a word for each reply.

    Args:
        grid: Flower's.
        on_reply: Called with a reply, the number of replies so far, of those that are to come, and the seconds so far.
        on_silence: Called with these numbers when nobody has answered for a while.
    """

    def __init__(
        self,
        grid: Grid,
        on_reply: Callable[[Message, int, int, float], None],
        on_silence: Callable[[int, int, float], None],
    ) -> None:
        self._grid, self._on_reply, self._on_silence = grid, on_reply, on_silence

    def get_nodes(self) -> Iterable[object]:
        """As Flower's."""
        return self._grid.get_nodes()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies, until `timeout` seconds have passed."""
        left = {message_id for message_id in self._grid.push_messages(messages) if message_id}
        started, total, replies = time.monotonic(), len(left), []
        silence_s = _FIRST_WORD_S
        word_at = started + silence_s
        while left:
            for reply in self._grid.pull_messages(left):
                left.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                self._on_reply(reply, len(replies), total, time.monotonic() - started)
            now = time.monotonic()
            if not left or (timeout is not None and now >= started + timeout):
                break
            if now >= word_at:
                self._on_silence(len(replies), total, now - started)
                silence_s = min(2 * silence_s, _LAST_WORD_S)
                word_at = now + silence_s
            pause = min(0.1 + (now - started) / 20, _LONGEST_PAUSE_S)
            time.sleep(pause if timeout is None else min(pause, started + timeout - now))
        return replies
