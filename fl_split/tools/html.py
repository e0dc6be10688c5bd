"""What the pages for people have in common; they need no server and no script."""

from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from importlib.resources import files


def document(title: str, body: str) -> str:
    """A page around a body that is HTML already."""
    style = files("fl_split.tools").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def heading(title: str, note: str) -> str:
    """What a page is called, when it was made and what else its reader has to know; the note is HTML already."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"<h1>{escape(title)}</h1><p class='faint'>made {made}{note}</p>"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of text as HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><tbody>{body}</tbody></table></div>"
