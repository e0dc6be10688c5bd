"""What is not sent cannot be read: names, dates and numbers replaced on the node, before anything is made of a row.

Data path: rows -> **rows with pseudonyms** -> examples (`examples`). By rules only, which find what they describe and
nothing else: patterns that come with fl-split (`data.redact`), and patterns and a list of words of the node's own
(`redact-rules` in its node-config). Within a row, equal strings get equal pseudonyms, such as ``[date 1]``, so that
text can still be learnt from; across rows they tell nothing.
"""

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_split.config import Data, NodeConfig, absolute
from fl_split.errors import ConfigError

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
KINDS = {  # in this order: what one has replaced, the next does not see
    "email": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "url": r"(?:https?://|www\.)\S+",
    "date": rf"\b(?:\d{{1,2}}([./-])\d{{1,2}}\1\d{{2,4}}|\d{{4}}-\d{{2}}-\d{{2}}|\d{{1,2}}\.? {_MONTH}\.? \d{{4}}"
    rf"|{_MONTH}\.? \d{{1,2}},? \d{{4}})\b",
    "phone": r"(?<![\w.])(?:\+\d{1,3}[ /.-]?)?(?:\(\d+\)[ /.-]?)?\d{2,5}(?:[ /-]\d{2,8}){1,4}(?![\w])",
    "number": r"(?<![\w.,])\d{5,}(?![\w])",
}
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_EXPECTED = "expected [patterns] with kind = 'regular expression', and words = \"/a/file/with/words\""


class Redactor:
    """Replaces what rules find, row by row, and counts it."""

    def __init__(self, patterns: Mapping[str, str], words: frozenset[str]) -> None:
        """Take rules.

        Args:
            patterns: Regular expressions by kind, in their order.
            words: In lower case; each is replaced where it stands as a whole word.
        """
        self._patterns = {kind: re.compile(pattern) for kind, pattern in patterns.items()}
        self._words = words
        rules = repr((sorted(patterns.items()), sorted(words)))
        self.identity = hashlib.sha256(rules.encode()).hexdigest()
        self.counts = Counter[str]()  # by kind

    def row(self, values: Mapping[str, Any], columns: frozenset[str]) -> dict[str, Any]:
        """A row with pseudonyms in some of its columns."""
        known: dict[tuple[str, str], str] = {}
        return {key: self._any(value, known) if key in columns else value for key, value in values.items()}

    def text(self, text: str) -> str:
        """A text with pseudonyms, as a row of its own."""
        return self._text(text, {})

    def _any(self, value: Any, known: dict[tuple[str, str], str]) -> Any:
        if isinstance(value, str):
            return self._text(value, known)
        if isinstance(value, list):
            return [self._any(item, known) for item in value]
        if isinstance(value, dict):  # a message: who speaks stays
            return {k: v if k in ("role", "from") else self._any(v, known) for k, v in value.items()}
        return value

    def _text(self, text: str, known: dict[tuple[str, str], str]) -> str:
        for kind, pattern in self._patterns.items():
            text = pattern.sub(lambda match, kind=kind: self._name(kind, match[0], known), text)  # type: ignore[misc]
        return _WORD.sub(lambda match: self._word(match[0], known), text) if self._words else text

    def _word(self, word: str, known: dict[tuple[str, str], str]) -> str:
        return self._name("name", word, known) if word.casefold() in self._words else word

    def _name(self, kind: str, found: str, known: dict[tuple[str, str], str]) -> str:
        self.counts[kind] += 1
        number = 1 + sum(other == kind for other, _ in known)
        return known.setdefault((kind, found.casefold()), f"[{kind} {number}]")


def redactor(config: Data, node: NodeConfig) -> Redactor | None:
    """What a run and a node want replaced; None if that is nothing.

    Raises:
        ConfigError: The node's rules cannot be read, or are none.
    """
    patterns = {kind: KINDS[kind] for kind in KINDS if kind in config.redacted}
    words: frozenset[str] = frozenset()
    if node.redact_rules:
        own, words = _read_rules(absolute("redact-rules", node.redact_rules))
        patterns = own | patterns  # its own come first
    return Redactor(patterns, words) if patterns or words else None


def columns_of(config: Data) -> frozenset[str]:
    """The columns that examples are made of, but for labels."""
    return frozenset({config.prompt, config.response, config.text, config.messages} - {""})


def _read_rules(file: Path) -> tuple[dict[str, str], frozenset[str]]:
    rules = _read(file, tomllib.loads)
    patterns, words = rules.pop("patterns", {}), rules.pop("words", "")
    if rules or not isinstance(patterns, dict) or not isinstance(words, str) or not (patterns or words):
        raise ConfigError(f"redact-rules={str(file)!r} is not understood: {_EXPECTED}")
    for kind, pattern in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError):
            raise ConfigError(f"redact-rules={str(file)!r}: {kind!r} is no regular expression; {_EXPECTED}") from None
    listed = _read(absolute("words", words), str.split) if words else []
    return patterns, frozenset(word.casefold() for word in listed)


def _read(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}), which redact-rules names") from None
