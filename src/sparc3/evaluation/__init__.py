"""Evaluation: what a model does on held-out samples, with intervals."""
