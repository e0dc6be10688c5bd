"""What became of a node's rows, for its own eyes: numbers and places, never content."""

from collections.abc import Iterable
from dataclasses import dataclass, field

PLACES = 5  # bad rows that are named, of each kind


@dataclass
class Report:
    """What became of a node's rows: numbers and places, never content."""

    path: str = ""  # where they are
    template: str = ""  # how prompt and response were put together, for a person; "" where there are none
    num_rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # reason -> rows that were left out
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first of them
    remarks: dict[str, int] = field(default_factory=dict)  # on rows that are used -> how many
    notes: list[str] = field(default_factory=list)  # on files
    num_truncated: int = 0  # examples that data.max-length cut
    num_cut: int = 0  # tokens that it cut off
    num_copies: int = 0  # examples whose row is equal to an earlier one
    num_classes: int = 0  # that occur, where each example has one
    unread: list[str] = field(default_factory=list)  # the first row's other columns: for the node's own eyes
    redacted: dict[str, int] = field(default_factory=dict)  # kind -> strings that were replaced
    forced: dict[str, bool] = field(default_factory=dict)  # sides that no hash decided, so that neither is empty

    @property
    def num_bad(self) -> int:
        """Rows that were left out."""
        return sum(self.bad.values())

    def explain(self, reasons: Iterable[str]) -> str:
        """Such as ``2 malformed (a.jsonl line 7, a.jsonl line 9)``."""
        parts = []
        for reason in reasons:
            more = ", ..." if self.bad[reason] > PLACES else ""
            parts.append(f"{self.bad[reason]} {reason} ({', '.join(self.places[reason])}{more})")
        return "; ".join(parts)

    def say_redacted(self) -> str:
        """Such as ``12 date, 3 email``."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.redacted.items()))

    def all_notes(self) -> list[str]:
        """Whatever a person should know of what was read, beside bad rows."""
        one = ["all examples are of one class, of those that data.labels names"] if self.num_classes == 1 else []
        return [*self.notes, *one, *(f"{count} {remark}" for remark, count in self.remarks.items())]

    def unread_columns(self) -> str:
        """Columns beside those that are read; "" if there are none. Names may be data: not for the server."""
        more = ", ..." if len(self.unread) > PLACES else ""
        return f"columns that are not read: {', '.join(self.unread[:PLACES])}{more}" if self.unread else ""
