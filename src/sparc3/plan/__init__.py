"""What a run will need, told before anything of it is loaded: memory, time, disk, and whether it fits."""

from .planning import Plan, plan

__all__ = ["Plan", "plan"]
