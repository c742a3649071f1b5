"""Text of models and users, made safe to look at: nothing in it is left out, and nothing in it acts."""

import re
from typing import Any

from markupsafe import Markup

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")


def visible(text: str) -> str:
    r"""`text` with its control characters written out: an escape is \x1b, a change of direction \u202e. Tabs and newlines stay."""
    return _UNSEEN.sub(_written_out, text)


def visible_lines(text: str) -> str:
    """The same, with a ↵ before each newline, for text in which a newline says something."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵\n")


def finalize(value: Any) -> Any:
    """What the template does to every value it prints: a string becomes visible, markup of our own stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
