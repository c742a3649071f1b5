"""The embedded demo: a small Llama, and the generator of the text it was trained on."""
