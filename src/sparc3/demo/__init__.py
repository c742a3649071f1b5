"""The embedded demo: a small Llama, and the generator of its text."""
