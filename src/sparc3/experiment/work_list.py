"""The list of work: every attribution and every evaluation of a run, and how many units each of its circuits
has. `run` builds it once it has the samples, and `plan` prints it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import require_method
from ..attribution.options import AttributionOptions
from ..attribution.token_relevance import METHODS as RELEVANCE
from ..circuits.fit import SENSITIVITY
from ..circuits.select import parse_scope, share_of
from ..models.sites import Site
from ..recipe.schema import CompressRecipe, CorrectRecipe, DiscoverRecipe, Recipe
from ..recipe.sections import SEQUENTIAL, Compress, Discover, Tune
from ..results import Variant
from .seeds import count_seeds, name_draw, reference_sets, set_at_seed

Completed = Callable[[str], bool]
"""Whether the samples of a reference set, by its name, have completions."""


@dataclass(frozen=True)
class Attribution:
    """One reference set scored by one method.

    Attributes:
        set: name of the reference set.
        options: with the target of this set.
        first: only so many of its samples; None for all.
        turn: 1, and above it in later rounds, where the model lacks what the rounds before found.
        circuit: number of the circuit that a later round goes on with.
        kept: whether a file of scores is left.
    """

    set: str
    options: AttributionOptions
    first: int | None = None
    turn: int = 1
    circuit: int = 0
    kept: bool = True


@dataclass(frozen=True)
class WorkList:
    """Everything that a run makes, the most that it can where a search decides.

    Attributes:
        attributions: each once.
        evaluations: the models that are measured on the test samples, by the names of their files, the
            original first.
        alone: how many units are measured alone, for their cards.
        trials: how many circuits a search measures, the original among them.
        score_files: how many files of scores the run leaves, with the contrast, expertise, and what a search
            copies.
    """

    attributions: tuple[Attribution, ...]
    evaluations: tuple[str, ...]
    alone: int = 0
    trials: int = 0
    score_files: int = 0

    @property
    def summary(self) -> str:
        """The list in one line."""
        sets = len({one.set for one in self.attributions})
        trials = f", at most {self.trials} trials of a search" if self.trials else ""
        return (
            f"{len(self.attributions)} attributions of {sets} reference sets, "
            f"{len(self.evaluations) + self.alone} evaluations{trials}"
        )


def list_work(recipe: Recipe, sites: Sequence[Site], completed: Completed) -> WorkList:
    """The work of a recipe on a model with these sites."""
    if recipe.job == "discover":
        methods, sets = recipe.discover.methods, [name for name, _ in reference_sets(recipe)]
        each = (_single_attribution(recipe, method, name) for method in methods for name in sets)
        made = tuple(dict.fromkeys(each))
        return WorkList(
            made, ("original", "empty", *_discover_variants(recipe, sites)), score_files=len(made)
        )
    if recipe.job == "compress":
        made = tuple(dict.fromkeys(_list_compress(recipe)))
        names = ("original", *_compress_variants(recipe, sites))
        return WorkList(made, names, score_files=sum(one.kept for one in made))
    made = tuple(dict.fromkeys((_list_search if recipe.tune else _list_correct)(recipe, completed)))
    rivals, count, trials = rival_methods(recipe), circuit_count(recipe, sites), 0
    # The contrasts, and what the methods of expertise share.
    files = len(made) + count_seeds(recipe)
    files += len(expertise_sets(recipe)) * bool(set(rivals) & set(EXPERTISE_METHODS))
    if recipe.tune:
        theirs = len(rivals) * len(counts_tried(recipe)) + ("aura" in rivals)
        trials = 1 + count_candidates_tried(recipe) + theirs
        files += len(sets_read_by(recipe, [kind for kind, _, _ in contrasts_tried(recipe)]))
    alone = min(recipe.cards.alone, recipe.cards.most, count) if has_cards(recipe) else 0
    return WorkList(made, tuple(_correct_variants(recipe, sites, count)), alone, trials, files)


def is_protected(recipe: Recipe) -> bool:
    """Whether neurons are tried alone before any is selected."""
    neurons = (recipe.attribution.unit, recipe.attribution.sites) == ("neuron", ("mlp.up",))
    return recipe.job == "correct" and recipe.selection.protect and neurons


def has_cards(recipe: Recipe) -> bool:
    """Whether cards of the circuit's units are written."""
    neurons = recipe.attribution.unit == "neuron" and "mlp.up" in recipe.attribution.sites
    return recipe.job == "correct" and recipe.cards.most > 0 and neurons


TOKEN_MAPS = 6
"""How many undesired samples a run shows the tokens' relevance of."""


def has_token_maps(recipe: Recipe) -> bool:
    """Whether the relevance of the tokens of undesired samples is written."""
    return recipe.job == "correct" and recipe.attribution.method in RELEVANCE


# The job correct: attributions, and the variants that are measured.


def _single_attribution(
    recipe: Recipe, method: str, name: str, target: str | None = None, **changes: str
) -> Attribution:
    target = recipe.references[name.partition(".")[0]].target or target or recipe.attribution.target
    return Attribution(name, recipe.attribution.but(method=method, target=target, **changes))


def _list_correct(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    asked = recipe.attribution
    for turn in range(1, recipe.selection.rounds + 1):
        for seed in range(count_seeds(recipe)):
            for name in recipe.references:
                one = _single_attribution(recipe, asked.method, set_at_seed(recipe, name, seed))
                yield replace(one, turn=turn, circuit=seed if turn > 1 else 0)
    names = [name for name, _ in reference_sets(recipe)]
    yield from _list_rivals(recipe, names, asked.target, asked.neuron, completed)


def _list_search(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    """The first round is shared by all; in each later one every candidate attributes again, on a model of its
    own."""
    method, kinds, circuit = recipe.attribution.method, [kind for kind, _, _ in contrasts_tried(recipe)], 0
    for target, neuron in attributions_tried(recipe):
        first = {
            name: _single_attribution(
                recipe, method, name, target_for_set(target, completed(name)), neuron=neuron
            )
            for name in sets_read_by(recipe, kinds)
        }
        if damages_tried(recipe):
            first["general"] = Attribution("general", recipe.attribution.but(**SENSITIVITY))
        yield from first.values()
        for kind in kinds:
            for _, rounds, *_ in circuit_sizes_tried(recipe):
                circuit += 1
                for turn in range(2, rounds + 1):
                    for name in sets_read_by(recipe, [kind]):
                        yield replace(first[name], turn=turn, circuit=circuit)
    yield from _list_rivals(recipe, sets_read_by(recipe, kinds), *attributions_tried(recipe)[0], completed)


def _list_rivals(
    recipe: CorrectRecipe, names: Sequence[str], target: str, neuron: str, completed: Completed
) -> Iterator[Attribution]:
    for method in rival_methods(recipe):
        for name in names if method not in EXPERTISE_METHODS else ():
            theirs = target_for_set(target, completed(name))
            yield _single_attribution(recipe, method, name, theirs, neuron=neuron)


def target_for_set(target: str, completed: bool) -> str:
    """A candidate's target for a set; `next` for one without completions, where the target means them."""
    return "next" if target.startswith("completion") and not completed else target


def _correct_variants(recipe: CorrectRecipe, sites: Sequence[Site], count: int) -> Iterator[str]:
    """The variants beside a circuit of `count` units, but those that are the circuit once more."""
    beside, own = comparison_for(recipe, sites, count), recipe.attribution.method
    yield "original"
    seeds = range(count_seeds(recipe))
    for seed in seeds if len(seeds) > 1 else (None,):
        if count:
            yield name_draw("ablated", seed)
        yield from (name_draw(str(Variant(own, many)), seed) for many in beside.own if many != count)
        for method, (_, sizes) in beside.rivals.items():
            yield from (name_draw(str(Variant(method, many)), seed) for many in sizes if many)
            if method == "aura":
                yield name_draw("aura@all", seed)
        for many in filter(None, beside.null):
            draws = (None,) if beside.draws == 1 else range(beside.draws)
            yield from (name_draw(str(Variant("random", many)), seed, draw) for draw in draws)


def rival_methods(recipe: CorrectRecipe) -> tuple[str, ...]:
    """The methods that stand beside the run's own; random is the null."""
    named = dict.fromkeys(recipe.compare.methods)
    return tuple(method for method in named if method not in ("random", recipe.attribution.method))


def expertise_sets(recipe: CorrectRecipe) -> list[tuple[str, str]]:
    """(undesired, benign) sets that the methods of expertise tell apart: matched samples, or general ones
    where there are none; one pair a seed where they differ."""
    benign = "matched" if "matched" in recipe.references else "general"
    pairs = (
        (set_at_seed(recipe, "undesired", seed), set_at_seed(recipe, benign, seed))
        for seed in range(count_seeds(recipe))
    )
    return list(dict.fromkeys(pairs))


# What a search tries.


def _search_of(recipe: CorrectRecipe) -> Tune:
    assert recipe.tune
    return recipe.tune


def attributions_tried(recipe: CorrectRecipe) -> list[tuple[str, str]]:
    """(target, neuron) of every attribution that a search begins with."""
    tune, asked = _search_of(recipe), recipe.attribution
    targets, neurons = tune.targets or (asked.target,), tune.neurons or (asked.neuron,)
    return [(target, neuron) for target in targets for neuron in neurons]


def contrasts_tried(recipe: CorrectRecipe) -> list[tuple[str, float, str | None]]:
    """(plain or matched, penalty, normalize): every way in which a search contrasts the scores of one
    attribution."""
    tune = _search_of(recipe)
    return [
        (kind, penalty, scale)
        for kind in tune.contrasts or (("plain", "matched") if "matched" in recipe.references else ("plain",))
        for penalty in (tune.penalties if kind == "matched" else (1.0,))
        for scale in tune.normalize
    ]


def sets_read_by(recipe: Recipe, kinds: list[str]) -> list[str]:
    """The reference sets that contrasts of these kinds read."""
    return [name for name in recipe.references if name != "matched" or "matched" in kinds]


def counts_tried(recipe: CorrectRecipe) -> list[int]:
    return sorted(set(_search_of(recipe).counts)) or [recipe.selection.count or 0]


def circuit_sizes_tried(recipe: CorrectRecipe) -> list[tuple[int, int, float, float | None]]:
    """(number of units, rounds, strength, damage that strengths are fitted at or None) of every circuit that
    a search looks for by one contrast."""
    tune = _search_of(recipe)
    return [
        (count, rounds, strength, damage)
        for count in counts_tried(recipe)
        for rounds in sorted({min(rounds, count) for rounds in tune.rounds})
        for strength in dict.fromkeys(tune.strengths)
        for damage in dict.fromkeys(damages_tried(recipe) or (None,))
    ]


def damages_tried(recipe: CorrectRecipe) -> tuple[float, ...]:
    """The damages at which strengths are fitted; none where units are selected."""
    return _search_of(recipe).damages


def count_candidates_tried(recipe: CorrectRecipe) -> int:
    """At most so many circuits a search tries; fewer where a contrast has too few candidates for one."""
    return len(attributions_tried(recipe)) * len(contrasts_tried(recipe)) * len(circuit_sizes_tried(recipe))


# The jobs discover and compress.


def _list_compress(recipe: CompressRecipe) -> Iterator[Attribution]:
    compress = recipe.compress
    for _, method, reduce in prunings_of(compress, sampled=False):
        for name in sets_pruned_by(recipe, method):
            one = _single_attribution(recipe, method, name, reduce=reduce)
            times = max(1, len(compress.fractions)) if method == SEQUENTIAL else 1
            yield from (replace(one, kept=method != SEQUENTIAL, circuit=number) for number in range(times))
    for _, method, reduce in prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            for name, _ in reference_sets(recipe):
                one = _single_attribution(recipe, method, name, reduce=reduce)
                yield replace(one, kept=False, first=count)


def _discover_variants(recipe: DiscoverRecipe, sites: Sequence[Site]) -> Iterator[str]:
    for name, _, _ in rankings(recipe.discover, lambda method: require_method(method).targeted):
        for count in removed_sizes(recipe.discover, name, recipe.attribution.unit, sites):
            for seed, _ in enumerate(reference_sets(recipe)):
                yield str(Variant(name, count, f"seed{seed}"))


def _compress_variants(recipe: CompressRecipe, sites: Sequence[Site]) -> Iterator[str]:
    compress = recipe.compress
    for name, method, _ in prunings_of(compress, sampled=False):
        seeds = len(sets_pruned_by(recipe, method))
        for fraction in compress.fractions or (None,):
            count = count_selected(compress.scope, "weight", sites, fraction=fraction)
            draws = [f"seed{seed}" for seed in range(seeds)] if seeds > 1 else [""]
            yield from (str(Variant(name, count, draw)) for draw in draws)
    for name, _, _ in prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            yield from (f"{name}-{count}.seed{seed}" for seed, _ in enumerate(reference_sets(recipe)))


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


def sets_pruned_by(recipe: CompressRecipe, method: str) -> list[str]:
    """The reference sets by each of which a method prunes; the first where it looks at no sample."""
    names = [name for name, _ in reference_sets(recipe)]
    reads = method == SEQUENTIAL or require_method(method).run is not None
    return names if recipe.compress.seeds and reads else names[:1]


def prunings_of(compress: Compress, *, sampled: bool) -> list[tuple[str, str, str]]:
    """(name, method, reduce); a relevance has its reduction in its name where there are two.

    Args:
        sampled: those that are compared by number of samples, or the others.
    """
    found: list[tuple[str, str, str]] = []
    for method in compress.methods:
        if sampled != bool(compress.samples and require_method(method).run):
            continue
        if method != SEQUENTIAL and require_method(method).targeted and len(compress.reduces) > 1:
            found += [(f"{method}-{reduce}", method, reduce) for reduce in compress.reduces]
        else:
            found.append((method, method, compress.reduces[0]))
    return found


# How many units each circuit has, by whichever scope.

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
    if chosen.tune:
        circuit = selection_sizes(recipe, sites, counts_tried(recipe)).get(count, {"count": count})
    elif chosen.count is not None:
        circuit = {"count": chosen.count}
    else:
        circuit = {} if parse_scope(chosen.scope) else {"fraction": chosen.fraction}
    own = dict(sorted({**asked, count: circuit}.items()))
    # compare.counts need not have what a search ends at, nor the size of a share or of n:m, which no recipe
    # says.
    theirs = asked if chosen.count is not None and not chosen.tune else own
    rivals = {method: rival_sizes(recipe, sites, method, theirs) for method in rival_methods(recipe)}
    null = tuple(own) if "random" in compare.methods else (count,)
    return Comparison(own, rivals, null, compare.random_draws)


def selection_sizes(recipe: CorrectRecipe, sites: Sequence[Site], counts: Iterable[int]) -> Sizes:
    """What these counts, each of all units, of a site or of a row as selection.scope says, are in all."""
    scope, unit = recipe.selection.scope, recipe.attribution.unit
    return {count_selected(scope, unit, sites, count=one): {"count": one} for one in sorted(set(counts))}


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


def circuit_count(recipe: CorrectRecipe, sites: Sequence[Site]) -> int:
    """How many units the circuit has; the most that it can where a search decides it."""
    asked = recipe.selection
    count = max(counts_tried(recipe)) if asked.tune else asked.count
    return count_selected(asked.scope, recipe.attribution.unit, sites, count=count, fraction=asked.fraction)


def count_selected(
    scope: str, unit: str, sites: Sequence[Site], *, count: int | None = None, fraction: float | None = None
) -> int:
    """How many units so many, such a share, or the groups of a scope n:m are of the sites."""
    units = [units_in(site, unit) for site in sites]
    if groups := parse_scope(scope):
        return sum(units) * groups[0] // groups[1]

    def of(some: int) -> int:
        return count if count is not None else share_of(fraction, some)

    if scope == "row":
        return sum(site.out * of(site.inp) for site in sites)
    return sum(map(of, units)) if scope == "site" else of(sum(units))


def units_in(site: Site, unit: str) -> int:
    """How many units a site has."""
    return site.out * site.inp if unit == "weight" else site.heads if unit == "head" else site.out
