"""Evaluation: what a model does on held-out samples, with intervals, and how a variant of it differs."""

from . import divergence, fluency, harness, ioi, perplexity, repetition, sparsity, toxicity  # noqa: F401  each registers its metric
from .evaluate import evaluate

__all__ = ["evaluate"]
