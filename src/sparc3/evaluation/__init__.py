"""Evaluation: what a model does on held-out samples, with intervals."""

from . import harness, perplexity, tasks, toxicity  # noqa: F401  Each registers its metrics.
