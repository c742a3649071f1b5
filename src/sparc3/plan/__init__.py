"""Plan: what a run will need, before anything is loaded."""
