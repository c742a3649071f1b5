"""Doctor: what this machine has, and whether relevance computed on a model is right."""
