"""A whole run: the recipe's stages in order, each kept in the run folder and not done again when its output is there and fits."""

from .stages import run

__all__ = ["run"]
