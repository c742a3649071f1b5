"""One line of the doctor's table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes:
        name: what was looked at.
        value: the figure; None where there is none.
        limit: the largest figure that passes; None where the finding is for information only.
        note: anything to add.
    """

    name: str
    value: float | None
    limit: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the check passed; None for information. A NaN, or no figure at all, does not pass."""
        if self.limit is None:
            return None
        return self.value is not None and self.value <= self.limit

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: ""}[self.passed]
