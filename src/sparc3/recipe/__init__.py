"""Recipes: YAML files that describe a whole run."""
