"""An audit as one page for people."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from fl_split.tools.html import document, table

NOISE = "a node cannot be protected from the trunk's operator by noise"

FIGURES = {
    "readable": "tokens read, by the better of the two attacks",
    "one-shot-top-1": "each hidden state by itself: the first guess is right",
    "one-shot-top-10": "... one of ten guesses is right",
    "sequence-top-1": "one token after another, each tried after those before it",
    "exact-sequences": "whole examples without a wrong token",
    "digits": "tokens with digits",
    "capitalised": "tokens that begin with a capital, such as names",
    "rare": "tokens that the attacker's public text lacks",
    "canary-fields": "planted names, dates, numbers and addresses, whole",
    "membership-auc": "of a row trained on and one held out, the adapter tells which is which (guessing: 50 %)",
    "membership-error": "... one standard error of that",
}
CONTROLS = {
    "control-no-defence": "the attack where nothing defends: must be above 95 %",
    "control-prior-alone": "guessing by the language model alone, given all that precedes",
    "control-shuffled": "hidden states of other positions: what chance gives",
}
_SETTING = {
    "model": "model",
    "split": "layers on the node",
    "wire-dtype": "numbers on the wire",
    "adapter": "with the adapter of a run",
    "drift": "how far the adapter moves hidden states, as the attacker sees it",
    "noise": "noise, relative to hidden states",
    "passes": "times that an example is sent",
    "sent-again": "hidden states that had been sent before, of all in the ledger",
    "ledger-head": "last hash of the ledger in which that was counted",
    "examples": "examples looked at",
    "tokens": "tokens of these",
    "audit-s": "seconds that all of it took",
    "fl-split": "fl-split",
}


def rows_of(report: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Lines of a table: what it is, and how much."""
    return [(text, shown(key, report[key])) for key, text in names.items() if key in report]


def shown(key: str, value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, bool) or not isinstance(value, float):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    if math.isnan(value):
        return "not looked at"
    return f"{value:.4g}" if key in ("noise", "audit-s") else f"{100 * value:.1f} %"


def summary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures and controls, for a terminal."""
    return rows_of(report, {**FIGURES, **CONTROLS})


def page(report: Mapping[str, Any]) -> str:
    """All of it, as HTML."""
    parts = "".join(
        f"<h3>{title}</h3>{table(rows_of(report, names))}"
        for title, names in (("What was read", FIGURES), ("Controls", CONTROLS), ("Looked at", _SETTING))
    )
    return document(
        "fl-split audit",
        f"<h1>{escape(str(report['verdict']).capitalize())}</h1>"
        "<p>By attacks that know the public base model and the split, but no adapter, no seed and no text of this "
        "node. Better attacks may read more: this is a lower bound, and no figure here says that something cannot be "
        f"read. To add noise does not change that: {NOISE}. What helps is not to send what must not be read, "
        "to send the rest once, and to choose and bind whoever runs the trunk.</p>"
        f"{parts}",
    )
