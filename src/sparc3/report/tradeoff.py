"""The trade-off: what every method gains against what it costs, on the test and, where there was one, in the search."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..results import Measurement
from .cloud import Cloud, Rows, Spot, cloud_figure, harm_words
from .curves import Figure
from .folder import RunFolder
from .numbers import figure, in_words, plain, relative, relative_interval, title, with_interval
from .variants import colours, methods, named, points, units

DAMAGES = ("perplexity", "kl")


def tradeoffs(run: RunFolder) -> list[Figure]:
    """Of each damage that was measured: all methods at all counts on the test, and all candidates of the search on validation samples."""
    metric = run.behaviour
    if metric is None or metric in DAMAGES or run.job != "correct":
        return []
    made = []
    for damage in DAMAGES:
        made += [found for found in (_tested(run, damage, metric), _searched(run, damage)) if found]
    return made


def budget(run: RunFolder, damage: str) -> float | None:
    """What the search was allowed to cost; None without a search, or without a bound on this damage."""
    asked = run.search.get("budget") or {}
    found = asked.get("max_perplexity_increase" if damage == "perplexity" else "max_kl")
    return float(found) if found is not None else None


def harm(run: RunFolder, variant: str, damage: str = "perplexity") -> float | None:
    """A variant's increase of perplexity, relative to the original's, or its KL divergence; None where it was not measured."""
    after, before = run.measured(damage, variant), run.measured(damage, "original")
    if after is None or after.value is None:
        return None
    if damage == "kl":
        return after.value
    return after.value / before.value - 1 if before and before.value else None


# On the test ---------------------------------------------------------------------------------------------------------


def _tested(run: RunFolder, damage: str, metric: str) -> Figure | None:
    given, spots = colours(run), []
    for method in methods(run):
        for point in (p for p in points(run, metric) if p.method == method):
            variant = f"{method}@{point.count}"
            x = harm(run, variant, damage)
            if x is not None and point.measurement.value is not None:
                head = f"{named(method)}, {point.count:,} {units(point.count, run)}"
                spots.append(Spot(f"{damage}~{variant}", given[method], head, x, point.measurement.value, _rows(run, variant, point.measurement)))
    if len(spots) < 3:
        return None
    circuit, before = run.measured(metric, "ablated"), run.measured(metric, "original")
    own = (harm(run, "ablated", damage), circuit.value if circuit else None)
    chosen = (own[0], own[1]) if own[0] is not None and own[1] is not None else None
    start = (0.0, before.value) if before and before.value is not None else None
    direction = circuit.direction if circuit else "lower"
    cloud = Cloud(damage, metric, direction, spots, list(dict.fromkeys(s.colour for s in spots)), [], start, chosen, budget(run, damage))
    note = f"held-out test prompts and text; a line joins one method’s numbers of {units(None, run)}, few to many; the cross is the original"
    return cloud_figure(cloud, f"{title(metric)} against {harm_words(damage)}", note)


def _rows(run: RunFolder, variant: str, m: Measurement) -> Rows:
    rows = [{"key": "", "name": in_words(m.metric), "text": with_interval(m)}]
    moved, increase = run.difference("perplexity", variant), harm(run, variant)
    if increase is not None:
        rows.append({"key": "", "name": "perplexity", "text": f"{relative(increase)} {relative_interval(moved) if moved else ''}".strip()})
    for metric in ("kl", "fluency"):
        if found := run.measured(metric, variant):
            rows.append({"key": "", "name": in_words(metric), "text": with_interval(found)})
    return rows


# In the search -------------------------------------------------------------------------------------------------------


def _searched(run: RunFolder, damage: str) -> Figure | None:
    """All candidates and the other methods' counts; of a damage without a bound there is no figure."""
    search, limit = run.search, budget(run, damage)
    tried, aim = [one for one in search.get("candidates") or [] if _at(one, damage, search)], str(search.get("aim") or "")
    if limit is None or not tried:
        return None
    spots = [_candidate(run, index, one, damage, "m0") for index, one in enumerate(tried)]
    given = colours(run)
    for method, rows in (search.get("others") or {}).items():
        there = [{**row, "method": method} for row in rows if _at(row, damage, search)]
        spots += [_candidate(run, f"{method}{index}", row, damage, given.get(method, "m6")) for index, row in enumerate(there)]
    best, direction = search.get("best") or {}, "higher" if aim.startswith("rur") else "lower"
    own = [spot for spot in spots if spot.colour == "m0"]
    cloud = Cloud(
        damage, aim, direction, [*(s for s in spots if s.colour != "m0"), *own], [], _front(own, direction),
        (0.0, float(search["original"][aim])), _at(best, damage, search), limit,
    )  # fmt: skip
    return cloud_figure(cloud, f"The search: {in_words(aim)} against {harm_words(damage)}", _search_note(search, damage))


def _at(one: Mapping[str, Any], damage: str, search: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where a candidate stands; None where its effect or its damage was not measured."""
    figures, aim = one.get("figures") or {}, str(search.get("aim") or "")
    if aim not in figures or damage not in figures:
        return None
    x = figures["kl"] if damage == "kl" else figures["perplexity"] / search["original"]["perplexity"] - 1
    return float(x), float(figures[aim])


def _candidate(run: RunFolder, index: int | str, one: Mapping[str, Any], damage: str, colour: str) -> Spot:
    place = _at(one, damage, run.search)
    assert place
    figures, aim, count = one["figures"], str(run.search["aim"]), int(one["count"])
    rows = [{"key": "", "name": in_words(aim), "text": figure(figures[aim], aim)}]
    rows.append({"key": "", "name": "perplexity", "text": relative(figures["perplexity"] / run.search["original"]["perplexity"] - 1)})
    rows += [{"key": "", "name": "KL divergence", "text": plain(figures["kl"])}] if "kl" in figures else []
    rows.append({"key": "", "name": "budget", "text": "kept" if one.get("within") else "exceeded"})
    whose = named(str(one["method"])) if "method" in one else way(one)
    return Spot(f"search.{damage}~{index}", colour, f"{count:,} {units(count, run)}, {whose}", *place, rows, colour == "m0" and not one.get("pareto"))


def way(one: Mapping[str, Any]) -> str:
    """How a candidate was found: "target completion:1, signed, matched contrast"."""
    penalty = f"penalty {one['penalty']:g}" if one.get("penalty") is not None else ""
    parts = [f"target {(one.get('targets') or {}).get('undesired', '')}", str(one.get("neuron", "")), f"{one.get('contrast', '')} contrast", penalty]
    rounds = f"{one['rounds']} rounds" if one.get("rounds", 1) > 1 else ""
    strength = f"strength {one['strength']:g}" if one.get("strength", 1) != 1 else ""
    return ", ".join(filter(None, [*parts, str(one.get("normalize") or ""), rounds, strength]))


def _front(spots: Sequence[Spot], direction: str) -> list[Spot]:
    """Of the spots, least damage first, those that better all before them."""
    sign, found = (1 if direction == "lower" else -1), list[Spot]()
    for spot in sorted(spots, key=lambda s: (s.x, sign * s.y)):
        if not found or sign * spot.y < sign * found[-1].y:
            found.append(spot)
    return found


def _search_note(search: Mapping[str, Any], damage: str) -> str:
    candidates = search.get("candidates") or []
    within = sum(bool(one.get("within")) for one in candidates)
    unmeasured = sum(str(search.get("aim")) not in (one.get("figures") or {}) for one in candidates)
    rest = f", {unmeasured} cost too much to be asked for their effect" if unmeasured else ""
    samples = search.get("samples") or {}
    prompts = sum(count for name, count in samples.items() if name not in DAMAGES)
    on = f"{prompts:,} prompts and {samples.get(damage, 0):,} texts for validation"
    return f"{len(candidates)} candidates on {on}, {within} within the budget{rest}; filled discs and the stepped line are the Pareto front"
