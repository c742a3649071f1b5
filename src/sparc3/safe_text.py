"""Make texts from models, files and users safe to show: control characters are written out, and secrets
are left out."""

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
"""Maximum length of a shown line, in characters."""


def visible(text: str) -> str:
    r"""`text` with control characters, except tabs and newlines, written out: an escape becomes \x1b."""
    return _UNSEEN.sub(_write_out, text)


def one_line(text: str) -> str:
    """`text` as one line for a console, a log or a message: visible, without secrets, and shortened if
    needed."""
    line = visible(remove_secrets(" ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 5 :]}"


def remove_secrets(text: str) -> str:
    """`text` without the hub's token and passwords in URLs."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME")
    for token in _tokens(*(os.environ.get(name, "") for name in names)):
        text = text.replace(token, "(secret)")
    return _SECRET.sub("(secret)", text)


@lru_cache(maxsize=8)
def _tokens(env_token: str, legacy_token: str, path: str, home: str) -> tuple[str, ...]:
    """The tokens that the hub's client would use, from the environment and from its file."""
    file = Path(path or Path(home or "~/.cache/huggingface") / "token")
    try:
        file_token = file.expanduser().read_text(encoding="utf-8")[:1000]
    except (OSError, UnicodeDecodeError, RuntimeError):
        file_token = ""
    tokens = (text.strip() for text in (env_token, legacy_token, file_token))
    return tuple(token for token in tokens if len(token) >= 8)


class LineFormatter(logging.Formatter):
    """Log records as one safe line each, without the path of the user's home."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record)).replace(f"{_home()}/", "~/")


def shareable(value: Any) -> Any:
    """Plain data with paths that may be shown to others: those in the user's home become ~/…, and of paths
    that name the user or the machine only the file name stays."""
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


def expand_home(value: Any) -> Any:
    """Plain data with ~/… expanded to the user's home."""
    if isinstance(value, dict):
        return {key: expand_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [expand_home(part) for part in value]
    kind, path = _path_in(value) if isinstance(value, str) else ("", "")
    return f"{kind}{_home()}{path[1:]}" if path.startswith("~/") else value


def _path_in(value: str) -> tuple[str, str]:
    """(prefix, path) of "lexicon:PATH" or of a plain path."""
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


def _write_out(match: re.Match[str]) -> str:
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
