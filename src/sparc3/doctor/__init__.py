"""`sparc3 doctor`: what this machine has, and whether relevance computed on a model is right."""

from .environment import environment
from .examination import Examination, examine
from .findings import Finding

__all__ = ["Examination", "Finding", "environment", "examine"]
