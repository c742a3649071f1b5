"""Everything sparc3 raises on purpose.

Sparc3Error                 anything sparc3 raises itself; the command line prints it as one line
├── UserError               a mistake the user can mend; exit code 2. Also a ValueError
│   ├── UnsupportedModel    an architecture or module that the rules do not know
│   └── DamagedFile         a file that is not what it says, or was changed after it was written
├── NonFinite               a NaN or Inf in a relevance, named by sample and site
└── LostRank                another process of the same torchrun ended before its time
"""

import difflib
from collections.abc import Iterable

from .safe_text import one_line


class Sparc3Error(Exception):
    """Base of all errors that sparc3 raises on purpose. The message is one line with a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UserError(Sparc3Error, ValueError):
    """The user's mistake: the message names it and says what to do."""


class UnsupportedModel(UserError):
    """An architecture, or a module in the path of the gradient, that the rules do not know."""


class DamagedFile(UserError):
    """A file of ours that cannot be read back as it was written."""


class NonFinite(Sparc3Error, ArithmeticError):
    """A NaN or Inf where a number was needed; the message names the sample and the site."""


class LostRank(Sparc3Error):
    """Another process of the same torchrun ended before its time; the saved work is whole, and a rerun goes
    on from it."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name nobody knows: suggests the near one, or lists what there is."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    remedy = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(choices)}"
    return UserError(f"unknown {kind} '{name}'; {remedy}")
