"""`fl-split report --privacy`: one page for an institution's data-protection officer, from what lies on the node.

What left and to whom is the ledger's; how much of it can be read is an audit's. Nothing is sent, and no text is shown.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from fl_split import __version__
from fl_split.attestation import Statement
from fl_split.config import UNCOVERED
from fl_split.errors import NodeStateError
from fl_split.node.account import read_charges
from fl_split.node.ledger import NAME, Sums, read_ledger, say_passes
from fl_split.tools.audit.page import CONTROLS, FIGURES, NOISE, rows_of
from fl_split.tools.html import document, heading, table

_SEEN = {
    "hidden-states": "hidden states after the bottom, from which text can be read",
    "hidden-states-and-gradient": "hidden states, and the gradient of the private loss",
    "hidden-states-and-gradient-share": "hidden states, and one of two shares of the gradient of the private loss",
    "generation": "hidden states of questions and answers, from which text can be read",
    "question": "what the trunk holds; nothing of this node",
    "shared-adapter": "weights trained on private text, from which parts of it may be found",
    "key": "a public key for masks over shared weights; nothing of this node's text",
    "metrics": "numbers about the round",
    "node": "name and scale of the adapter, and its epsilon if it has one",
    "error": "why a round failed; no text of examples",
}
_RISKS = (
    f"Whoever runs the trunk can read most of the text whose hidden states are sent; {NOISE}, nor by more layers on "
    "it, nor by int8. TLS keeps out others only.",
    "Names, dates and numbers that no rule describes are not replaced.",
    "Adapters hold traces of the text that they were trained on. Differential privacy limits that: of one example "
    "(dp.record-*, see above) towards whoever sees this node's adapter, of the whole node (dp.mode) towards whoever "
    f"sees the combined ones; {UNCOVERED}.",
    "The ledger shows what this software sent. It is no proof against somebody who changes the software, or who "
    "rewrites the whole ledger: keep its last hash elsewhere.",
)


def privacy_report(folder: Path, audit: Path | None) -> str:
    """Make the page.

    Args:
        folder: What the node keeps of a run, with its ledger.
        audit: Figures of ``fl-split audit``, or None.

    Raises:
        NodeStateError: The ledger is missing or was changed, or the audit's file is none.
    """
    run, asked = read_ledger(folder / NAME), folder / f"adapter.{NAME}"
    sums, found = _with(run, read_ledger(asked)) if asked.is_file() else run, _read(audit) if audit else {}
    title = f"Privacy of the run {folder.name}"
    parts = (
        ("Where data goes", _picture(sums)),
        ("What has left this node", _left(sums)),
        ("Who runs the trunk", _run_by(sums)),
        ("What of it can be read", _read_by(found)),
        ("What was replaced before", _replaced(sums)),
        ("What the adapter tells of one example", _account(folder)),
        ("What remains", f"<ul>{''.join(f'<li>{escape(risk, quote=False)}</li>' for risk in _RISKS)}</ul>"),
        ("By which this can be checked", table(_hashes(folder, sums, found))),
    )
    return document(title, heading(title, ", on the node") + "".join(f"<h3>{name}</h3>{body}" for name, body in parts))


def _with(run: Sums, asked: Sums) -> Sums:
    """A run, and the questions to what it has trained."""
    shown = {**asked.shown, **run.shown}
    return replace(run, bytes=run.bytes + asked.bytes, calls=run.calls + asked.calls, shown=shown)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "verdict" in found:
            return dict(found)
    except (OSError, ValueError, TypeError):
        pass
    raise NodeStateError(f"{file} holds no figures of an audit: expected the .json that 'fl-split audit' wrote")


def _picture(sums: Sums) -> str:
    """Who gets what, as boxes; the widths of arrows mean nothing."""
    receivers = sorted({to for to, _ in sums.bytes})
    rows = []
    for i, to in enumerate(receivers):
        y = 20 + 70 * i
        size = sum(count for (other, _), count in sums.bytes.items() if other == to)
        kinds = ", ".join(kind for other, kind in sorted(sums.bytes) if other == to)
        rows.append(
            f"<line x1='170' y1='{y + 20}' x2='560' y2='{y + 20}' stroke='currentColor' marker-end='url(#a)'/>"
            f"<text x='180' y='{y + 14}'>{escape(kinds)}</text><text x='180' y='{y + 36}'>{size / 1e6:,.2f} MB</text>"
            f"<rect x='565' y='{y}' width='230' height='40' fill='none' stroke='currentColor'/>"
            f"<text x='575' y='{y + 25}'>{escape(to)}</text>"
        )
    height = 30 + 70 * max(1, len(receivers))
    return (
        f"<svg viewBox='0 0 800 {height}' font-size='13' fill='currentColor' role='img'><defs><marker id='a' "
        "markerWidth='8' markerHeight='8' refX='7' refY='3' orient='auto'><path d='M0,0 L7,3 L0,6 z'/></marker></defs>"
        f"<rect x='5' y='20' width='160' height='{height - 50}' fill='none' stroke='currentColor'/>"
        f"<text x='15' y='45'>this node:</text><text x='15' y='63'>texts, labels, losses</text>{''.join(rows)}</svg>"
    )


def _left(sums: Sums) -> str:
    rows = [
        (to, _SEEN.get(kind, kind), f"{sums.calls[to, kind]:,}", f"{size:,}")
        for (to, kind), size in sorted(sums.bytes.items())
    ]
    rounds = f"rounds {min(sums.rounds)} to {max(sums.rounds)}" if sums.rounds else "no round"
    return (
        f"{table([('to', 'what', 'messages', 'bytes'), *rows])}<p>In {rounds}: {escape(say_passes(sums))}. Headers and "
        "encryption come on top. Nothing else left through this software, but for questions to copies of the adapter "
        "elsewhere: a ledger beside each has them.</p>"
    )


def _run_by(sums: Sums) -> str:
    if not sums.shown:
        return (
            "<p>Nothing was asked for: with trunk-operator-key a trunk has to show its operator's signed statement, "
            "with trunk-verifier evidence of its machine.</p>"
        )
    return table([row for address, shown in sorted(sums.shown.items()) for row in _shown(address, shown)])


def _shown(address: str, shown: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """What the ledger kept; it was checked before anything was sent."""
    yield f"trunk {address}", f"TLS key {shown['tls-key']}"
    if "statement" in shown:
        statement = Statement.of(shown["statement"].encode())
        yield "signed by", f"{statement.operator}, until {statement.expires}"
        yield "which says of logs", statement.log_policy
        yield "and that it serves", f"{statement.model} (weights {statement.weights_digest[:12]}), {statement.version}"
    if "evidence" in shown:
        yield "evidence of the machine accepted by", shown["verifier"]


def _read_by(found: Mapping[str, Any]) -> str:
    if not found:
        return "<p>Not measured: run <code>fl-split audit</code> on this node, and give its .json as --audit.</p>"
    return f"<p>{escape(found['verdict'].capitalize())}.</p>{table(rows_of(found, {**FIGURES, **CONTROLS}))}"


def _replaced(sums: Sums) -> str:
    if not sums.redacted:
        return "<p>Nothing: no rules were given (data.redact, redact-rules), or they found nothing.</p>"
    return table([(kind, f"{count:,}") for kind, count in sorted(sums.redacted.items())])


def _account(folder: Path) -> str:
    charges = read_charges(folder)
    if not charges:
        return "<p>No bound: the run trained without dp.record-noise-multiplier.</p>"
    rows = [("round", "steps", "chance of an example to be in a step", "noise", "epsilon so far")]
    rows += [(str(c.round), str(c.steps), f"{c.sampling:.4f}", f"{c.noise:g}", f"{c.epsilon:.2f}") for c in charges]
    return (
        f"<p>At most {escape(str(charges[-1]))}. Held-out examples, whose losses leave as metrics, are not covered "
        f"either, and other runs on the same rows add theirs.</p>{table(rows)}"
    )


def _hashes(folder: Path, sums: Sums, found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "fl-split", __version__
    yield "the ledger's last hash", sums.head
    yield "the ledger", str(folder / NAME)
    if sums.torn:
        yield "lines that a kill tore off, of messages that were not sent", str(sums.torn)
    for key in ("model", "split", "wire-dtype", "adapter", "examples", "tokens", "fl-split"):
        if key in found:
            yield f"the audit's {key}", str(found[key])
