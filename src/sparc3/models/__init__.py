"""Loading causal language models, and what sparc3 knows of their architectures."""
