"""The reference sets of a run. A set with several seeds is one set of all their samples, or, if seeds are
kept apart, one set per seed, each of which gives its own circuit."""

from collections.abc import Iterator
from dataclasses import replace

from ..recipe.schema import CorrectRecipe, Recipe
from ..recipe.sections import Reference
from ..results import Variant


def reference_sets(recipe: Recipe) -> Iterator[tuple[str, Reference]]:
    """The reference sets by name. The job discover has one per seed (task.0, task.1, …), drawn independently.

    So has a compression that compares numbers of samples, and a recipe whose compress.seeds or
    selection.seeds is "apart": general, general.1, general.2, …
    """
    apart = recipe.job == "correct" and bool(recipe.selection.seeds)
    if recipe.job == "compress":
        apart = bool(recipe.compress.samples or recipe.compress.seeds)
    for name, spec in recipe.references.items():
        if recipe.job == "discover":
            yield from ((f"{name}.{seed}", spec.model_copy(update={"seeds": (seed,)})) for seed in spec.seeds)
        elif apart:
            yield from (
                (f"{name}.{number}" if number else name, spec.model_copy(update={"seeds": (seed,)}))
                for number, seed in enumerate(spec.seeds)
            )
        else:
            yield name, spec


def count_seeds(recipe: CorrectRecipe) -> int:
    """How many circuits a run finds, each with the reference sets of one seed; 1 if the seeds are pooled."""
    return max(len(spec.seeds) for spec in recipe.references.values()) if recipe.selection.seeds else 1


def set_at_seed(recipe: Recipe, name: str, seed: int) -> str:
    """The name in `reference_sets` of a set at the index `seed` of its seeds: general.1. For the first seed,
    and for a set with one seed, which all share, it is the set's own name."""
    own_name = f"{name}.{seed}"
    return own_name if seed and own_name in dict(reference_sets(recipe)) else name


def name_draw(variant: str, seed: int | None = None, draw: int | None = None) -> str:
    """The name of the evaluation of one of several seeds, or of one of several draws of random units:
    "lrp@40.seed1", "random@40.2", "random@40.seed1.2"."""
    parts = ([] if seed is None else [f"seed{seed}"]) + ([] if draw is None else [str(draw)])
    return str(replace(Variant.parse(variant), draw=".".join(parts)))
