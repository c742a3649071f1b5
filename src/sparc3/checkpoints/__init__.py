"""Export: a model without its circuit as a checkpoint, for others to use."""
