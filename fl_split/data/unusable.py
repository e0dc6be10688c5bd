"""What is said of a row of which no example can be made."""

from fl_split.data.rows import MALFORMED, kind_of

EMPTY = "empty"


class Unusable(Exception):
    """A row of which no example can be made; `reason` says why, without any of its content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def text_of(value: object, key: str = "") -> str:
    """A value that has to be text; half a character (a lone surrogate) is not.

    Raises:
        Unusable: It is something else.
    """
    if not isinstance(value, str):
        raise Unusable(f"{MALFORMED}: {kind_of(value)} in {key}, where text is expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{MALFORMED}: half a character (a lone surrogate)") from None
    return value
