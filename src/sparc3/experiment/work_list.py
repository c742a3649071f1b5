"""The list of work: every attribution and evaluation of a run, and the number of units in each circuit. `run`
builds it once it has the samples, and `plan` prints it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import require_method
from ..attribution.options import AttributionOptions
from ..attribution.token_relevance import METHODS as RELEVANCE
from ..circuits.fit import SENSITIVITY, SLOPE
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
        options: options of the attribution, with this set's target.
        first: use only the first so many samples; None for all.
        turn: number of the round; from 2 on, the model lacks the units that earlier rounds found.
        circuit: number of the circuit that a later round continues.
        kept: whether the scores stay in a file.
    """

    set: str
    options: AttributionOptions
    first: int | None = None
    turn: int = 1
    circuit: int = 0
    kept: bool = True


@dataclass(frozen=True)
class WorkList:
    """Everything that a run makes; an upper bound if a search decides.

    Attributes:
        attributions: without repetitions.
        evaluations: names of the variants that are measured on the test samples, the original first.
        alone: number of units that are measured alone, for their cards.
        trials: number of circuits that a search measures, including the original.
        score_files: number of files of scores that the run leaves, including the contrast, the scores of
            expertise, and copies made by a search.
    """

    attributions: tuple[Attribution, ...]
    evaluations: tuple[str, ...]
    alone: int = 0
    trials: int = 0
    score_files: int = 0

    @property
    def summary(self) -> str:
        """The list in one line."""
        sets = len({attribution.set for attribution in self.attributions})
        trials = f", at most {self.trials} trials of a search" if self.trials else ""
        return (
            f"{len(self.attributions)} attributions of {sets} reference sets, "
            f"{len(self.evaluations) + self.alone} evaluations{trials}"
        )


def list_work(recipe: Recipe, sites: Sequence[Site], completed: Completed) -> WorkList:
    """The work of a recipe on a model with these sites."""
    if recipe.job == "discover":
        methods, sets = recipe.discover.methods, [name for name, _ in reference_sets(recipe)]
        # dict.fromkeys: two methods may need the same attribution.
        repeated = (_single_attribution(recipe, method, name) for method in methods for name in sets)
        attributions = tuple(dict.fromkeys(repeated))
        return WorkList(
            attributions,
            ("original", "empty", *_discover_variants(recipe, sites)),
            score_files=len(attributions),
        )
    if recipe.job == "compress":
        attributions = tuple(dict.fromkeys(_list_compress(recipe)))
        names = ("original", *_compress_variants(recipe, sites))
        return WorkList(
            attributions, names, score_files=sum(attribution.kept for attribution in attributions)
        )
    attributions = tuple(dict.fromkeys((_list_search if recipe.tune else _list_correct)(recipe, completed)))
    rivals, count, trials = rival_methods(recipe), circuit_count(recipe, sites), 0
    # One file for each contrast, and those that aura and det0 share.
    files = len(attributions) + count_seeds(recipe)
    files += len(expertise_sets(recipe)) * bool(set(rivals) & set(EXPERTISE_METHODS))
    if recipe.tune:
        rival_trials = len(rivals) * len(counts_tried(recipe)) + ("aura" in rivals)
        trials = 1 + count_candidates_tried(recipe) + rival_trials
        files += len(sets_read_by(recipe, [kind for kind, _, _ in contrasts_tried(recipe)]))
    alone = min(recipe.cards.alone, recipe.cards.most, count) if has_cards(recipe) else 0
    return WorkList(attributions, tuple(_correct_variants(recipe, sites, count)), alone, trials, files)


def is_protected(recipe: Recipe) -> bool:
    """Whether the run looks for neurons that must not be removed, by removing some alone."""
    neurons = (recipe.attribution.unit, recipe.attribution.sites) == ("neuron", ("mlp.up",))
    return recipe.job == "correct" and recipe.selection.protect and neurons


def has_cards(recipe: Recipe) -> bool:
    """Whether cards of the circuit's units are written."""
    neurons = recipe.attribution.unit == "neuron" and "mlp.up" in recipe.attribution.sites
    return recipe.job == "correct" and recipe.cards.most > 0 and neurons


TOKEN_MAPS = 6
"""Number of undesired samples whose token relevance is written."""


def has_token_maps(recipe: Recipe) -> bool:
    """Whether the relevance of the tokens of undesired samples is written."""
    return recipe.job == "correct" and recipe.attribution.method in RELEVANCE


# The job correct: attributions, and the variants that are measured.


def _single_attribution(
    recipe: Recipe, method: str, name: str, target: str | None = None, **changes: str
) -> Attribution:
    target = recipe.references[name.partition(".")[0]].target or target or recipe.attribution.target
    return Attribution(name, recipe.attribution.copy_with(method=method, target=target, **changes))


def _list_correct(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    options = recipe.attribution
    for turn in range(1, recipe.selection.rounds + 1):
        for seed in range(count_seeds(recipe)):
            for name in recipe.references:
                first = _single_attribution(recipe, options.method, set_at_seed(recipe, name, seed))
                yield replace(first, turn=turn, circuit=seed if turn > 1 else 0)
    names = [name for name, _ in reference_sets(recipe)]
    yield from _list_rivals(recipe, names, options.target, options.neuron, completed)


def _list_search(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    """All candidates share the first round's scores; in each later round every candidate attributes again,
    without its own units."""
    method, kinds, circuit = recipe.attribution.method, [kind for kind, _, _ in contrasts_tried(recipe)], 0
    for target, neuron in attributions_tried(recipe):
        first = {
            name: _single_attribution(
                recipe, method, name, target_for_set(target, completed(name)), neuron=neuron
            )
            for name in sets_read_by(recipe, kinds)
        }
        if damages_tried(recipe):
            first["general"] = Attribution("general", recipe.attribution.copy_with(**SENSITIVITY))
        if any(repairs_tried(recipe)):
            first["slope"] = Attribution("general", recipe.attribution.copy_with(**SLOPE))
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
            rival_target = target_for_set(target, completed(name))
            yield _single_attribution(recipe, method, name, rival_target, neuron=neuron)


def target_for_set(target: str, completed: bool) -> str:
    """A candidate's target for a set: `next` if the target needs completions and the set has none."""
    return "next" if target.startswith("completion") and not completed else target


def _correct_variants(recipe: CorrectRecipe, sites: Sequence[Site], count: int) -> Iterator[str]:
    """The names of the variants for a circuit of `count` units, without those that are the same circuit."""
    comparison, own = comparison_for(recipe, sites, count), recipe.attribution.method
    yield "original"
    seeds = range(count_seeds(recipe))
    for seed in seeds if len(seeds) > 1 else (None,):
        if count:
            yield name_draw("ablated", seed)
        yield from (name_draw(str(Variant(own, size)), seed) for size in comparison.own if size != count)
        for method, (_, sizes) in comparison.rivals.items():
            yield from (name_draw(str(Variant(method, size)), seed) for size in sizes if size)
            if method == "aura":
                yield name_draw("aura@all", seed)
        for size in filter(None, comparison.null):
            draws = (None,) if comparison.draws == 1 else range(comparison.draws)
            yield from (name_draw(str(Variant("random", size)), seed, draw) for draw in draws)


def rival_methods(recipe: CorrectRecipe) -> tuple[str, ...]:
    """The methods that the run's own is compared with; random is not among them, as it is the null."""
    named = dict.fromkeys(recipe.compare.methods)
    return tuple(method for method in named if method not in ("random", recipe.attribution.method))


def expertise_sets(recipe: CorrectRecipe) -> list[tuple[str, str]]:
    """The pairs of sets (undesired, benign) that the methods of expertise tell apart; benign are the matched
    samples, or the general ones if there are none. One pair per seed, if the pairs differ."""
    benign = "matched" if "matched" in recipe.references else "general"
    pairs = (
        (set_at_seed(recipe, "undesired", seed), set_at_seed(recipe, benign, seed))
        for seed in range(count_seeds(recipe))
    )
    return list(dict.fromkeys(pairs))


# What a search tries.


def _require_tune(recipe: CorrectRecipe) -> Tune:
    assert recipe.tune
    return recipe.tune


def attributions_tried(recipe: CorrectRecipe) -> list[tuple[str, str]]:
    """(target, neuron) of every attribution in a search's first round."""
    tune, options = _require_tune(recipe), recipe.attribution
    targets, neurons = tune.targets or (options.target,), tune.neurons or (options.neuron,)
    return [(target, neuron) for target in targets for neuron in neurons]


def contrasts_tried(recipe: CorrectRecipe) -> list[tuple[str, float, str | None]]:
    """(plain or matched, penalty, normalize) of every contrast that a search makes of one attribution."""
    tune = _require_tune(recipe)
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
    return sorted(set(_require_tune(recipe).counts)) or [recipe.selection.count or 0]


def circuit_sizes_tried(recipe: CorrectRecipe) -> list[tuple[int, int, float, float | None, float]]:
    """(number of units, rounds, strength, damage at which strengths are fitted, or None, and repair) of every
    circuit that a search finds by one contrast."""
    tune = _require_tune(recipe)
    return [
        (count, rounds, strength, damage, repair)
        for count in counts_tried(recipe)
        for rounds in sorted({min(rounds, count) for rounds in tune.rounds})
        for strength in dict.fromkeys(tune.strengths)
        for damage in dict.fromkeys(damages_tried(recipe) or (None,))
        for repair in dict.fromkeys(repairs_tried(recipe))
    ]


def damages_tried(recipe: CorrectRecipe) -> tuple[float, ...]:
    """The damages at which strengths are fitted; empty if units are selected."""
    return _require_tune(recipe).damages


def repairs_tried(recipe: CorrectRecipe) -> tuple[float, ...]:
    """The repairs with which strengths are fitted; 0 for none."""
    return _require_tune(recipe).repairs


def count_candidates_tried(recipe: CorrectRecipe) -> int:
    """The largest number of circuits that a search tries; contrasts with too few candidates give fewer."""
    return len(attributions_tried(recipe)) * len(contrasts_tried(recipe)) * len(circuit_sizes_tried(recipe))


# The jobs discover and compress.


def _list_compress(recipe: CompressRecipe) -> Iterator[Attribution]:
    compress = recipe.compress
    for _, method, reduce in list_prunings(compress, sampled=False):
        for name in sets_pruned_by(recipe, method):
            attribution = _single_attribution(recipe, method, name, reduce=reduce)
            # Sequential pruning scores each layer after the ones before are pruned, so its scores depend on
            # the fraction; those of any other method serve all fractions.
            times = max(1, len(compress.fractions)) if method == SEQUENTIAL else 1
            yield from (
                replace(attribution, kept=method != SEQUENTIAL, circuit=number) for number in range(times)
            )
    for _, method, reduce in list_prunings(compress, sampled=True):
        for count in sorted(compress.samples):
            for name, _ in reference_sets(recipe):
                attribution = _single_attribution(recipe, method, name, reduce=reduce)
                yield replace(attribution, kept=False, first=count)


def _discover_variants(recipe: DiscoverRecipe, sites: Sequence[Site]) -> Iterator[str]:
    for name, _, _ in rankings(recipe.discover, lambda method: require_method(method).targeted):
        for count in removal_sizes(recipe.discover, name, recipe.attribution.unit, sites):
            for seed, _ in enumerate(reference_sets(recipe)):
                yield str(Variant(name, count, f"seed{seed}"))


def _compress_variants(recipe: CompressRecipe, sites: Sequence[Site]) -> Iterator[str]:
    compress = recipe.compress
    for name, method, _ in list_prunings(compress, sampled=False):
        seeds = len(sets_pruned_by(recipe, method))
        for fraction in compress.fractions or (None,):
            count = count_selected(compress.scope, "weight", sites, fraction=fraction)
            draws = [f"seed{seed}" for seed in range(seeds)] if seeds > 1 else [""]
            yield from (str(Variant(name, count, draw)) for draw in draws)
    for name, _, _ in list_prunings(compress, sampled=True):
        for count in sorted(compress.samples):
            yield from (f"{name}-{count}.seed{seed}" for seed, _ in enumerate(reference_sets(recipe)))


def rankings(discover: Discover, signed: Callable[[str], bool]) -> list[tuple[str, str, str]]:
    """(name, method, rank) of every way to rank units.

    Args:
        signed: whether a method's scores have a sign; without one, all its rankings are the same.
    """
    first_rank, *more_ranks = discover.ranks
    ways: list[tuple[str, str, str]] = []
    for method in discover.methods:
        ways.append((method, method, first_rank))
        ways += [(f"{method}-{rank}", method, rank) for rank in more_ranks if signed(method)]
    return ways


def sets_pruned_by(recipe: CompressRecipe, method: str) -> list[str]:
    """The reference sets that a method prunes with, one at a time; the first for a method without samples."""
    names = [name for name, _ in reference_sets(recipe)]
    reads = method == SEQUENTIAL or require_method(method).run is not None
    return names if recipe.compress.seeds and reads else names[:1]


def list_prunings(compress: Compress, *, sampled: bool) -> list[tuple[str, str, str]]:
    """(name, method, reduce) of every pruning; with several reductions, a relevance has its own in its name.

    Args:
        sampled: list the prunings that are compared by number of samples, or the others.
    """
    ways: list[tuple[str, str, str]] = []
    for method in compress.methods:
        if sampled != bool(compress.samples and require_method(method).run):
            continue
        if method != SEQUENTIAL and require_method(method).targeted and len(compress.reduces) > 1:
            ways += [(f"{method}-{reduce}", method, reduce) for reduce in compress.reduces]
        else:
            ways.append((method, method, compress.reduces[0]))
    return ways


# The number of units in each circuit, whatever the scope.

Sizes = dict[int, dict[str, Any]]
"""Total number of units, ascending → the count or fraction with which `select` takes so many; empty for a
scope n:m."""


@dataclass(frozen=True)
class Comparison:
    """What the job correct evaluates besides the original and the circuit. Variants are named by their total
    number of units.

    Attributes:
        own: sizes that the run's own contrast selects, including the circuit's.
        rivals: each other method → its scope and its sizes.
        null: numbers of random units, each drawn `draws` times.
    """

    own: Sizes
    rivals: dict[str, tuple[str, Sizes]]
    null: tuple[int, ...]
    draws: int


def comparison_for(recipe: CorrectRecipe, sites: Sequence[Site], count: int) -> Comparison:
    """What a circuit of `count` units is compared with."""
    compare, selection = recipe.compare, recipe.selection
    compared = selection_sizes(recipe, sites, compare.counts)
    if selection.tune:
        circuit = selection_sizes(recipe, sites, counts_tried(recipe)).get(count, {"count": count})
    elif selection.count is not None:
        circuit = {"count": selection.count}
    else:
        circuit = {} if parse_scope(selection.scope) else {"fraction": selection.fraction}
    own = dict(sorted({**compared, count: circuit}.items()))
    # Give the rivals the circuit's size too if the recipe does not state it: after a search, or for a
    # fraction or a scope n:m.
    sizes = compared if selection.count is not None and not selection.tune else own
    rivals = {method: rival_sizes(recipe, sites, method, sizes) for method in rival_methods(recipe)}
    null = tuple(own) if "random" in compare.methods else (count,)
    return Comparison(own, rivals, null, compare.random_draws)


def selection_sizes(recipe: CorrectRecipe, sites: Sequence[Site], counts: Iterable[int]) -> Sizes:
    """These counts as total numbers of units; selection.scope says whether a count is of all units, of each
    site or of each row."""
    scope, unit = recipe.selection.scope, recipe.attribution.unit
    return {count_selected(scope, unit, sites, count=size): {"count": size} for size in sorted(set(counts))}


def rival_sizes(recipe: CorrectRecipe, sites: Sequence[Site], method: str, sizes: Sizes) -> tuple[str, Sizes]:
    """The scope of another method, and its sizes. With a scope of its own (compare.scopes), it takes the same
    share of every site or row."""
    scope, unit = (recipe.compare.scopes or {}).get(method, recipe.selection.scope), recipe.attribution.unit
    if scope == recipe.selection.scope:
        return scope, sizes
    if scope == "global":
        return scope, {total: {"count": total} for total in sizes}
    units = sum(units_in(site, unit) for site in sites)
    # Round up at the twelfth digit: a third of three units is one unit, but 0.333333333333 · 3 rounds to 0.
    shares = [-(-total * 10**12 // units) / 10**12 for total in sizes if total < units]
    return scope, {
        count_selected(scope, unit, sites, fraction=share): {"fraction": share} for share in shares
    }


def ranking_scope(discover: Discover, name: str) -> str:
    """The scope by which a ranking's units are removed; `name` is one of `rankings`."""
    method = name if name in discover.methods else name.rpartition("-")[0]
    return (discover.scopes or {}).get(method, "global")


def removal_sizes(discover: Discover, name: str, unit: str, sites: Sequence[Site]) -> Sizes:
    """The numbers of units that a ranking's circuits lack."""
    scope, units = ranking_scope(discover, name), sum(units_in(site, unit) for site in sites)
    sizes: Sizes = {}
    for sparsity in sorted(discover.sparsities):
        total = count_selected(scope, unit, sites, fraction=sparsity)
        if 0 < total < units:
            sizes.setdefault(total, {"count": total} if scope == "global" else {"fraction": sparsity})
    return sizes


def circuit_count(recipe: CorrectRecipe, sites: Sequence[Site]) -> int:
    """The number of units in the circuit; the largest one that a search tries."""
    selection = recipe.selection
    count = max(counts_tried(recipe)) if selection.tune else selection.count
    return count_selected(
        selection.scope, recipe.attribution.unit, sites, count=count, fraction=selection.fraction
    )


def count_selected(
    scope: str, unit: str, sites: Sequence[Site], *, count: int | None = None, fraction: float | None = None
) -> int:
    """The total number of units selected by a count, a fraction, or a scope n:m."""
    units = [units_in(site, unit) for site in sites]
    if groups := parse_scope(scope):
        return sum(units) * groups[0] // groups[1]

    def resolve(total: int) -> int:
        return count if count is not None else share_of(fraction, total)

    if scope == "row":
        return sum(site.out * resolve(site.inp) for site in sites)
    return sum(map(resolve, units)) if scope == "site" else resolve(sum(units))


def units_in(site: Site, unit: str) -> int:
    """How many units a site has."""
    return site.out * site.inp if unit == "weight" else site.heads if unit == "head" else site.out
