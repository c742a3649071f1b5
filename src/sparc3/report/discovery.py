"""The sentences of a run with the job discover: how sparse each method's circuit can be, and how certain that
is."""

from markupsafe import Markup

from ..circuits.circuit import Circuit
from ..results import Difference, Variant, find_sparsest
from .headline import remark_on_verdict
from .read import Point, RunFolder
from .words import (
    MINUS,
    Remark,
    format_with_interval,
    format_with_small_interval,
    inline_title,
    join_words,
    method_title,
    percent,
    plain,
    remark,
    value_of,
)

METRIC = "ioi.accuracy"
SPARSEST = "circuit.sparsest"
RANKINGS = {
    "signed": "the score itself, highest first, as the paper’s Eq. 1 and 2 have it",
    "abs": "the size of the score",
}


def find_sparsest_point(run: RunFolder, method: str | None) -> Point | None:
    """The method's sparsest circuit that, like all its less sparse ones, keeps enough accuracy; None without
    one."""
    points = [point for point in run.points(METRIC) if point.method == method]
    best = find_sparsest([p.count for p in points], [p.value for p in points], run.provenance.enough)
    return next((point for point in points[::-1] if point.count == best), None)


def load_sparsest_circuit(run: RunFolder) -> Circuit | None:
    """The sparsest circuit of the run's own method and first seed; None if the folder does not contain it."""
    best = find_sparsest_point(run, run.method)
    path = run.path / f"circuits/{Variant(best.method, run.total - best.count)}.json" if best else None
    return Circuit.load(path) if path and path.is_file() else None


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: its own method's sparsest circuit, and how far the best of the others gets."""
    own, enough = method_title(run.method), _write_enough(run)
    best = find_sparsest_point(run, run.method)
    if best is None:
        return Markup("No {} circuit that was tried keeps {} of the answers right.").format(own, enough)
    sentence = Markup(
        'The {} circuit answers right {} of the time with <b class="figure after">{}</b> of {} removed'
    ).format(
        own, format_with_small_interval(best.measurement), _write_share(run, best), run.write_count(run.total)
    )
    others = _find_others(run)
    if not others:
        return Markup("{}; no other method’s keeps {} at any sparsity.").format(sentence, enough)
    furthest = max(others, key=lambda point: (point.count, point.method))
    return Markup("{}; of the other methods {} gets furthest, keeping {} up to {}.").format(
        sentence, method_title(furthest.method), enough, _write_share(run, furthest)
    )


def _find_others(run: RunFolder) -> list[Point]:
    """The sparsest circuit of every other method."""
    points = [find_sparsest_point(run, method) for method in run.methods if method != run.method]
    return [point for point in points if point]


def _write_enough(run: RunFolder) -> str:
    return percent(run.provenance.enough).replace(".0", "")


def _write_share(run: RunFolder, point: Point) -> str:
    return percent(point.count / max(1, run.total))


def remarks(run: RunFolder) -> list[Remark]:
    return [
        *remark_on_verdict(run),
        *_remark_on_sparser_methods(run),
        _remark_on_sparsest(run),
        *_remark_on_margins(run),
        *_remark_on_rankings(run),
        *_remark_on_faithfulness(run),
        *_remark_on_whole_model(run),
        _remark_on_choice(run),
    ]


def _remark_on_sparser_methods(run: RunFolder) -> list[Remark]:
    own = find_sparsest_point(run, run.method)
    ahead = [point.method for point in _find_others(run) if point.count >= (own.count if own else 0)]
    text = "<b>As sparse or sparser at the same accuracy:</b> {}."
    return [remark("careful", text, join_words(map(method_title, ahead)))] if ahead else []


def _remark_on_sparsest(run: RunFolder) -> Remark:
    """The sparsest circuit of every method, as the mean over reference sets."""
    measurements = sorted((m for m in run.results if m.metric == SPARSEST), key=lambda m: -(m.value or 0.0))
    text = (
        "<b>Largest share removed with at least {} accuracy,</b> of those tried, "
        "each reference set for itself: {}."
    )
    parts = [f"{method_title(m.variant)} {format_with_interval(m)}" for m in measurements]
    return remark("plain", text, _write_enough(run), join_words(parts))


def _remark_on_margins(run: RunFolder) -> list[Remark]:
    """How much sparser the run's own circuits are than each other method's, paired by reference set."""

    def write(d: Difference) -> str:
        value, *ends = (f"{100 * x:+.1f}".replace("-", MINUS) for x in (d.value, *(d.ci95 or ())))
        return f"{method_title(d.from_)} {value}" + (f" [{', '.join(ends)}]" if ends else "")

    differences = [d for d in run.results.differences if d.metric == SPARSEST and d.to == run.method]
    parts = [write(d) for d in sorted(differences, key=lambda d: d.value)]
    text = (
        "<b>The {} circuit’s share less the others’,</b> in percentage points, paired by reference set: {}."
    )
    return [remark("plain", text, method_title(run.method), join_words(parts))] if parts else []


def _remark_on_rankings(run: RunFolder) -> list[Remark]:
    """What the suffixes of names mean, if methods were ranked in two ways."""
    first, *others = run.provenance.ranks or ["signed"]
    text = "<b>Units are kept by</b> {}; where a name ends in ({}), by {}."
    return [remark("plain", text, RANKINGS[first], other, RANKINGS[other]) for other in others[:1]]


def _remark_on_faithfulness(run: RunFolder) -> list[Remark]:
    cpr, cmd = (
        {m.variant: m.value for m in run.results if m.metric == f"circuit.{area}" and m.value is not None}
        for area in ("cpr", "cmd")
    )
    parts = [
        f"{method_title(method)} {plain(value)} and {plain(cmd[method])}"
        for value, method in sorted(((value, method) for method, value in cpr.items()), reverse=True)
    ]
    text = "<b>Faithfulness, CPR (higher is better) and CMD (lower is better):</b> {}; removed units are {}."
    done = "replaced by their means" if run.provenance.ablation == "mean" else "set to zero"
    return [remark("plain", text, join_words(parts), done)] if parts else []


def _remark_on_whole_model(run: RunFolder) -> list[Remark]:
    original, empty, enough = run.find(METRIC, "original"), run.find(METRIC, "empty"), run.provenance.enough
    if original is None or empty is None:
        return []
    text = (
        "<b>The whole model</b> has {} {}; without any of these {} it has {}, "
        "which is what a circuit has to beat."
    )
    kind = "plain" if (original.value or 0.0) >= enough > (empty.value or 0.0) else "careful"
    return [
        remark(kind, text, inline_title(METRIC), format_with_interval(original), run.units, value_of(empty))
    ]


def _remark_on_choice(run: RunFolder) -> Remark:
    seeds, scope, interval_note = run.provenance.seeds, "with one reference set", ""
    if seeds > 1:
        scope = f"each the mean of {seeds} reference sets"
        interval_note = ", those of the shares, CPR and CMD over reference sets"
    text = (
        "<b>Sparsities were compared on the test prompts</b> themselves, {}; "
        "intervals of the curves are over prompts{}."
    )
    return remark("plain", text, scope, interval_note)
