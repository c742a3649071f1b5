"""A sentence beside the headline."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Remark:
    """`kind` is "good", "plain" or "careful"."""

    kind: str
    text: Markup
