"""The trade-off: the effect of every method against its damage, on the test and in the search."""

from collections.abc import Sequence
from typing import NamedTuple

from ..results import Candidate, Measurement, Search, Trial, pareto_front
from .charts import Chart, Figure, Place, Scale, Tip, line, mark, polyline, tag
from .read import RunFolder
from .words import (
    MINUS,
    PERCENT,
    figure,
    format_with_interval,
    inline_title,
    is_share,
    method_title,
    percent,
    plain,
    relative,
    relative_interval,
    title,
)

DAMAGES = {"perplexity": "perplexity", "kl": "KL divergence"}
LEFT, RIGHT, TOP, BOTTOM = 54.0, 464.0, 42.0, 292.0


class Spot(NamedTuple):
    """One point: the id of its tip, its class, its place (damage, effect), and the intervals of both; `faint`
    if another point is better in both."""

    key: str
    colour: str
    place: Place
    tip: Tip
    faint: bool = False
    intervals: tuple[Place | None, Place | None] = (None, None)


def tradeoffs(run: RunFolder) -> list[Figure]:
    """For each damage: all methods at all counts on the test, and all candidates of the search."""
    metric = run.behaviour
    if metric is None or metric in DAMAGES or run.provenance.job != "correct":
        return []
    figure_pairs = [(_draw_tested(run, damage, metric), _draw_search(run, damage)) for damage in DAMAGES]
    return [drawing for pair in figure_pairs for drawing in pair if drawing]


def _draw_tested(run: RunFolder, damage: str, metric: str) -> Figure | None:
    spots = []
    for p in sorted(run.points(metric), key=lambda p: run.methods.index(p.method)):
        x = run.harm(p.variant, damage)
        if x is not None:
            head = f"{method_title(p.method)}, {run.write_count(p.count)}"
            tip = Tip(head, _tip_rows(run, p.variant, p.measurement))
            intervals = _damage_interval(run, p.variant, damage), p.measurement.ci95
            key, colour = f"{damage}~{p.variant}", run.colours[p.method]
            spots.append(Spot(key, colour, (x, p.value), tip, intervals=intervals))
    if len(spots) < 3:  # two points are no trade-off; the table has them
        return None
    circuit, before = run.find(metric, "ablated"), run.find(metric, "original")
    x, y = run.harm("ablated", damage), circuit.value if circuit else None
    return _draw_cloud(
        f"{title(metric)} against {DAMAGES[damage]}",
        f"held-out test prompts and text; a line joins one method’s numbers of {run.units}, few to many; "
        "the cross is the original; thin bars are 95\u202f% intervals, cut at the edge",
        damage,
        metric,
        circuit.direction if circuit else "lower",
        spots,
        original=(0.0, before.value) if before and before.value is not None else None,
        chosen=(x, y) if x is not None and y is not None else None,
        budget=run.budget(damage),
        joined=True,
    )


def _damage_interval(run: RunFolder, variant: str, damage: str) -> Place | None:
    """The interval of the paired change of perplexity, relative to the original's, or of the KL
    divergence."""
    measured, before = run.find(damage, variant), run.find(damage, "original")
    if damage == "kl":
        return measured.ci95 if measured else None
    d = run.difference(damage, variant)
    if d is None or d.ci95 is None or before is None or not before.value:
        return None
    return d.ci95[0] / before.value, d.ci95[1] / before.value


def _tip_rows(run: RunFolder, variant: str, m: Measurement) -> list[tuple[str, str, str]]:
    rows = [(inline_title(m.metric), format_with_interval(m), "")]
    d, increase = run.difference("perplexity", variant), run.harm(variant)
    if increase is not None:
        text = f"{relative(increase)} {relative_interval(d) if d else ''}".strip()
        rows.append(("perplexity", text, ""))
    others = [(metric, run.find(metric, variant)) for metric in ("kl", "fluency")]
    return rows + [
        (inline_title(metric), format_with_interval(measured), "") for metric, measured in others if measured
    ]


def _draw_search(run: RunFolder, damage: str) -> Figure | None:
    """All candidates and the other methods' counts; None for a damage that the search did not bound."""
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
    within = sum(candidate.within for candidate in search.candidates)
    unmeasured = sum(search.aim not in candidate.figures for candidate in search.candidates)
    note = f", {unmeasured} cost too much to be asked for their effect" if unmeasured else ""
    prompts = sum(count for name, count in search.samples.items() if name not in DAMAGES)
    sample_counts = f"{prompts:,} prompts and {search.samples.get(damage, 0):,} texts for validation"
    return _draw_cloud(
        f"The search: {inline_title(search.aim)} against {DAMAGES[damage]}",
        f"{len(search.candidates)} candidates on {sample_counts}, {within} within the budget{note}; "
        "filled discs and the stepped line are the Pareto front",
        damage,
        search.aim,
        direction,
        [*(spot for spots_of_method in others for spot in spots_of_method), *own],
        original=(0.0, search.original[search.aim]),
        chosen=best[0].place if best else None,
        budget=limit,
        front=[(x, sign * y) for x, y in front],
    )


def _place_spots(
    run: RunFolder, search: Search, damage: str, tried: Sequence[Candidate | Trial], method: str = ""
) -> list[Spot]:
    """A spot for each candidate, or each count of another method, whose effect and damage were measured."""
    spots = list[Spot]()
    for trial in (trial for trial in tried if search.aim in trial.figures and damage in trial.figures):
        figures, is_own = trial.figures, isinstance(trial, Candidate)
        increase = figures["perplexity"] / search.original["perplexity"] - 1
        rows = [
            (inline_title(search.aim), figure(figures[search.aim], search.aim), ""),
            ("perplexity", relative(increase), ""),
            *([("KL divergence", plain(figures["kl"]), "")] if "kl" in figures else []),
            *([("fluency", plain(figures["fluency"]), "")] if "fluency" in figures else []),
            ("budget", "kept" if trial.within else "exceeded", ""),
        ]
        description = _describe_way(trial) if isinstance(trial, Candidate) else method_title(method)
        spots.append(
            Spot(
                f"search.{damage}~{method}{len(spots)}",
                "m0" if is_own else run.colours.get(method, "m6"),
                (figures["kl"] if damage == "kl" else increase, figures[search.aim]),
                Tip(f"{run.write_count(trial.count)}, {description}", rows),
                faint=isinstance(trial, Candidate) and not trial.pareto,
            )
        )
    return spots


def _describe_way(candidate: Candidate) -> str:
    """How a candidate was found: "target completion:1, signed, matched contrast"."""
    parts = [
        f"target {candidate.targets.get('undesired', '')}",
        candidate.neuron,
        f"{candidate.contrast} contrast",
        f"penalty {candidate.penalty:g}" if candidate.penalty is not None else "",
        candidate.normalize or "",
        f"{candidate.rounds} rounds" if candidate.rounds > 1 else "",
        f"strength {candidate.strength:g}" if candidate.strength != 1 else "",
        f"damage {candidate.damage:g}" if candidate.damage is not None else "",
        f"repair {candidate.repair:g}" if candidate.repair else "",
    ]
    return ", ".join(filter(None, parts))


def _draw_cloud(
    heading: str,
    note: str,
    damage: str,
    metric: str,
    direction: str,
    spots: list[Spot],
    *,
    original: Place | None,
    chosen: Place | None,
    budget: float | None,
    joined: bool = False,
    front: Sequence[Place] = (),
) -> Figure:
    """Effect against damage, with a cross at the original and a ring around this run's circuit.

    Args:
        budget: the allowed damage, drawn as a line; None without a bound.
        joined: whether a line joins the spots of each class, in order.
        front: the Pareto front, least damage first, drawn as steps.
    """
    effects = [y for _, y in [*(spot.place for spot in spots), *filter(None, (original, chosen))]]
    effects += [end for spot in spots for end in spot.intervals[1] or ()]
    x, y = _scale_damage(damage, spots, budget), Scale.fit(effects, BOTTOM, TOP, share=is_share(metric))
    chart = Chart(x, y, (LEFT, RIGHT, TOP, BOTTOM), (480.0, 342.0))
    perplexity, share = damage == "perplexity", is_share(metric)

    def write_harm(tick: float) -> str:
        if abs(tick) < 1e-12:
            return "0"
        return f"{tick * 100:+.3g}{PERCENT}".replace("-", MINUS) if perplexity else f"{tick:.3g}"

    better = "↙ better" if direction == "lower" else "↖ better"
    chart.add_axes(
        [(tick, write_harm(tick)) for tick in x.ticks(5)],
        [(tick, percent(tick).replace(".0", "") if share else plain(tick)) for tick in y.ticks(5)],
        "increase of perplexity" if perplexity else "KL divergence to the original, nats a token",
        tag("text", inline_title(metric), x=LEFT - 44, y=14.0, class_="tick"),
        tag("text", better, x=LEFT - 44, y=BOTTOM + 37, class_="tick better"),
        vertical_grid=True,
    )
    if budget is not None:
        x_budget = x(budget)
        over_budget = tag(
            "rect", x=x_budget, y=TOP, width=max(RIGHT - x_budget, 0.0), height=BOTTOM - TOP, class_="over"
        )
        name = tag("text", "budget", x=x_budget, y=TOP - 10, class_="middle tick budget-name")
        chart.add(
            tag(
                "g",
                over_budget,
                line(x_budget, x_budget, TOP - 6, BOTTOM, "budget"),
                name,
                aria_hidden="true",
            )
        )
    for colour in dict.fromkeys(spot.colour for spot in spots) if joined else ():
        chart.add_line([spot.place for spot in spots if spot.colour == colour], colour, thin=True)
    if len(front) > 1:
        # From one point of the front to the next, the best effect for so much damage is still the first's.
        steps = [(b[0], a[1]) for a, b in zip(front, front[1:], strict=False)]
        corners = [corner for pair in zip(front, steps, strict=False) for corner in pair]
        path = polyline([(x(a), y(b)) for a, b in [*corners, front[-1]]])
        chart.add(tag("path", d=path, class_="front"))
    _add_spots(chart, spots)
    markers = []
    if original:
        a, b = x(original[0]), y(original[1])
        markers.append(tag("path", d=f"M{a - 5:.1f} {b:.1f}h10M{a:.1f} {b - 5:.1f}v10", class_="origin"))
    if chosen:
        markers.append(tag("circle", cx=x(chosen[0]), cy=y(chosen[1]), r=8.5, class_="chosen"))
    chart.add(tag("g", *markers, aria_hidden="true"))
    return chart.draw(heading, note, f"{heading}; arrow keys step through the points", "curve cloud")


def _add_spots(chart: Chart, spots: list[Spot]) -> None:
    """Add each spot with its intervals, its mark, and a larger area to point at."""
    for spot in spots:
        x, y = chart.x(spot.place[0]), chart.y(spot.place[1])
        x_interval, y_interval = spot.intervals
        bars = [line(chart.x(x_interval[0]), chart.x(x_interval[1]), y, y, "whisker")] if x_interval else []
        bars += [line(x, x, chart.y(y_interval[0]), chart.y(y_interval[1]), "whisker")] if y_interval else []
        target = tag("circle", cx=x, cy=y, r=9.0, class_="hit")
        kind = f"spot series {spot.colour}{' faint-spot' if spot.faint else ''}"
        chart.add_target(spot.key, spot.tip, *bars, target, mark(spot.colour, x, y, 4.2), class_=kind)


def _scale_damage(damage: str, spots: list[Spot], budget: float | None) -> Scale:
    """A scale from no damage to the most; logarithmic beyond the budget if some spots are far beyond it."""
    places = [spot.place[0] for spot in spots] + [budget or 0.0, 0.0]
    low, high = min(places), max(*places, 0.002 if damage == "perplexity" else 1e-6)
    # Without a budget, "far beyond" is measured in threefold medians.
    unit = budget or 3 * sorted(map(abs, places))[len(places) // 2] or high
    room = (high - low) * 0.04
    return Scale(low - room, high + room, LEFT, RIGHT, soft=unit if high > 6 * unit else 0.0)
