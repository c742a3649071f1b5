"""Which attributions and which evaluations a run makes: `experiment.steps` put together, where a run would
look at what it found."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..attribution.activations import METHODS as EXPERTISE
from ..attribution.methods import require_method
from ..experiment import work_list
from ..models.sites import Site
from ..recipe.schema import SEQUENTIAL, Recipe


@dataclass(frozen=True)
class Attribution:
    """One reference set scored by one method.

    Attributes:
        set: name of the reference set.
        first: only so many of its samples; None for all.
        turn: 1, and above it in later rounds, where the model lacks what the rounds before found.
        circuit: number of the circuit that a later round goes on with.
        kept: whether a file of scores is left.
    """

    method: str
    set: str
    target: str
    neuron: str
    reduce: str
    first: int | None = None
    turn: int = 1
    circuit: int = 0
    kept: bool = True


def attributions(recipe: Recipe, completed: Callable[[str], bool]) -> list[Attribution]:
    """Every attribution of the run, each once.

    Args:
        completed: whether the samples of a reference set have completions.
    """
    of_job = {
        "correct": _list_search if recipe.selection.tune else _list_correct,
        "discover": _list_discover,
        "compress": _list_compress,
    }
    return list(dict.fromkeys(of_job[recipe.job](recipe, completed)))


Completed = Callable[[str], bool]


def _single_attribution(
    recipe: Recipe,
    method: str,
    name: str,
    target: str | None = None,
    neuron: str | None = None,
    reduce: str | None = None,
) -> Attribution:
    asked, own = recipe.attribution, recipe.references[name.partition(".")[0]].target
    return Attribution(
        method, name, own or target or asked.target, neuron or asked.neuron, reduce or asked.reduce
    )


def _list_discover(recipe: Recipe, completed: Completed) -> Iterator[Attribution]:
    assert recipe.discover
    for method in recipe.discover.methods:
        for name, _ in work_list.reference_sets(recipe):
            yield _single_attribution(recipe, method, name)


def _list_compress(recipe: Recipe, completed: Completed) -> Iterator[Attribution]:
    compress = recipe.compress
    assert compress
    for _, method, reduce in work_list.prunings_of(compress, sampled=False):
        for number in range(max(1, len(compress.fractions)) if method == SEQUENTIAL else 1):
            yield replace(
                _single_attribution(recipe, method, "general", reduce=reduce),
                kept=method != SEQUENTIAL,
                circuit=number,
            )
    for _, method, reduce in work_list.prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            for name, _ in work_list.reference_sets(recipe):
                yield replace(
                    _single_attribution(recipe, method, name, reduce=reduce), kept=False, first=count
                )


def _list_correct(recipe: Recipe, completed: Completed) -> Iterator[Attribution]:
    for turn in range(1, recipe.selection.rounds + 1):
        for name in recipe.references:
            yield replace(_single_attribution(recipe, recipe.attribution.method, name), turn=turn)
    yield from _list_rivals(
        recipe, list(recipe.references), recipe.attribution.target, recipe.attribution.neuron, completed
    )


def _list_search(recipe: Recipe, completed: Completed) -> Iterator[Attribution]:
    """The first round is shared by all; in each later one every candidate attributes again, on a model of its
    own."""
    method, kinds, circuit = (
        recipe.attribution.method,
        [kind for kind, _, _ in work_list.contrasts_tried(recipe)],
        0,
    )
    for target, neuron in work_list.attributions_tried(recipe):
        for name in work_list.sets_read_by(recipe, kinds):
            yield _single_attribution(recipe, method, name, _target_for_set(name, target, completed), neuron)
        for kind, _, _ in work_list.contrasts_tried(recipe):
            for _, rounds, _ in work_list.circuit_sizes_tried(recipe):
                circuit += 1
                for turn in range(2, rounds + 1):
                    for name in work_list.sets_read_by(recipe, [kind]):
                        again = _single_attribution(
                            recipe, method, name, _target_for_set(name, target, completed), neuron
                        )
                        yield replace(again, turn=turn, circuit=circuit)
    yield from _list_rivals(
        recipe, work_list.sets_read_by(recipe, kinds), *work_list.attributions_tried(recipe)[0], completed
    )


def _list_rivals(
    recipe: Recipe, names: Sequence[str], target: str, neuron: str, completed: Completed
) -> Iterator[Attribution]:
    for method in work_list.rival_methods(recipe):
        for name in names if method not in EXPERTISE else ():
            yield _single_attribution(recipe, method, name, _target_for_set(name, target, completed), neuron)


def _target_for_set(name: str, target: str, completed: Completed) -> str:
    return "next" if target.startswith("completion") and not completed(name) else target


def score_files(recipe: Recipe, made: Sequence[Attribution]) -> int:
    """How many files of scores the run leaves, with the contrast, expertise, and what a search copies."""
    more = 0
    if recipe.job == "correct":
        more = 1 + bool(set(work_list.rival_methods(recipe)) & set(EXPERTISE))
        if recipe.selection.tune:
            more += len(
                work_list.sets_read_by(recipe, [kind for kind, _, _ in work_list.contrasts_tried(recipe)])
            )
    return sum(one.kept for one in made) + more


@dataclass(frozen=True)
class Evaluations:
    """Every model that is measured.

    Attributes:
        names: of those on the test samples, the original first; a run leaves a file for each.
        alone: how many units are measured alone, for their cards.
        trials: how many circuits a search measures, at most, the original among them.
        assumed: what had to be assumed.
    """

    names: tuple[str, ...]
    alone: int = 0
    trials: int = 0
    assumed: list[str] = field(default_factory=list)


def evaluations(recipe: Recipe, units: int, sites: Sequence[Site]) -> Evaluations:
    """What is measured, of models with so many units in all."""
    if recipe.discover:
        return Evaluations(("original", "empty", *_discover_variants(recipe, units)))
    if recipe.compress:
        return Evaluations(("original", *_compress_variants(recipe, sites)))
    tune, notes = recipe.selection.tune, list[str]()
    count = max(work_list.counts_tried(recipe)) if tune else work_list.circuit_count(recipe, sites)
    trials = 0
    if tune:
        whole = "aura" in work_list.rival_methods(recipe)
        trials = 1 + work_list.count_candidates_tried(recipe)
        trials += len(work_list.rival_methods(recipe)) * len(work_list.counts_tried(recipe)) + whole
        notes.append(
            f"every candidate of the search taken to be measured whole, and its best to have {count} units"
        )
    alone = min(recipe.cards.alone, recipe.cards.most, count) if work_list.has_cards(recipe) else 0
    return Evaluations(tuple(_variants_beside_circuit(recipe, count)), alone, trials, notes)


def _variants_beside_circuit(recipe: Recipe, count: int) -> Iterator[str]:
    """The variants of the job correct, but those that are the circuit once more."""
    beside, own = work_list.comparison_for(recipe, count), recipe.attribution.method
    yield "original"
    if count:
        yield "ablated"
    yield from (f"{own}@{many}" for many in beside.own if many != count)
    for method in beside.methods:
        yield from (f"{method}@{many}" for many in beside.counts)
        if method == "aura":
            yield "aura@all"
    for many in beside.null if beside.draws > 1 else ():
        yield from (f"random@{many}.{draw}" for draw in range(beside.draws) if many)
    yield from (f"random@{many}" for many in beside.null if beside.draws == 1 and many)


def _discover_variants(recipe: Recipe, units: int) -> Iterator[str]:
    assert recipe.discover
    for name, _, _ in work_list.rankings(recipe.discover, lambda method: require_method(method).targeted):
        for count in work_list.removed_counts(recipe.discover, units):
            yield from (
                f"{name}@{count}.seed{seed}" for seed, _ in enumerate(work_list.reference_sets(recipe))
            )


def _compress_variants(recipe: Recipe, sites: Sequence[Site]) -> Iterator[str]:
    compress = recipe.compress
    assert compress
    counts = [
        work_list.count_selected(compress.scope, "weight", sites, fraction=fraction)
        for fraction in compress.fractions or (None,)
    ]
    for name, _, _ in work_list.prunings_of(compress, sampled=False):
        yield from (f"{name}@{count}" for count in counts)
    for name, _, _ in work_list.prunings_of(compress, sampled=True):
        for count in sorted(compress.samples):
            yield from (
                f"{name}-{count}.seed{seed}" for seed, _ in enumerate(work_list.reference_sets(recipe))
            )
