"""Texts of models, files and users, made safe to show: what would act on a screen is written out, what is secret is left out."""

import logging
import os
import re
from functools import lru_cache
from pathlib import Path

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\xad\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SECRET = re.compile(r"\bhf_\w{6,}|(?<=://)[^/\s@'\"]+(?=@)|(?<=[Bb]earer )[\w.~+/=-]{6,}")
LONGEST = 2000
"""Longest line that is shown, in characters."""


def visible(text: str) -> str:
    r"""`text` with its control characters written out: an escape is \x1b, a change of direction \u202e. Tabs and newlines stay."""
    return _UNSEEN.sub(_written_out, text)


def one_line(text: str) -> str:
    """`text` as one line of a console, a log or a message: visible, without secrets, and no longer than a reader can bear."""
    line = visible(without_secrets(" ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 5 :]}"


def without_secrets(text: str) -> str:
    """`text` without the hub's token, or a password in a URL, wherever they come from."""
    for token in _tokens(*(os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME"))):
        text = text.replace(token, "(secret)")
    return _SECRET.sub("(secret)", text)


@lru_cache(maxsize=8)
def _tokens(one: str, other: str, path: str, home: str) -> tuple[str, ...]:
    """The tokens that the hub's client would use: of the environment and of its file."""
    try:
        kept = Path(path or Path(home or "~/.cache/huggingface") / "token").expanduser().read_text(encoding="utf-8")[:1000]
    except (OSError, UnicodeDecodeError, RuntimeError):
        kept = ""
    return tuple(token for token in (one.strip(), other.strip(), kept.strip()) if len(token) >= 8)


class LineFormatter(logging.Formatter):
    """Log records as one safe line each."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
