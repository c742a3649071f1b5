"""The trade-off: what every method gains against what it costs, on the test and in the search."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..results import Candidate, Measurement, Search, Trial, pareto_front
from .charts import Chart, Figure, Scale, Tip, TipRow, drawing, line, mark, polyline, tag, tip_target
from .read import RunFolder
from .words import (
    MINUS,
    PERCENT,
    count_units,
    figure,
    in_words,
    is_share,
    method_title,
    number_of_units,
    percent,
    plain,
    relative,
    relative_interval,
    title,
    with_interval,
)

DAMAGES = {"perplexity": "perplexity", "kl": "KL divergence"}
WIDTH, HEIGHT = 480.0, 342.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 464.0, 42.0, 292.0
Place = tuple[float, float]
"""Damage and effect."""


@dataclass(frozen=True)
class Spot:
    """One point: its tip and the id of that, its class and place; `faint` where another is better in both."""

    key: str
    colour: str
    place: Place
    tip: Tip
    faint: bool = False


@dataclass(frozen=True)
class Cloud:
    """What one figure shows.

    Attributes:
        joined: whether spots of one class are joined in their order.
        front: the best of all at each damage, least damage first, joined by steps.
        chosen: where this run's circuit is.
        budget: the damage that was allowed; None where nothing was.
    """

    damage: str
    metric: str
    direction: str
    spots: list[Spot]
    original: Place | None
    chosen: Place | None
    budget: float | None
    joined: bool = False
    front: Sequence[Place] = ()


def tradeoffs(run: RunFolder) -> list[Figure]:
    """Of each damage: all methods at all counts on the test, and all candidates of the search."""
    metric = run.behaviour
    if metric is None or metric in DAMAGES or run.job != "correct":
        return []
    drawn = [(_draw_tested(run, damage, metric), _draw_search(run, damage)) for damage in DAMAGES]
    return [found for both in drawn for found in both if found]


# On the test


def _draw_tested(run: RunFolder, damage: str, metric: str) -> Figure | None:
    points = sorted(run.points(metric), key=lambda p: run.methods.index(p.method))
    spots = [
        Spot(
            f"{damage}~{p.variant}",
            run.colours[p.method],
            (x, p.value),
            Tip(
                f"{method_title(p.method)}, {number_of_units(p.count, run)}",
                _tip_rows(run, p.variant, p.measurement),
            ),
        )
        for p in points
        if (x := run.harm(p.variant, damage)) is not None
    ]
    if len(spots) < 3:
        return None
    circuit, before = run.find(metric, "ablated"), run.find(metric, "original")
    x, y = run.harm("ablated", damage), circuit.value if circuit else None
    cloud = Cloud(
        damage,
        metric,
        circuit.direction if circuit else "lower",
        spots,
        original=(0.0, before.value) if before and before.value is not None else None,
        chosen=(x, y) if x is not None and y is not None else None,
        budget=run.budget(damage),
        joined=True,
    )
    joined = f"a line joins one method’s numbers of {count_units(None, run)}, few to many"
    note = f"held-out test prompts and text; {joined}; the cross is the original"
    return _draw_cloud(cloud, f"{title(metric)} against {DAMAGES[damage]}", note)


def _tip_rows(run: RunFolder, variant: str, m: Measurement) -> list[TipRow]:
    rows = [TipRow(in_words(m.metric), with_interval(m))]
    d, increase = run.difference("perplexity", variant), run.harm(variant)
    if increase is not None:
        written = f"{relative(increase)} {relative_interval(d) if d else ''}".strip()
        rows.append(TipRow("perplexity", written))
    others = [(metric, run.find(metric, variant)) for metric in ("kl", "fluency")]
    return rows + [TipRow(in_words(metric), with_interval(found)) for metric, found in others if found]


# In the search


def _draw_search(run: RunFolder, damage: str) -> Figure | None:
    """All candidates and the other methods' counts; of a damage without a bound there is no figure."""
    search, limit = run.search, run.budget(damage)
    if search is None or limit is None:
        return None
    own = _place_spots(run, search, damage, search.candidates)
    if not own:
        return None
    others = [_place_spots(run, search, damage, tried, method) for method, tried in search.others.items()]
    direction = "higher" if search.aim.startswith("rur") else "lower"
    sign = 1 if direction == "lower" else -1
    places = [(x, sign * y) for x, y in (spot.place for spot in own)]
    front = sorted({places[index] for index in pareto_front(places)})
    best = _place_spots(run, search, damage, [search.best])
    cloud = Cloud(
        damage,
        search.aim,
        direction,
        [*(spot for some in others for spot in some), *own],
        original=(0.0, search.original[search.aim]),
        chosen=best[0].place if best else None,
        budget=limit,
        front=[(x, sign * y) for x, y in front],
    )
    heading = f"The search: {in_words(search.aim)} against {DAMAGES[damage]}"
    return _draw_cloud(cloud, heading, _write_search_note(search, damage))


def _place_spots(
    run: RunFolder, search: Search, damage: str, tried: Sequence[Candidate | Trial], method: str = ""
) -> list[Spot]:
    """A spot for each whose effect and damage were measured: candidates, or another method's counts."""
    spots = list[Spot]()
    for one in (one for one in tried if search.aim in one.figures and damage in one.figures):
        figures, own = one.figures, isinstance(one, Candidate)
        increase = figures["perplexity"] / search.original["perplexity"] - 1
        rows = [
            TipRow(in_words(search.aim), figure(figures[search.aim], search.aim)),
            TipRow("perplexity", relative(increase)),
            *([TipRow("KL divergence", plain(figures["kl"]))] if "kl" in figures else []),
            TipRow("budget", "kept" if one.within else "exceeded"),
        ]
        whose = _describe_way(one) if isinstance(one, Candidate) else method_title(method)
        spots.append(
            Spot(
                f"search.{damage}~{method}{len(spots)}",
                "m0" if own else run.colours.get(method, "m6"),
                (figures["kl"] if damage == "kl" else increase, figures[search.aim]),
                Tip(f"{number_of_units(one.count, run)}, {whose}", rows),
                faint=isinstance(one, Candidate) and not one.pareto,
            )
        )
    return spots


def _describe_way(one: Candidate) -> str:
    """How a candidate was found: "target completion:1, signed, matched contrast"."""
    parts = [
        f"target {one.targets.get('undesired', '')}",
        one.neuron,
        f"{one.contrast} contrast",
        f"penalty {one.penalty:g}" if one.penalty is not None else "",
        one.normalize or "",
        f"{one.rounds} rounds" if one.rounds > 1 else "",
        f"strength {one.strength:g}" if one.strength != 1 else "",
    ]
    return ", ".join(filter(None, parts))


def _write_search_note(search: Search, damage: str) -> str:
    within = sum(one.within for one in search.candidates)
    unmeasured = sum(search.aim not in one.figures for one in search.candidates)
    rest = f", {unmeasured} cost too much to be asked for their effect" if unmeasured else ""
    prompts = sum(count for name, count in search.samples.items() if name not in DAMAGES)
    on = f"{prompts:,} prompts and {search.samples.get(damage, 0):,} texts for validation"
    front = "filled discs and the stepped line are the Pareto front"
    return f"{len(search.candidates)} candidates on {on}, {within} within the budget{rest}; {front}"


# A cloud of points: effect against damage, the budget as a line, the chosen one in a ring.


def _draw_cloud(cloud: Cloud, heading: str, note: str) -> Figure:
    x, y = _scale_damage(cloud), _scale_effect(cloud)
    chart = Chart(x, y, LEFT, RIGHT, TOP, BOTTOM)
    lines: dict[str, list[Place]] = {}
    for spot in cloud.spots if cloud.joined else ():
        lines.setdefault(spot.colour, []).append(spot.place)
    parts = [
        _draw_axes(cloud, chart),
        _draw_budget(cloud, x),
        *(chart.draw_line(places, colour, thin=True) for colour, places in lines.items()),
        _draw_front(cloud, x, y),
        *(_draw_spot(spot, x, y, index == 0) for index, spot in enumerate(cloud.spots)),
        _mark_original_and_chosen(cloud, x, y),
    ]
    label = f"{heading}; arrow keys step through the points"
    tips = {spot.key: spot.tip for spot in cloud.spots}
    return Figure(heading, note, drawing(WIDTH, HEIGHT, label, *parts, class_="curve cloud"), tips)


def _scale_damage(cloud: Cloud) -> Scale:
    """From no damage to the most; far beyond the budget the scale turns logarithmic."""
    places = [spot.place[0] for spot in cloud.spots] + [cloud.budget or 0.0, 0.0]
    low, high = min(places), max(*places, 0.002 if cloud.damage == "perplexity" else 1e-6)
    unit = cloud.budget or 3 * sorted(map(abs, places))[len(places) // 2] or high
    room = (high - low) * 0.04
    return Scale(low - room, high + room, LEFT, RIGHT, soft=unit if high > 6 * unit else 0.0)


def _scale_effect(cloud: Cloud) -> Scale:
    marked = [place for place in (cloud.original, cloud.chosen) if place]
    heights = [y for _, y in [*(spot.place for spot in cloud.spots), *marked]]
    if is_share(cloud.metric) and min(heights) >= 0:
        return Scale(0.0, min(1.0, max(heights) * 1.06) or 1.0, BOTTOM, TOP)
    room = max(max(heights) - min(heights), 1e-9) * 0.06
    return Scale(min(heights) - room, max(heights) + room, BOTTOM, TOP)


def _draw_axes(cloud: Cloud, chart: Chart) -> Markup:
    perplexity = cloud.damage == "perplexity"

    def write_value(tick: float) -> str:
        return percent(tick).replace(".0", "") if is_share(cloud.metric) else plain(tick)

    def write_harm(tick: float) -> str:
        if abs(tick) < 1e-12:
            return "0"
        return f"{tick * 100:+.3g}{PERCENT}".replace("-", MINUS) if perplexity else f"{tick:.3g}"

    better = "↙ better" if cloud.direction == "lower" else "↖ better"
    return chart.draw_axes(
        [(chart.x(tick), write_harm(tick)) for tick in chart.x.ticks(5)],
        [(chart.y(tick), write_value(tick)) for tick in chart.y.ticks(5)],
        "increase of perplexity" if perplexity else "KL divergence to the original, nats a token",
        tag("text", in_words(cloud.metric), x=LEFT - 44, y=14.0, class_="tick"),
        tag("text", better, x=LEFT - 44, y=BOTTOM + 37, class_="tick better"),
        vertical_grid=True,
    )


def _draw_budget(cloud: Cloud, x: Scale) -> Markup:
    if cloud.budget is None:
        return Markup("")
    at = x(cloud.budget)
    over = tag("rect", x=at, y=TOP, width=max(RIGHT - at, 0.0), height=BOTTOM - TOP, class_="over")
    name = tag("text", "budget", x=at, y=TOP - 10, class_="middle tick budget-name")
    return tag("g", over, line(at, at, TOP - 6, BOTTOM, "budget"), name, aria_hidden="true")


def _draw_front(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    if len(cloud.front) < 2:
        return Markup("")
    corners: list[Place] = []
    for before, after in zip(cloud.front, cloud.front[1:], strict=False):
        corners += [(x(before[0]), y(before[1])), (x(after[0]), y(before[1]))]
    last = cloud.front[-1]
    return tag("path", d=polyline([*corners, (x(last[0]), y(last[1]))]), class_="front")


def _draw_spot(spot: Spot, x: Scale, y: Scale, first: bool) -> Markup:
    at = (x(spot.place[0]), y(spot.place[1]))
    hit = tag("circle", cx=at[0], cy=at[1], r=9.0, class_="hit")
    kind = f"spot series {spot.colour}{' faint-spot' if spot.faint else ''}"
    shape = mark(spot.colour, *at, 4.2)
    return tip_target("g", hit, shape, class_=kind, key=spot.key, words=spot.tip.words, first=first)


def _mark_original_and_chosen(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    """A cross where the original is, a ring around the circuit that was chosen."""
    parts = []
    if cloud.original:
        a, b = x(cloud.original[0]), y(cloud.original[1])
        parts.append(tag("path", d=f"M{a - 5:.1f} {b:.1f}h10M{a:.1f} {b - 5:.1f}v10", class_="origin"))
    if cloud.chosen:
        parts.append(tag("circle", cx=x(cloud.chosen[0]), cy=y(cloud.chosen[1]), r=8.5, class_="chosen"))
    return tag("g", *parts, aria_hidden="true")
