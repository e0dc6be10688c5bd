"""What of the log reaches a screen, of `flwr run --stream` or a SuperNode: sentences; tracebacks go to a file."""

import logging
import sys
import traceback
from pathlib import Path

from fl_split.errors import FLSplitError

FLOWER = "flwr"
_OURS = "fl_split.errors."


class FlowerLog(logging.Filter):
    """On Flower's logger: an error of fl-split's own becomes one sentence, and the last; Flower's notes are dropped.

    Flower's strategy loop counts a resumed run's rounds from 1 and prints seventy lines of dictionaries, and its
    simulation prints each node's error with three tracebacks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.file: Path | None = None  # for tracebacks; without one they are dropped
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether Flower's record is shown; may shorten it."""
        path = record.pathname.replace("\\", "/")
        if "/serverapp/strategy/" in path and record.levelno < logging.WARNING:
            return False
        text = record.getMessage()
        if "/fleet/vce/" in path and record.levelno >= logging.ERROR:  # of a simulated node: the round's error has it
            if _OURS in text or "raised when processing a message" in text:
                self._keep(text)
                return False
        if self._said and text.startswith("Exit Code:"):
            self._said = False
            return False
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FLSplitError):
            self._keep("".join(traceback.format_exception(error)))
            where = f"where it was raised: {self.file}\n" if self.file else ""
            record.msg, record.args = f"{where}{type(error).__name__}: {error}", ()
            record.exc_info = record.exc_text = None
            self._said = True
        return True

    def _keep(self, text: str) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(text.rstrip() + "\n\n")


def show_log() -> FlowerLog:
    """Send fl-split's log to standard output, which `flwr run --stream` and a SuperNode show, and quieten Flower's.

    Returns the filter on Flower's log, which wants a file.
    """
    logger = logging.getLogger("fl_split")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.addFilter(lambda record: not hasattr(record, "event"))  # a line per call is for a trunk of its own
        logger.addHandler(handler)
    flower = logging.getLogger(FLOWER)
    for found in flower.filters:
        if isinstance(found, FlowerLog):
            return found
    quiet = FlowerLog()
    flower.addFilter(quiet)
    return quiet


def clock(seconds: float) -> str:
    """Minutes and seconds, such as ``0:48``, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
