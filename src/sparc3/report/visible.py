"""Text of models and users on the page: nothing in it is left out, and nothing in it acts."""

from typing import Any

from markupsafe import Markup

from ..visible import visible as visible


def visible_lines(text: str) -> str:
    """`visible` text, with a ↵ before each newline, for text in which a newline says something."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵\n")


def finalize(value: Any) -> Any:
    """What the template does to every value it prints: a string becomes visible, markup of our own stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
