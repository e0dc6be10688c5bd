"""The officer's page says what the ledger and an audit say, and nothing that neither says."""

import json
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.config import UNCOVERED, Dp
from fl_split.errors import NodeStateError
from fl_split.node.account import Account
from fl_split.node.ledger import Ledger, read_ledger
from fl_split.tools.audit.page import NOISE
from fl_split.tools.privacy_report import privacy_report


@pytest.fixture
def node(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "run-7", 3)
    ledger.note("", "begin", 0, examples=40, redacted={"date": 1234})
    ledger.note("trunk t:1", "hidden-states", 2_500_000, sequences=80, digests=[])
    ledger.note("server", "metrics", 321)
    return tmp_path / "run-7"


def test_page_holds_what_left_and_what_remains(node: Path) -> None:
    html = privacy_report(node, None)
    for text in ("Privacy of the run run-7", "trunk t:1", "2,500,000", "321", "2.50 MB", "1,234", "2.0 times each"):
        assert text in html
    assert "Not measured" in html and NOISE in html and "does not cover hidden states" in html
    assert read_ledger(node / "ledger.jsonl").head in html and "rounds 3 to 3" in html
    assert "<script" not in html and "http" not in html


def test_page_holds_an_audit(node: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps({"verdict": "at least 98.2 % of ...", "readable": 0.982, "split": "2+2"}))
    done = CliRunner().invoke(
        app, ["report", "--privacy", str(node), "--audit", str(audit), "--out", str(tmp_path / "p.html")]
    )
    assert done.exit_code == 0, done.output
    html = (tmp_path / "p.html").read_text()
    assert "At least 98.2 %" in html and "98.2 %" in html and "2+2" in html and "Not measured" not in html


def test_page_holds_what_the_adapter_tells_of_one_example(node: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    assert "No bound: the run trained without" in privacy_report(node, None)
    Account(node).charge(Dp.model_validate({"record-noise-multiplier": 1.25}), 1, 30, 0.0625)
    last = Account(node).charge(Dp.model_validate({"record-noise-multiplier": 1.25}), 2, 20, 0.0625)
    html = privacy_report(node, None)
    assert f"At most epsilon {last.epsilon:.2f} at delta 1e-05 for one training example; {UNCOVERED}" in unescape(html)
    for cell in ("30", "20", "0.0625", "1.25", f"{last.epsilon:.2f}"):
        assert f"<td>{cell}</td>" in html


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_what_is_no_audit_or_no_ledger_is_refused(node: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(NodeStateError, match="holds no figures of an audit"):
        privacy_report(node, tmp_path / "x.json")
    with pytest.raises(NodeStateError, match=r"cannot be read .*expected a node's ledger\.jsonl"):
        privacy_report(tmp_path, None)


def test_a_changed_ledger_makes_no_page(node: Path) -> None:
    file = node / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"bytes": 321', b'"bytes": 121'))
    with pytest.raises(NodeStateError, match="line 3 does not follow"):
        privacy_report(node, None)
