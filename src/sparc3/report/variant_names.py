"""Variants by name: "original", "ablated" and "<method>@<count>", and the colour of each method."""

from dataclasses import dataclass

from ..results import Measurement
from .read import RunFolder

NAMES = {
    "lrp": "LRP",
    "cp-lrp": "CP-LRP",
    "gradient": "gradient",
    "wanda": "Wanda",
    "activation": "activation",
    "magnitude": "magnitude",
    "aura": "AurA",
    "det0": "Det-0",
    "random": "random",
}
"""The bundled methods as their papers write them."""


@dataclass(frozen=True)
class Point:
    """One method at one number of units."""

    method: str
    count: int
    measurement: Measurement

    @property
    def variant(self) -> str:
        return self.measurement.variant


def parse_variant(variant: str) -> tuple[str, int] | None:
    """("wanda", 40) of "wanda@40"; None of any other name."""
    method, at, count = variant.rpartition("@")
    return (method, int(count)) if at and method and count.isdecimal() and count.isascii() else None


def curve_points(run: RunFolder, metric: str) -> list[Point]:
    """Every method at every count that the metric was measured on, counts ascending."""
    found = [
        Point(*name, m)
        for m in run.results
        if m.metric == metric and m.value is not None and (name := parse_variant(m.variant))
    ]
    return sorted(found, key=lambda point: point.count)


def list_methods(run: RunFolder) -> list[str]:
    """All methods: the one the circuit was found with first, random last."""
    found = dict.fromkeys(name[0] for m in run.results if (name := parse_variant(m.variant)))
    return sorted(found, key=lambda method: (method != run.method, method == "random"))


def method_colours(run: RunFolder) -> dict[str, str]:
    """Method → the class it is drawn in: m0 for the circuit's own, mr for random, m1 … m6 for the rest."""
    others = [method for method in list_methods(run) if method not in (run.method, "random")]
    given = {method: f"m{index % 6 + 1}" for index, method in enumerate(others)}
    return {**({run.method: "m0"} if run.method else {}), **given, "random": "mr"}


def method_title(method: str) -> str:
    """A method as a reader meets it: "CP-LRP" of "cp-lrp", "LRP (mean abs)" of "lrp-mean_abs"; any other as
    it is."""
    if method in NAMES:
        return NAMES[method]
    known, dash, rest = next(
        ((name, "-", method[len(name) + 1 :]) for name in NAMES if method.startswith(f"{name}-")),
        (method, "", ""),
    )
    return f"{NAMES[known]} ({rest.replace('_', ' ')})" if dash and rest else method


def variant_title(variant: str, run: RunFolder) -> str:
    """A variant as a reader meets it."""
    if variant == "ablated":
        return "this circuit"
    name = parse_variant(variant)
    return (
        f"{method_title(name[0])}, {name[1]:,} {count_units(name[1], run)}" if name else method_title(variant)
    )


def count_units(count: int | None, run: RunFolder) -> str:
    """ "neuron" or "neurons", whatever was removed."""
    return run.unit if count == 1 else f"{run.unit}s"


def rival_points(run: RunFolder, metric: str) -> list[Point]:
    """Other methods at the circuit's own count; empty without a circuit."""
    if run.circuit is None:
        return []
    return [
        point
        for point in curve_points(run, metric)
        if point.count == len(run.circuit) and point.method != run.method
    ]


def find_null(run: RunFolder, metric: str) -> Point | None:
    """As many random units as the circuit has; None where they were not measured."""
    return next((point for point in rival_points(run, metric) if point.method == "random"), None)
