"""How many units each circuit of a run has, by whichever scope: of the job correct beside its circuit, of
discover and compress."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..attribution.methods import require_method
from ..circuits.select import parse_scope, share_of
from ..models.sites import Site
from ..recipe.schema import CorrectRecipe
from ..recipe.sections import SEQUENTIAL, Compress, Discover

Sizes = dict[int, dict[str, Any]]
"""Number of units in all, ascending → the count or fraction by which `select` takes so many; nothing for a
scope n:m."""


@dataclass(frozen=True)
class Comparison:
    """Beside the original and the circuit, what the job correct evaluates. Variants are named by their number
    of units in all.

    Attributes:
        own: sizes that the run's own contrast selects, the circuit's among them.
        rivals: each other method → its scope and its sizes.
        null: numbers of random units, each drawn `draws` times.
    """

    own: Sizes
    rivals: dict[str, tuple[str, Sizes]]
    null: tuple[int, ...]
    draws: int


def comparison_for(recipe: CorrectRecipe, sites: Sequence[Site], count: int) -> Comparison:
    """What stands beside a circuit of `count` units in all."""
    compare, chosen = recipe.compare, recipe.selection
    asked = selection_sizes(recipe, sites, compare.counts)
    if chosen.count is not None and not chosen.tune:
        circuit: dict[str, Any] = {"count": chosen.count}
    elif chosen.tune:
        circuit = selection_sizes(recipe, sites, counts_tried(recipe)).get(count, {"count": count})
    else:
        circuit = {} if parse_scope(chosen.scope) else {"fraction": chosen.fraction}
    own = dict(sorted({**asked, count: circuit}.items()))
    # compare.counts need not have what a search ends at, nor the size of a share or of n:m, which no recipe
    # says.
    theirs = asked if chosen.count is not None and not chosen.tune else own
    rivals = {method: rival_sizes(recipe, sites, method, theirs) for method in rival_methods(recipe)}
    return Comparison(
        own, rivals, tuple(own) if "random" in compare.methods else (count,), compare.random_draws
    )


def selection_sizes(recipe: CorrectRecipe, sites: Sequence[Site], counts: Iterable[int]) -> Sizes:
    """What these counts, each of all units, of a site or of a row as selection.scope says, are in all."""
    scope, unit = recipe.selection.scope, recipe.attribution.unit
    return {
        count_selected(scope, unit, sites, count=count): {"count": count} for count in sorted(set(counts))
    }


def rival_sizes(recipe: CorrectRecipe, sites: Sequence[Site], method: str, sizes: Sizes) -> tuple[str, Sizes]:
    """The scope by which another method selects, and its sizes; where the scope is its own, the share of
    every site or row is the same."""
    scope, unit = (recipe.compare.scopes or {}).get(method, recipe.selection.scope), recipe.attribution.unit
    if scope == recipe.selection.scope:
        return scope, sizes
    if scope == "global":
        return scope, {total: {"count": total} for total in sizes}
    units = sum(units_in(site, unit) for site in sites)
    # Rounded up at the twelfth digit: a third of three is one, and not 0.9999.
    shares = [-(-total * 10**12 // units) / 10**12 for total in sizes if total < units]
    return scope, {
        count_selected(scope, unit, sites, fraction=share): {"fraction": share} for share in shares
    }


def rival_methods(recipe: CorrectRecipe) -> tuple[str, ...]:
    """The methods that stand beside the run's own; random is the null."""
    return tuple(
        method
        for method in dict.fromkeys(recipe.compare.methods)
        if method not in ("random", recipe.attribution.method)
    )


def counts_tried(recipe: CorrectRecipe) -> list[int]:
    tune = recipe.selection.tune
    assert tune
    return sorted(set(tune.counts)) or [recipe.selection.count or 0]


def rankings(discover: Discover, signed: Callable[[str], bool]) -> list[tuple[str, str, str]]:
    """(name, method, rank) of every way to rank units.

    Args:
        signed: whether a method's scores have a sign; where they have none, its rankings are one.
    """
    first, *more = discover.ranks
    found: list[tuple[str, str, str]] = []
    for method in discover.methods:
        found.append((method, method, first))
        found += [(f"{method}-{rank}", method, rank) for rank in more if signed(method)]
    return found


def ranking_scope(discover: Discover, name: str) -> str:
    """The scope by which a ranking's units are removed; `name` as `rankings` has it."""
    method = name if name in discover.methods else name.rpartition("-")[0]
    return (discover.scopes or {}).get(method, "global")


def removed_sizes(discover: Discover, name: str, unit: str, sites: Sequence[Site]) -> Sizes:
    """How many of all units each circuit of a ranking lacks."""
    scope, units = ranking_scope(discover, name), sum(units_in(site, unit) for site in sites)
    found: Sizes = {}
    for sparsity in sorted(discover.sparsities):
        total = count_selected(scope, unit, sites, fraction=sparsity)
        if 0 < total < units:
            found.setdefault(total, {"count": total} if scope == "global" else {"fraction": sparsity})
    return found


def prunings_of(compress: Compress, *, sampled: bool) -> list[tuple[str, str, str]]:
    """(name, method, reduce); a relevance has its reduction in its name where there are two.

    Args:
        sampled: those that are compared by number of samples, or the others.
    """
    found: list[tuple[str, str, str]] = []
    for method in compress.methods:
        if sampled != bool(compress.samples and require_method(method).run):
            continue
        targeted = method != SEQUENTIAL and require_method(method).targeted
        for reduce in compress.reduces if targeted else compress.reduces[:1]:
            found.append(
                (f"{method}-{reduce}" if targeted and len(compress.reduces) > 1 else method, method, reduce)
            )
    return found


def units_in(site: Site, unit: str) -> int:
    """How many units a site has."""
    return site.out * site.inp if unit == "weight" else site.heads if unit == "head" else site.out


def count_selected(
    scope: str, unit: str, sites: Sequence[Site], *, count: int | None = None, fraction: float | None = None
) -> int:
    """How many units so many, such a share, or the groups of a scope n:m are of the sites."""
    units = [units_in(site, unit) for site in sites]
    groups = parse_scope(scope)
    if groups:
        return sum(units) * groups[0] // groups[1]

    def of(some: int) -> int:
        return count if count is not None else share_of(fraction, some)

    if scope == "row":
        return sum(site.out * of(site.inp) for site in sites)
    return sum(map(of, units)) if scope == "site" else of(sum(units))


def circuit_count(recipe: CorrectRecipe, sites: Sequence[Site]) -> int:
    """How many units the circuit has; the most that it can where a search decides it."""
    asked = recipe.selection
    count = max(counts_tried(recipe)) if asked.tune else asked.count
    return count_selected(asked.scope, recipe.attribution.unit, sites, count=count, fraction=asked.fraction)
