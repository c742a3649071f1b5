"""The list of work: every attribution and every evaluation of a run. `run` builds it once it has the samples,
and `plan` prints it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..attribution.activations import METHODS as EXPERTISE
from ..attribution.methods import require_method
from ..attribution.options import AttributionOptions
from ..attribution.token_relevance import METHODS as RELEVANCE
from ..models.sites import Site
from ..recipe.schema import CompressRecipe, CorrectRecipe, DiscoverRecipe, Recipe
from ..recipe.sections import SEQUENTIAL, Reference
from ..results import Variant
from .sizes import (
    circuit_count,
    comparison_for,
    count_selected,
    counts_tried,
    prunings_of,
    rankings,
    removed_sizes,
    rival_methods,
)


def reference_sets(recipe: Recipe) -> Iterator[tuple[str, Reference]]:
    """The reference sets by name; for the job discover one a seed, task.0, task.1, …, drawn independently of
    each other.

    So also where a compression compares numbers of samples: general, general.1, general.2, …
    """
    for name, spec in recipe.references.items():
        if recipe.job == "discover":
            yield from ((f"{name}.{seed}", spec.model_copy(update={"seeds": (seed,)})) for seed in spec.seeds)
        elif recipe.job == "compress" and recipe.compress.samples:
            yield from (
                (f"{name}.{place}" if place else name, spec.model_copy(update={"seeds": (seed,)}))
                for place, seed in enumerate(spec.seeds)
            )
        else:
            yield name, spec


def is_protected(recipe: Recipe) -> bool:
    """Whether neurons are tried alone before any is selected."""
    return (
        recipe.job == "correct"
        and recipe.selection.protect
        and (recipe.attribution.unit, recipe.attribution.sites) == ("neuron", ("mlp.up",))
    )


def has_cards(recipe: Recipe) -> bool:
    """Whether cards of the circuit's units are written."""
    return (
        recipe.job == "correct"
        and recipe.cards.most > 0
        and recipe.attribution.unit == "neuron"
        and "mlp.up" in recipe.attribution.sites
    )


TOKEN_MAPS = 6
"""How many undesired samples a run shows the tokens' relevance of."""


def has_token_maps(recipe: Recipe) -> bool:
    """Whether the relevance of the tokens of undesired samples is written."""
    return recipe.job == "correct" and recipe.attribution.method in RELEVANCE


def attributions_tried(recipe: CorrectRecipe) -> list[tuple[str, str]]:
    """(target, neuron) of every attribution that a search begins with."""
    tune, asked = recipe.selection.tune, recipe.attribution
    assert tune
    return [
        (target, neuron)
        for target in tune.targets or (asked.target,)
        for neuron in tune.neurons or (asked.neuron,)
    ]


def contrasts_tried(recipe: CorrectRecipe) -> list[tuple[str, float, str | None]]:
    """(plain or matched, penalty, normalize): every way in which a search contrasts the scores of one
    attribution."""
    tune = recipe.selection.tune
    assert tune
    kinds = tune.contrasts or (("plain", "matched") if "matched" in recipe.references else ("plain",))
    return [
        (kind, penalty, scale)
        for kind in kinds
        for penalty in (tune.penalties if kind == "matched" else (1.0,))
        for scale in tune.normalize
    ]


def sets_read_by(recipe: Recipe, kinds: list[str]) -> list[str]:
    """The reference sets that contrasts of these kinds read."""
    return [name for name in recipe.references if name != "matched" or "matched" in kinds]


def circuit_sizes_tried(recipe: CorrectRecipe) -> list[tuple[int, int, float]]:
    """(number of units, rounds, strength) of every circuit that a search looks for by one contrast."""
    tune = recipe.selection.tune
    assert tune
    return [
        (count, rounds, strength)
        for count in counts_tried(recipe)
        for rounds in sorted({min(rounds, count) for rounds in tune.rounds})
        for strength in dict.fromkeys(tune.strengths)
    ]


def count_candidates_tried(recipe: CorrectRecipe) -> int:
    """At most so many circuits a search tries; fewer where a contrast has too few candidates for one."""
    return len(attributions_tried(recipe)) * len(contrasts_tried(recipe)) * len(circuit_sizes_tried(recipe))


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


Completed = Callable[[str], bool]


def list_work(recipe: Recipe, sites: Sequence[Site], completed: Completed) -> WorkList:
    """The work of a recipe on a model with these sites.

    Args:
        completed: whether the samples of a reference set have completions.
    """
    if recipe.job == "discover":
        made = tuple(dict.fromkeys(_list_discover(recipe)))
        names = ("original", "empty", *_discover_variants(recipe, sites))
        return WorkList(made, names, score_files=len(made))
    if recipe.job == "compress":
        made = tuple(dict.fromkeys(_list_compress(recipe)))
        names = ("original", *_compress_variants(recipe, sites))
        return WorkList(made, names, score_files=sum(one.kept for one in made))
    made = tuple(dict.fromkeys((_list_search if recipe.tune else _list_correct)(recipe, completed)))
    rivals, count, trials = rival_methods(recipe), circuit_count(recipe, sites), 0
    # The contrast, and what the methods of expertise share.
    files = len(made) + 1 + bool(set(rivals) & set(EXPERTISE))
    if recipe.tune:
        trials = (
            1 + count_candidates_tried(recipe) + len(rivals) * len(counts_tried(recipe)) + ("aura" in rivals)
        )
        files += len(sets_read_by(recipe, [kind for kind, _, _ in contrasts_tried(recipe)]))
    alone = min(recipe.cards.alone, recipe.cards.most, count) if has_cards(recipe) else 0
    return WorkList(made, tuple(_variants_beside_circuit(recipe, sites, count)), alone, trials, files)


def _single_attribution(
    recipe: Recipe,
    method: str,
    name: str,
    target: str | None = None,
    neuron: str | None = None,
    reduce: str | None = None,
) -> Attribution:
    asked, own = recipe.attribution, recipe.references[name.partition(".")[0]].target
    options = asked.but(
        method=method,
        target=own or target or asked.target,
        neuron=neuron or asked.neuron,
        reduce=reduce or asked.reduce,
    )
    return Attribution(name, options)


def _list_discover(recipe: DiscoverRecipe) -> Iterator[Attribution]:
    for method in recipe.discover.methods:
        for name, _ in reference_sets(recipe):
            yield _single_attribution(recipe, method, name)


def _list_compress(recipe: CompressRecipe) -> Iterator[Attribution]:
    compress = recipe.compress
    for _, method, reduce in prunings_of(compress, sampled=False):
        for number in range(max(1, len(compress.fractions)) if method == SEQUENTIAL else 1):
            yield replace(
                _single_attribution(recipe, method, "general", reduce=reduce),
                kept=method != SEQUENTIAL,
                circuit=number,
            )
    for _, method, reduce in prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            for name, _ in reference_sets(recipe):
                yield replace(
                    _single_attribution(recipe, method, name, reduce=reduce), kept=False, first=count
                )


def _list_correct(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    for turn in range(1, recipe.selection.rounds + 1):
        for name in recipe.references:
            yield replace(_single_attribution(recipe, recipe.attribution.method, name), turn=turn)
    yield from _list_rivals(
        recipe, list(recipe.references), recipe.attribution.target, recipe.attribution.neuron, completed
    )


def _list_search(recipe: CorrectRecipe, completed: Completed) -> Iterator[Attribution]:
    """The first round is shared by all; in each later one every candidate attributes again, on a model of its
    own."""
    method, kinds, circuit = (recipe.attribution.method, [kind for kind, _, _ in contrasts_tried(recipe)], 0)
    for target, neuron in attributions_tried(recipe):
        for name in sets_read_by(recipe, kinds):
            yield _single_attribution(recipe, method, name, _target_for_set(name, target, completed), neuron)
        for kind, _, _ in contrasts_tried(recipe):
            for _, rounds, _ in circuit_sizes_tried(recipe):
                circuit += 1
                for turn in range(2, rounds + 1):
                    for name in sets_read_by(recipe, [kind]):
                        again = _single_attribution(
                            recipe, method, name, _target_for_set(name, target, completed), neuron
                        )
                        yield replace(again, turn=turn, circuit=circuit)
    yield from _list_rivals(recipe, sets_read_by(recipe, kinds), *attributions_tried(recipe)[0], completed)


def _list_rivals(
    recipe: CorrectRecipe, names: Sequence[str], target: str, neuron: str, completed: Completed
) -> Iterator[Attribution]:
    for method in rival_methods(recipe):
        for name in names if method not in EXPERTISE else ():
            yield _single_attribution(recipe, method, name, _target_for_set(name, target, completed), neuron)


def _target_for_set(name: str, target: str, completed: Completed) -> str:
    return "next" if target.startswith("completion") and not completed(name) else target


def _variants_beside_circuit(recipe: CorrectRecipe, sites: Sequence[Site], count: int) -> Iterator[str]:
    """The variants of the job correct, but those that are the circuit once more."""
    beside, own = comparison_for(recipe, sites, count), recipe.attribution.method
    yield "original"
    if count:
        yield "ablated"
    yield from (str(Variant(own, many)) for many in beside.own if many != count)
    for method, (_, sizes) in beside.rivals.items():
        yield from (str(Variant(method, many)) for many in sizes if many)
        if method == "aura":
            yield "aura@all"
    for many in beside.null if beside.draws > 1 else ():
        yield from (str(Variant("random", many, str(draw))) for draw in range(beside.draws) if many)
    yield from (str(Variant("random", many)) for many in beside.null if beside.draws == 1 and many)


def _discover_variants(recipe: DiscoverRecipe, sites: Sequence[Site]) -> Iterator[str]:
    for name, _, _ in rankings(recipe.discover, lambda method: require_method(method).targeted):
        for count in removed_sizes(recipe.discover, name, recipe.attribution.unit, sites):
            for seed, _ in enumerate(reference_sets(recipe)):
                yield str(Variant(name, count, f"seed{seed}"))


def _compress_variants(recipe: CompressRecipe, sites: Sequence[Site]) -> Iterator[str]:
    compress = recipe.compress
    counts = [
        count_selected(compress.scope, "weight", sites, fraction=fraction)
        for fraction in compress.fractions or (None,)
    ]
    for name, _, _ in prunings_of(compress, sampled=False):
        yield from (str(Variant(name, count)) for count in counts)
    for name, _, _ in prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            yield from (f"{name}-{count}.seed{seed}" for seed, _ in enumerate(reference_sets(recipe)))
