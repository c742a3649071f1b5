"""What a run of a recipe does, step by step, as far as the recipe alone says: `run` goes by it, and `plan`
counts it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..attribution.methods import require_method
from ..circuits.select import parse_scope, share_of
from ..errors import UserError
from ..evaluation.metrics import PerplexitySettings, PromptSettings
from ..models.sites import Site
from ..recipe.schema import SEQUENTIAL, Compress, Discover, Recipe, Reference
from ..samples.sources import is_path


def reference_sets(recipe: Recipe) -> Iterator[tuple[str, Reference]]:
    """The reference sets by name; for the job discover one a seed, task.0, task.1, …, drawn independently of
    each other.

    So also where a compression compares numbers of samples: general, general.1, general.2, …
    """
    for name, spec in recipe.references.items():
        if recipe.job == "discover":
            yield from ((f"{name}.{seed}", spec.model_copy(update={"seeds": (seed,)})) for seed in spec.seeds)
        elif recipe.compress and recipe.compress.samples:
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


@dataclass(frozen=True)
class Comparison:
    """Beside the original and the circuit, what the job correct evaluates.

    Attributes:
        own: numbers of units that the run's own contrast selects; the circuit's may be among them.
        methods: the other methods.
        counts: and their numbers of units.
        null: numbers of random units, each drawn `draws` times.
    """

    own: tuple[int, ...]
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    null: tuple[int, ...]
    draws: int


def comparison_for(recipe: Recipe, count: int) -> Comparison:
    """What stands beside a circuit of `count` units."""
    compare, chosen = recipe.compare, recipe.selection
    own = {*compare.counts, *([count] if chosen.count is not None or chosen.tune else [])}
    # A search may end at a count that compare.counts does not have.
    counts = {*compare.counts, *([count] if chosen.tune else [])}
    null = own if "random" in compare.methods else {count}
    return Comparison(
        tuple(sorted(own)),
        rival_methods(recipe),
        tuple(sorted(counts)),
        tuple(sorted(null)),
        compare.random_draws,
    )


def rival_methods(recipe: Recipe) -> tuple[str, ...]:
    """The methods that stand beside the run's own; random is the null."""
    return tuple(
        method
        for method in dict.fromkeys(recipe.compare.methods)
        if method not in ("random", recipe.attribution.method)
    )


def attributions_tried(recipe: Recipe) -> list[tuple[str, str]]:
    """(target, neuron) of every attribution that a search begins with."""
    tune, asked = recipe.selection.tune, recipe.attribution
    assert tune
    return [
        (target, neuron)
        for target in tune.targets or (asked.target,)
        for neuron in tune.neurons or (asked.neuron,)
    ]


def contrasts_tried(recipe: Recipe) -> list[tuple[str, float, str | None]]:
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


def counts_tried(recipe: Recipe) -> list[int]:
    tune = recipe.selection.tune
    assert tune
    return sorted(set(tune.counts)) or [recipe.selection.count or 0]


def circuit_sizes_tried(recipe: Recipe) -> list[tuple[int, int, float]]:
    """(number of units, rounds, strength) of every circuit that a search looks for by one contrast."""
    tune = recipe.selection.tune
    assert tune
    return [
        (count, rounds, strength)
        for count in counts_tried(recipe)
        for rounds in sorted({min(rounds, count) for rounds in tune.rounds})
        for strength in dict.fromkeys(tune.strengths)
    ]


def count_candidates_tried(recipe: Recipe) -> int:
    """At most so many circuits a search tries; fewer where a contrast has too few candidates for one."""
    return len(attributions_tried(recipe)) * len(contrasts_tried(recipe)) * len(circuit_sizes_tried(recipe))


def search_aim(recipe: Recipe) -> tuple[str, PromptSettings]:
    """The metric that a search betters, and its settings on validation prompts."""
    metrics, tune = recipe.metrics(), recipe.selection.tune
    assert tune
    name = "toxicity" if "toxicity" in metrics else "repetition"
    settings = metrics[name]
    assert isinstance(settings, PromptSettings)
    return name, settings.model_copy(update={"split": "validation", "count": tune.prompts or settings.count})


def search_budget(recipe: Recipe) -> dict[str, PerplexitySettings]:
    """The metrics that a search keeps within bounds, by name, with the source and the number of their
    validation texts.

    Raises:
        UserError: there is no text that the test does not hold.
    """
    metrics, tune = recipe.metrics(), recipe.selection.tune
    assert tune
    found = {}
    for name in ("perplexity", *(("kl",) if tune.max_kl is not None else ())):
        settings = metrics[name]
        assert isinstance(settings, PerplexitySettings)
        found[name] = settings.model_copy(
            update={
                "split": "validation",
                "source": tune.text_source or _validation_text(recipe, settings),
                "count": tune.texts or settings.count,
            }
        )
    return found


def _validation_text(recipe: Recipe, settings: PerplexitySettings) -> str:
    if not is_path(settings.source):
        return settings.source
    general = recipe.references["general"].source
    if is_path(general) and Path(general).resolve() == Path(settings.source).resolve():
        raise UserError(
            "evaluation.perplexity and references.general read the same file, which leaves no text for the "
            "search; "
            "give selection.tune.text_source another text"
        )
    return general


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


def removed_counts(discover: Discover, units: int) -> list[int]:
    """How many of all units each circuit lacks."""
    return sorted(
        {count for sparsity in discover.sparsities if 0 < (count := share_of(sparsity, units)) < units}
    )


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


def circuit_count(recipe: Recipe, sites: Sequence[Site]) -> int:
    """How many units the circuit has, where no search decides it."""
    asked = recipe.selection
    return count_selected(
        asked.scope, recipe.attribution.unit, sites, count=asked.count, fraction=asked.fraction
    )
