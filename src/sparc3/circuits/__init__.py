"""Circuits: selecting, combining and removing sets of units."""
