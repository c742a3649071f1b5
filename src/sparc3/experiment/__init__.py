"""Experiments: a whole run, stage by stage, in a folder that it can resume from."""
