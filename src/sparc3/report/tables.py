"""Variants by name: "original", "ablated", and "<method>@<count>", and the class each method is drawn in."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..results import Measurement
from .read import RunFolder
from .variant_names import parse_variant, variant_title
from .words import (
    change,
    change_interval,
    explained,
    format_p,
    interval_of,
    is_share,
    plain,
    relative,
    title,
    value_of,
)

# All figures and all differences as tables, and what is needed to make them again.


@dataclass(frozen=True)
class Column:
    """One metric on one split."""

    title: str
    name: str
    split: str
    explained: str
    note: str


@dataclass(frozen=True)
class Cell:
    """One figure: value, interval, and, where its column does not say it, how many units it rests on."""

    value: str
    interval: str
    n: str


@dataclass(frozen=True)
class Row:
    """One variant; `group` changes where a new method begins."""

    name: str
    variant: str
    group: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Change:
    """One difference; `own` where it is that of this run's circuit."""

    title: str
    of: str
    change: str
    relative: str
    interval: str
    p: str
    verdict: str
    own: bool


def columns(run: RunFolder) -> list[Column]:
    found: dict[tuple[str, str], list[Measurement]] = {}
    for m in run.results:
        found.setdefault((m.metric, m.split), []).append(m)
    order = run.metrics()
    found = dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))
    several = len({split for _, split in found}) > 1
    return [
        Column(title(name), name, split, explained(name), _describe_column(rows, several))
        for (name, split), rows in found.items()
    ]


def _describe_column(shown_in: list[Measurement], several_splits: bool) -> str:
    """What holds for a whole column: its split, which way is better, how many units each figure rests on."""
    m = shown_in[0]
    split = [m.split] if several_splits else []
    better = [f"{m.direction} is better"] if not m.metric.startswith(("ioi.", "sparsity")) else []
    same = [f"n = {m.n:,}"] if len({one.n for one in shown_in}) == 1 else []
    return ", ".join(split + better + same)


def rows(run: RunFolder) -> list[Row]:
    """A row a variant: the original, the circuit, then each method by count."""
    found: dict[str, dict[tuple[str, str], Measurement]] = {}
    for m in run.results:
        found.setdefault(m.variant, {})[m.metric, m.split] = m
    ordered = sorted(found, key=lambda variant: _sort_key(variant, list(found), run.method))
    keys = [(column.name, column.split) for column in columns(run)]
    mixed = {key for key in keys if len({found[name][key].n for name in found if key in found[name]}) > 1}
    return [
        Row(
            variant_title(name, run),
            name,
            _group_name(name),
            [_make_cell(found[name].get(key), key in mixed) for key in keys],
        )
        for name in ordered
    ]


def _sort_key(variant: str, all_of_them: list[str], own: str | None) -> tuple[int, bool, int, int]:
    name = parse_variant(variant)
    if name is None:
        return {"original": 0, "ablated": 1}.get(variant, 2), False, 0, all_of_them.index(variant)
    siblings = [
        i
        for i, other in enumerate(all_of_them)
        if (_parsed := parse_variant(other)) and _parsed[0] == name[0]
    ]
    return 3 + (name[0] != own) + (name[0] == "random"), False, siblings[0], name[1]


def _group_name(variant: str) -> str:
    name = parse_variant(variant)
    return name[0] if name else variant


def _make_cell(m: Measurement | None, with_n: bool) -> Cell | None:
    if m is None:
        return None
    counts = ([f"n = {m.n:,}"] if with_n else []) + ([f"{m.failures:,} failed"] if m.failures else [])
    return Cell(value_of(m), interval_of(m), ", ".join(counts))


def changes(run: RunFolder) -> list[Change]:
    return [
        Change(
            title(d.metric),
            f"{variant_title(d.from_, run)} → {variant_title(d.to, run)}",
            change(d),
            relative(d.relative) if not is_share(d.metric) or d.relative is not None else "",
            change_interval(d),
            format_p(d.p),
            {None: "", True: "includes zero", False: "excludes zero"}[d.holds_zero],
            d.to == "ablated",
        )
        for d in run.results.differences
    ]


def stages(run: RunFolder) -> list[tuple[str, float, float]]:
    """(name, seconds, width of its bar in percent)."""
    found = [
        (str(s.get("name", "")), float(s.get("seconds") or 0.0)) for s in run.provenance.get("stages") or []
    ]
    longest = max((seconds for _, seconds in found), default=0.0) or 1.0
    return [(name, seconds, seconds / longest * 100) for name, seconds in found]


def checks(run: RunFolder) -> list[tuple[str, str, bool | None]]:
    """(name, value, passed) of each check; None is a check that passes no judgement."""
    return [
        (str(c.get("name", "")), _write_value(c.get("value")), c.get("ok"))
        for c in run.provenance.get("checks") or []
    ]


def warnings(run: RunFolder) -> list[str]:
    """The run's own warnings, and what does not fit together in its folder."""
    found = [str(text) for text in run.provenance.get("warnings") or []]
    named = run.provenance.get("circuit")
    if run.circuit is not None and isinstance(named, str) and named != run.circuit.fingerprint:
        found.append(
            f"circuit{run.circuit.suffix} ({run.circuit.fingerprint}) is not the circuit that results.json "
            f"measured ({named})"
        )
    return found


def fingerprints(run: RunFolder) -> dict[str, str]:
    """Everything that names what this run was made of, circuit first."""
    circuit = run.circuit.fingerprint if run.circuit else run.provenance.get("circuit")
    found: dict[str, Any] = {"model": run.model.get("fingerprint"), "circuit": circuit}
    if run.scores is not None:
        found["contrast scores"] = run.scores.fingerprint
        found |= {
            f"{name} scores": value for name, value in (run.scores.provenance.get("sources") or {}).items()
        }
    tested = run.provenance.get("samples") or {}
    found |= (
        {f"{name} test samples": value for name, value in tested.items()} if isinstance(tested, dict) else {}
    )
    return {name: str(value) for name, value in found.items() if value}


def seeds(run: RunFolder) -> dict[str, str]:
    """What made the evaluation's dice fall as they did: metric → its seed, and how it wrote."""
    found = {}
    keys = ("seed", "generations", "temperature", "max_new_tokens", "scorer", "also")
    for name, settings in dict(run.provenance.get("metrics") or {}).items():
        told = [(key, settings.get(key)) for key in keys if isinstance(settings, dict)]
        parts = [f"{key.replace('_', ' ')} {_write_value(value)}" for key, value in told if value is not None]
        if parts:
            found[str(name)] = ", ".join(parts)
    return found


def environment(run: RunFolder) -> dict[str, str]:
    return dict(_flatten(run.environment))


def _flatten(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _write_value(value)


def _write_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return plain(value)
    return str(value) if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)
