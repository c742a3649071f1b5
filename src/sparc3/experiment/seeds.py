"""The reference sets of a run: of a set with several seeds all samples together, or one set a seed, each with
what is found by it alone."""

from collections.abc import Iterator
from dataclasses import replace

from ..recipe.schema import CorrectRecipe, Recipe
from ..recipe.sections import Reference
from ..results import Variant


def reference_sets(recipe: Recipe) -> Iterator[tuple[str, Reference]]:
    """The reference sets by name; for the job discover one a seed, task.0, task.1, …, drawn independently of
    each other.

    So also where a compression compares numbers of samples, and where compress.seeds or selection.seeds is
    apart: general, general.1, general.2, …
    """
    apart = recipe.job == "correct" and bool(recipe.selection.seeds)
    if recipe.job == "compress":
        apart = bool(recipe.compress.samples or recipe.compress.seeds)
    for name, spec in recipe.references.items():
        if recipe.job == "discover":
            yield from ((f"{name}.{seed}", spec.model_copy(update={"seeds": (seed,)})) for seed in spec.seeds)
        elif apart:
            yield from (
                (f"{name}.{place}" if place else name, spec.model_copy(update={"seeds": (seed,)}))
                for place, seed in enumerate(spec.seeds)
            )
        else:
            yield name, spec


def count_seeds(recipe: CorrectRecipe) -> int:
    """How many circuits a run finds, each by the reference sets of one seed; 1 where they are pooled."""
    return max(len(spec.seeds) for spec in recipe.references.values()) if recipe.selection.seeds else 1


def set_at_seed(recipe: Recipe, name: str, seed: int) -> str:
    """How `reference_sets` calls a set at the place `seed` of its seeds: general.1; at the first one, and of
    a set with one seed, which all share, by its name."""
    own = f"{name}.{seed}"
    return own if seed and own in dict(reference_sets(recipe)) else name


def name_draw(variant: str, seed: int | None = None, draw: int | None = None) -> str:
    """What the evaluation of one of several seeds, or of one of several draws of random units, is called:
    "lrp@40.seed1", "random@40.2", "random@40.seed1.2"."""
    parts = ([] if seed is None else [f"seed{seed}"]) + ([] if draw is None else [str(draw)])
    return str(replace(Variant.parse(variant), draw=".".join(parts)))
