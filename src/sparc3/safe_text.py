"""Texts of models, files and users, made safe to show: what would act on a screen is written out, what is
secret is left out."""

import getpass
import logging
import os
import re
import socket
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from html import escape
from pathlib import Path
from typing import Any

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\xad\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SECRET = re.compile(r"\bhf_\w{6,}|(?<=://)[^/\s@'\"]+(?=@)|(?<=[Bb]earer )[\w.~+/=-]{6,}")
LONGEST = 2000
"""Longest line that is shown, in characters."""


def visible(text: str) -> str:
    r"""`text` with its control characters but tabs and newlines written out: an escape is \x1b."""
    return _UNSEEN.sub(_written_out, text)


def one_line(text: str) -> str:
    """`text` as one line of a console, a log or a message: visible, without secrets, of a bearable length."""
    line = visible(without_secrets(" ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 5 :]}"


def without_secrets(text: str) -> str:
    """`text` without the hub's token, or a password in a URL, wherever they come from."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME")
    for token in _tokens(*(os.environ.get(name, "") for name in names)):
        text = text.replace(token, "(secret)")
    return _SECRET.sub("(secret)", text)


@lru_cache(maxsize=8)
def _tokens(one: str, other: str, path: str, home: str) -> tuple[str, ...]:
    """The tokens that the hub's client would use: of the environment and of its file."""
    file = Path(path or Path(home or "~/.cache/huggingface") / "token")
    try:
        kept = file.expanduser().read_text(encoding="utf-8")[:1000]
    except (OSError, UnicodeDecodeError, RuntimeError):
        kept = ""
    return tuple(token for token in (one.strip(), other.strip(), kept.strip()) if len(token) >= 8)


class LineFormatter(logging.Formatter):
    """Log records as one safe line each, without the path of the user's home."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record)).replace(f"{_home()}/", "~/")


def shareable(value: Any) -> Any:
    """Plain data with its paths as they may be shown to others: below the user's home as ~/…, and without a
    folder that names user or machine."""
    if isinstance(value, dict):
        return {key: shareable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(shareable, value))
    if not isinstance(value, str):
        return value
    kind, path = _path_in(value)
    if path.startswith(f"{_home()}/"):
        return f"{kind}~{path[len(_home()) :]}"
    return kind + Path(path).name if path.startswith("/") and _who() & set(Path(path).parts) else value


def at_home(value: Any) -> Any:
    """Plain data with every ~/… as the path it stands for here."""
    if isinstance(value, dict):
        return {key: at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [at_home(part) for part in value]
    kind, path = _path_in(value) if isinstance(value, str) else ("", "")
    return f"{kind}{_home()}{path[1:]}" if path.startswith("~/") else value


def _path_in(value: str) -> tuple[str, str]:
    """The path in "lexicon:PATH" or in a plain PATH, and what stands before it."""
    kind, colon, path = value.partition(":")
    return (kind + colon, path) if kind == "lexicon" else ("", value)


def _home() -> str:
    return os.path.expanduser("~").rstrip("/")


@cache
def _who() -> frozenset[str]:
    """The names of the user and of the machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    host = socket.gethostname()
    return frozenset(name for name in (user, host, host.partition(".")[0]) if name)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for notebooks; every text is escaped, numbers are aligned to the right."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align: right">{escape(str(value))}</td>' for value in row)
        + "</tr>"
        for row in rows
    )
    return f"<div>{escape(title)}<table><tr>{head}</tr>{body}</table></div>"
