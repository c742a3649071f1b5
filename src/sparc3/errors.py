"""Everything sparc3 raises on purpose.

Sparc3Error                 anything sparc3 raises itself; the command line prints it as one line
├── UserError               a mistake that the user can fix; exit code 2. Also a ValueError
│   ├── UnsupportedModel    an architecture or module without LRP rules
│   └── DamagedFile         a file of ours with invalid content, or changed after it was written
├── NonFinite               a NaN or Inf in a relevance, named by sample and site
└── LostRank                another process of the same torchrun ended early
"""

import difflib
from collections.abc import Iterable

from .safe_text import one_line


class Sparc3Error(Exception):
    """Base of all errors that sparc3 raises on purpose. The message is one line with a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UserError(Sparc3Error, ValueError):
    """A mistake of the user: the message names it and says what to do."""


class UnsupportedModel(UserError):
    """An architecture, or a module in the path of the gradient, for which there is no LRP rule."""


class DamagedFile(UserError):
    """A file written by sparc3 whose content is invalid or was changed."""


class NonFinite(Sparc3Error, ArithmeticError):
    """A NaN or Inf instead of a number; the message names the sample and the site."""


class LostRank(Sparc3Error):
    """Another process of the same torchrun ended early; the saved work is intact, and a rerun resumes from
    it."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for an unknown name: it suggests the nearest one, or lists all."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    remedy = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(choices)}"
    return UserError(f"unknown {kind} '{name}'; {remedy}")
