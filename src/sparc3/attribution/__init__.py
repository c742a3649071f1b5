"""Attribution: one number per unit, for how much it contributed to the target on the reference samples."""

from .engine import attribute, merge

__all__ = ["attribute", "merge"]
