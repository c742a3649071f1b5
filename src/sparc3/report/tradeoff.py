"""A cloud of points: effect against damage, each point with its numbers, the budget as a line, the chosen one
in a ring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..results import Measurement
from .charts import Chart, Figure, Scale, drawing, mark, polyline, tag
from .read import RunFolder
from .variant_names import count_units, curve_points, list_methods, method_colours, method_title
from .words import (
    figure,
    in_words,
    is_share,
    percent,
    plain,
    relative,
    relative_interval,
    title,
    with_interval,
)

WIDTH, HEIGHT = 480.0, 342.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 464.0, 42.0, 292.0
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Spot:
    """One point: its tip's id, its class, whose it is, where it is, and its numbers; `faint` where another
    point is better in both."""

    key: str
    colour: str
    head: str
    x: float
    y: float
    rows: Rows
    faint: bool = False


@dataclass(frozen=True)
class Cloud:
    """What one figure shows.

    Attributes:
        lines: classes whose spots are joined in their order.
        front: the best of all at each damage, joined by steps.
        chosen: where this run's circuit is.
        budget: the damage that was allowed; None where nothing was.
    """

    damage: str
    metric: str
    direction: str
    spots: list[Spot]
    lines: list[str]
    front: list[Spot]
    original: tuple[float, float] | None
    chosen: tuple[float, float] | None
    budget: float | None


def harm_words(damage: str) -> str:
    return "perplexity" if damage == "perplexity" else "KL divergence"


def cloud_figure(cloud: Cloud, heading: str, note: str) -> Figure:
    x, y = _scale_damage(cloud), _scale_effect(cloud)
    chart = Chart(x, y, LEFT, RIGHT, TOP, BOTTOM)
    tips: dict[str, dict[str, object]] = {
        spot.key: {"head": spot.head, "rows": spot.rows} for spot in cloud.spots
    }
    lines = [
        chart.draw_line([(s.x, s.y) for s in cloud.spots if s.colour == colour], colour, thin=True)
        for colour in cloud.lines
    ]
    marks = [_draw_spot(spot, x, y, index == 0) for index, spot in enumerate(cloud.spots)]
    parts = [
        _draw_axes(cloud, chart),
        _draw_budget(cloud, x),
        *lines,
        _draw_front(cloud, x, y),
        *marks,
        _mark_original_and_chosen(cloud, x, y),
    ]
    label = f"{heading}; arrow keys step through the points"
    return Figure(heading, note, drawing(WIDTH, HEIGHT, label, *parts, class_="curve cloud"), tips)


def _scale_damage(cloud: Cloud) -> Scale:
    """From no (or the least) damage to the most; far beyond the budget the scale is logarithmic."""
    places = [spot.x for spot in cloud.spots] + [cloud.budget or 0.0, 0.0]
    low, high = min(places), max(*places, 0.002 if cloud.damage == "perplexity" else 1e-6)
    unit = cloud.budget or 3 * sorted(abs(place) for place in places)[len(places) // 2] or high
    room = (high - low) * 0.04
    return Scale(low - room, high + room, LEFT, RIGHT, soft=unit if high > 6 * unit else 0.0)


def _scale_effect(cloud: Cloud) -> Scale:
    places = [spot.y for spot in cloud.spots] + [
        place[1] for place in (cloud.original, cloud.chosen) if place
    ]
    if is_share(cloud.metric) and min(places) >= 0:
        return Scale(0.0, min(1.0, max(places) * 1.06) or 1.0, BOTTOM, TOP)
    room = max(max(places) - min(places), 1e-9) * 0.06
    return Scale(min(places) - room, max(places) + room, BOTTOM, TOP)


def _draw_axes(cloud: Cloud, chart: Chart) -> Markup:
    def write_value(tick: float) -> str:
        return percent(tick).replace(".0", "") if is_share(cloud.metric) else plain(tick)

    perplexity = cloud.damage == "perplexity"
    better = "↙ better" if cloud.direction == "lower" else "↖ better"
    return chart.draw_axes(
        [(chart.x(tick), _write_harm(tick, cloud.damage)) for tick in chart.x.ticks(5)],
        [(chart.y(tick), write_value(tick)) for tick in chart.y.ticks(5)],
        "increase of perplexity" if perplexity else "KL divergence to the original, nats a token",
        tag("text", in_words(cloud.metric), x=LEFT - 44, y=14.0, class_="tick"),
        tag("text", better, x=LEFT - 44, y=BOTTOM + 37, class_="tick better"),
        vertical_grid=True,
    )


def _write_harm(tick: float, damage: str) -> str:
    if abs(tick) < 1e-12:
        return "0"
    return f"{tick * 100:+.3g}\u202f%".replace("-", "\u2212") if damage == "perplexity" else f"{tick:.3g}"


def _draw_budget(cloud: Cloud, x: Scale) -> Markup:
    if cloud.budget is None:
        return Markup("")
    at = x(cloud.budget)
    over = tag("rect", x=at, y=TOP, width=max(RIGHT - at, 0.0), height=BOTTOM - TOP, class_="over")
    rule = tag("line", x1=at, x2=at, y1=TOP - 6, y2=BOTTOM, class_="budget")
    return tag(
        "g",
        over,
        rule,
        tag("text", "budget", x=at, y=TOP - 10, class_="middle tick budget-name"),
        aria_hidden="true",
    )


def _draw_front(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    if len(cloud.front) < 2:
        return Markup("")
    corners: list[tuple[float, float]] = []
    for before, after in zip(cloud.front, cloud.front[1:], strict=False):
        corners += [(x(before.x), y(before.y)), (x(after.x), y(before.y))]
    return tag("path", d=polyline([*corners, (x(cloud.front[-1].x), y(cloud.front[-1].y))]), class_="front")


def _draw_spot(spot: Spot, x: Scale, y: Scale, first: bool) -> Markup:
    words = f"{spot.head}: " + "; ".join(f"{row['name']} {row['text']}" for row in spot.rows)
    hit = tag("circle", cx=x(spot.x), cy=y(spot.y), r=9.0, class_="hit")
    shape = mark(spot.colour, x(spot.x), y(spot.y), 4.2)
    kind = f"spot series {spot.colour}{' faint-spot' if spot.faint else ''}"
    return tag(
        "g",
        hit,
        shape,
        class_=kind,
        tabindex=0 if first else -1,
        role="img",
        aria_label=words,
        data_tip=spot.key,
    )


def _mark_original_and_chosen(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    """A cross where the original is, a ring around the circuit that was chosen."""
    parts = []
    if cloud.original:
        a, b = x(cloud.original[0]), y(cloud.original[1])
        parts.append(tag("path", d=f"M{a - 5:.1f} {b:.1f}h10M{a:.1f} {b - 5:.1f}v10", class_="origin"))
    if cloud.chosen:
        parts.append(tag("circle", cx=x(cloud.chosen[0]), cy=y(cloud.chosen[1]), r=8.5, class_="chosen"))
    return tag("g", *parts, aria_hidden="true")


# The trade-off: what every method gains against what it costs, on the test and, where there was one, in the
# search.


DAMAGES = ("perplexity", "kl")


def tradeoffs(run: RunFolder) -> list[Figure]:
    """Of each damage that was measured: all methods at all counts on the test, and all candidates of the
    search on validation samples."""
    metric = run.behaviour
    if metric is None or metric in DAMAGES or run.job != "correct":
        return []
    made = []
    for damage in DAMAGES:
        made += [found for found in (_draw_tested(run, damage, metric), _draw_search(run, damage)) if found]
    return made


def budget(run: RunFolder, damage: str) -> float | None:
    """What the search was allowed to cost; None without a search, or without a bound on this damage."""
    asked = run.search.get("budget") or {}
    found = asked.get("max_perplexity_increase" if damage == "perplexity" else "max_kl")
    return float(found) if found is not None else None


def harm(run: RunFolder, variant: str, damage: str = "perplexity") -> float | None:
    """A variant's increase of perplexity, relative to the original's, or its KL divergence; None where it was
    not measured."""
    after, before = run.find_measurement(damage, variant), run.find_measurement(damage, "original")
    if after is None or after.value is None:
        return None
    if damage == "kl":
        return after.value
    return after.value / before.value - 1 if before and before.value else None


# On the test
# ---------------------------------------------------------------------------------------------------------


def _draw_tested(run: RunFolder, damage: str, metric: str) -> Figure | None:
    given, spots = method_colours(run), []
    for method in list_methods(run):
        for point in (p for p in curve_points(run, metric) if p.method == method):
            variant = point.variant
            x = harm(run, variant, damage)
            if x is not None and point.measurement.value is not None:
                head = f"{method_title(method)}, {point.count:,} {count_units(point.count, run)}"
                spots.append(
                    Spot(
                        f"{damage}~{variant}",
                        given[method],
                        head,
                        x,
                        point.measurement.value,
                        _tip_rows(run, variant, point.measurement),
                    )
                )
    if len(spots) < 3:
        return None
    circuit, before = run.find_measurement(metric, "ablated"), run.find_measurement(metric, "original")
    own = (harm(run, "ablated", damage), circuit.value if circuit else None)
    chosen = (own[0], own[1]) if own[0] is not None and own[1] is not None else None
    start = (0.0, before.value) if before and before.value is not None else None
    direction = circuit.direction if circuit else "lower"
    cloud = Cloud(
        damage,
        metric,
        direction,
        spots,
        list(dict.fromkeys(s.colour for s in spots)),
        [],
        start,
        chosen,
        budget(run, damage),
    )
    note = (
        f"held-out test prompts and text; a line joins one method’s numbers of {count_units(None, run)}, "
        "few to many; the cross is the original"
    )
    return cloud_figure(cloud, f"{title(metric)} against {harm_words(damage)}", note)


def _tip_rows(run: RunFolder, variant: str, m: Measurement) -> Rows:
    rows = [{"key": "", "name": in_words(m.metric), "text": with_interval(m)}]
    moved, increase = run.difference("perplexity", variant), harm(run, variant)
    if increase is not None:
        rows.append(
            {
                "key": "",
                "name": "perplexity",
                "text": f"{relative(increase)} {relative_interval(moved) if moved else ''}".strip(),
            }
        )
    for metric in ("kl", "fluency"):
        if found := run.find_measurement(metric, variant):
            rows.append({"key": "", "name": in_words(metric), "text": with_interval(found)})
    return rows


# In the search
# -------------------------------------------------------------------------------------------------------


def _draw_search(run: RunFolder, damage: str) -> Figure | None:
    """All candidates and the other methods' counts; of a damage without a bound there is no figure."""
    search, limit = run.search, budget(run, damage)
    tried, aim = (
        [one for one in search.get("candidates") or [] if _place_candidate(one, damage, search)],
        str(search.get("aim") or ""),
    )
    if limit is None or not tried:
        return None
    spots = [_make_spot(run, index, one, damage, "m0") for index, one in enumerate(tried)]
    given = method_colours(run)
    for method, rows in (search.get("others") or {}).items():
        there = [{**row, "method": method} for row in rows if _place_candidate(row, damage, search)]
        spots += [
            _make_spot(run, f"{method}{index}", row, damage, given.get(method, "m6"))
            for index, row in enumerate(there)
        ]
    best, direction = search.get("best") or {}, "higher" if aim.startswith("rur") else "lower"
    own = [spot for spot in spots if spot.colour == "m0"]
    cloud = Cloud(
        damage,
        aim,
        direction,
        [*(s for s in spots if s.colour != "m0"), *own],
        [],
        _pareto_front(own, direction),
        (0.0, float(search["original"][aim])),
        _place_candidate(best, damage, search),
        limit,
    )
    return cloud_figure(
        cloud, f"The search: {in_words(aim)} against {harm_words(damage)}", _write_search_note(search, damage)
    )


def _place_candidate(
    one: Mapping[str, Any], damage: str, search: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Where a candidate stands; None where its effect or its damage was not measured."""
    figures, aim = one.get("figures") or {}, str(search.get("aim") or "")
    if aim not in figures or damage not in figures:
        return None
    x = figures["kl"] if damage == "kl" else figures["perplexity"] / search["original"]["perplexity"] - 1
    return float(x), float(figures[aim])


def _make_spot(run: RunFolder, index: int | str, one: Mapping[str, Any], damage: str, colour: str) -> Spot:
    place = _place_candidate(one, damage, run.search)
    assert place
    figures, aim, count = one["figures"], str(run.search["aim"]), int(one["count"])
    rows = [{"key": "", "name": in_words(aim), "text": figure(figures[aim], aim)}]
    rows.append(
        {
            "key": "",
            "name": "perplexity",
            "text": relative(figures["perplexity"] / run.search["original"]["perplexity"] - 1),
        }
    )
    rows += [{"key": "", "name": "KL divergence", "text": plain(figures["kl"])}] if "kl" in figures else []
    rows.append({"key": "", "name": "budget", "text": "kept" if one.get("within") else "exceeded"})
    whose = method_title(str(one["method"])) if "method" in one else way(one)
    return Spot(
        f"search.{damage}~{index}",
        colour,
        f"{count:,} {count_units(count, run)}, {whose}",
        *place,
        rows,
        colour == "m0" and not one.get("pareto"),
    )


def way(one: Mapping[str, Any]) -> str:
    """How a candidate was found: "target completion:1, signed, matched contrast"."""
    penalty = f"penalty {one['penalty']:g}" if one.get("penalty") is not None else ""
    parts = [
        f"target {(one.get('targets') or {}).get('undesired', '')}",
        str(one.get("neuron", "")),
        f"{one.get('contrast', '')} contrast",
        penalty,
    ]
    rounds = f"{one['rounds']} rounds" if one.get("rounds", 1) > 1 else ""
    strength = f"strength {one['strength']:g}" if one.get("strength", 1) != 1 else ""
    return ", ".join(filter(None, [*parts, str(one.get("normalize") or ""), rounds, strength]))


def _pareto_front(spots: Sequence[Spot], direction: str) -> list[Spot]:
    """Of the spots, least damage first, those that better all before them."""
    sign, found = (1 if direction == "lower" else -1), list[Spot]()
    for spot in sorted(spots, key=lambda s: (s.x, sign * s.y)):
        if not found or sign * spot.y < sign * found[-1].y:
            found.append(spot)
    return found


def _write_search_note(search: Mapping[str, Any], damage: str) -> str:
    candidates = search.get("candidates") or []
    within = sum(bool(one.get("within")) for one in candidates)
    unmeasured = sum(str(search.get("aim")) not in (one.get("figures") or {}) for one in candidates)
    rest = f", {unmeasured} cost too much to be asked for their effect" if unmeasured else ""
    samples = search.get("samples") or {}
    prompts = sum(count for name, count in samples.items() if name not in DAMAGES)
    on = f"{prompts:,} prompts and {samples.get(damage, 0):,} texts for validation"
    return (
        f"{len(candidates)} candidates on {on}, {within} within the budget{rest}; "
        "filled discs and the stepped line are the Pareto front"
    )
