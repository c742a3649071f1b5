"""What a run that looked for a task's circuit says: how sparse it can be, by each method, and how sure that
is."""

from markupsafe import Markup

from ..circuits.circuit import Circuit
from ..results import Difference
from .read import RunFolder
from .variant_names import Point, count_units, curve_points, list_methods, method_title
from .words import (
    MINUS,
    Remark,
    in_words,
    join_words,
    percent,
    plain,
    small_interval,
    value_of,
    with_interval,
)

METRIC = "ioi.accuracy"
SPARSEST = "circuit.sparsest"


def sparsest_point(run: RunFolder, method: str) -> Point | None:
    """The method's sparsest circuit that keeps enough accuracy, as do all its less sparse ones; None where
    not one does."""
    best = None
    for point in curve_points(run, METRIC):
        if point.method == method:
            if (point.measurement.value or 0.0) < _required_accuracy(run):
                break
            best = point
    return best


def load_sparsest_circuit(run: RunFolder) -> Circuit | None:
    """The sparsest circuit that keeps enough accuracy, of the run's own method and first seed; None where the
    run did not leave it."""
    best = sparsest_point(run, run.method or "")
    where = run.path / f"circuits/{run.method}@{sum(run.sizes.values()) - best.count}.json" if best else None
    return Circuit.load(where) if where and where.is_file() else None


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: its own method's sparsest circuit, and how far the best of the others gets."""
    own, enough = run.method or "", _write_percent(_required_accuracy(run))
    best = sparsest_point(run, own)
    if best is None:
        return Markup("No {} circuit that was tried keeps {} of the answers right.").format(
            method_title(own), enough
        )
    share = Markup('<b class="figure after">{}</b>').format(_write_share(run, best.count))
    right = Markup("{}{}").format(value_of(best.measurement), small_interval(best.measurement))
    said = Markup("The {} circuit answers right {} of the time with {} of {} removed").format(
        method_title(own), right, share, _write_units(run)
    )
    others = [
        (point.count, method)
        for method in list_methods(run)
        if method != own and (point := sparsest_point(run, method))
    ]
    if not others:
        return Markup("{}; no other method’s keeps {} at any sparsity.").format(said, enough)
    count, method = max(others)
    return Markup("{}; of the other methods {} gets furthest, keeping {} up to {}.").format(
        said, method_title(method), enough, _write_share(run, count)
    )


def remarks(run: RunFolder) -> list[Remark]:
    return [
        remark
        for remark in (
            _remark_on_sparser_methods(run),
            _remark_on_sparsest(run),
            _remark_on_margins(run),
            _remark_on_rankings(run),
            _remark_on_faithfulness(run),
            _remark_on_whole_model(run),
            _remark_on_choice(run),
        )
        if remark
    ]


def _remark_on_sparser_methods(run: RunFolder) -> Remark | None:
    """Methods whose circuit may be as sparse, or sparser."""
    own = sparsest_point(run, run.method or "")
    mine = own.count if own else 0
    ahead = [
        method
        for method in list_methods(run)
        if method != run.method and (point := sparsest_point(run, method)) and point.count >= mine
    ]
    if not ahead:
        return None
    return Remark(
        "careful",
        Markup("<b>As sparse or sparser at the same accuracy:</b> {}.").format(
            join_words(map(method_title, ahead))
        ),
    )


def _remark_on_sparsest(run: RunFolder) -> Remark:
    """The sparsest circuit of every method, the mean of its reference sets."""
    found = sorted(
        ((m.value or 0.0, m) for m in run.results if m.metric == SPARSEST), key=lambda one: -one[0]
    )
    parts = [f"{method_title(m.variant)} {with_interval(m)}" for _, m in found]
    text = Markup(
        "<b>Largest share removed with at least {} accuracy,</b> of those tried, each reference set for "
        "itself: {}."
    )
    return Remark("plain", text.format(_write_percent(_required_accuracy(run)), join_words(parts)))


def _remark_on_margins(run: RunFolder) -> Remark | None:
    """How much further the run's own method gets than each other one, paired by reference set."""
    found = [d for d in run.results.differences if d.metric == SPARSEST and d.to == run.method]
    if not found:
        return None
    parts = [f"{method_title(d.from_)} {_write_points(d)}" for d in sorted(found, key=lambda d: d.value)]
    text = Markup(
        "<b>The {} circuit’s share less the others’,</b> in percentage points, paired by reference set: {}."
    )
    return Remark("plain", text.format(method_title(run.method or ""), join_words(parts)))


def _write_points(d: Difference) -> str:
    """ "+3.2 [+1.0, +5.0]": a difference of shares in percentage points."""

    def of(value: float) -> str:
        return f"{100 * value:+.1f}".replace("-", MINUS)

    return of(d.value) + (f" [{of(d.ci95[0])}, {of(d.ci95[1])}]" if d.ci95 else "")


def _remark_on_rankings(run: RunFolder) -> Remark | None:
    """What the names say, where methods were ranked twice."""
    first, *others = run.provenance.get("ranks") or ["signed"]
    if not others:
        return None
    said = {
        "signed": "the score itself, highest first, as the paper’s Eq. 1 and 2 have it",
        "abs": "the size of the score",
    }
    text = Markup("<b>Units are kept by</b> {}; where a name ends in ({}), by {}.")
    return Remark("plain", text.format(said[first], others[0], said[others[0]]))


def _remark_on_faithfulness(run: RunFolder) -> Remark | None:
    cpr = [(m.value, m.variant) for m in run.results if m.metric == "circuit.cpr" and m.value is not None]
    cmd = {m.variant: m.value for m in run.results if m.metric == "circuit.cmd" and m.value is not None}
    if not cpr:
        return None
    parts = [
        f"{method_title(method)} {plain(value)} and {plain(cmd[method])}"
        for value, method in sorted(cpr, reverse=True)
    ]
    text = Markup(
        "<b>Faithfulness, CPR (higher is better) and CMD (lower is better):</b> {}; removed units are set to "
        "zero."
    )
    return Remark("plain", text.format(join_words(parts)))


def _remark_on_whole_model(run: RunFolder) -> Remark | None:
    original, empty = run.find_measurement(METRIC, "original"), run.find_measurement(METRIC, "empty")
    if original is None or empty is None:
        return None
    text = Markup(
        "<b>The whole model</b> has {} {}; without any of these {} it has {}, which is what a circuit has to "
        "beat."
    )
    kind = "plain" if (original.value or 0.0) >= _required_accuracy(run) > (empty.value or 0.0) else "careful"
    return Remark(
        kind, text.format(in_words(METRIC), with_interval(original), count_units(None, run), value_of(empty))
    )


def _remark_on_choice(run: RunFolder) -> Remark:
    seeds = int(run.provenance.get("seeds") or 1)
    text = Markup(
        "<b>Sparsities were compared on the test prompts</b> themselves, {}; intervals of the curves are "
        "over prompts{}."
    )
    several = (
        f"each the mean of {seeds} reference sets",
        ", those of the shares, CPR and CMD over reference sets",
    )
    return Remark("plain", text.format(*(several if seeds > 1 else ("with one reference set", ""))))


def _required_accuracy(run: RunFolder) -> float:
    return float(run.provenance.get("enough") or 0.9)


def _write_percent(value: float) -> str:
    return percent(value).replace(".0", "")


def _write_share(run: RunFolder, count: int) -> str:
    return percent(count / max(1, sum(run.sizes.values())))


def _write_units(run: RunFolder) -> str:
    total = sum(run.sizes.values())
    return f"{total:,} {count_units(total, run)}"
