"""The README.md of a repository on the hub: what was removed from which model, how, and with what effect."""

import html
import re
from typing import Any

from .. import __version__
from ..circuits.circuit import Circuit
from ..results import Results
from ..safe_text import one_line

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys that a card copies from the front matter of the source's card."""


def make_model_card(
    circuit: Circuit,
    results: Results | None,
    *,
    source: dict[str, str],
    base: str | None,
    matter: dict[str, Any],
    shrunk: str = "",
) -> str:
    """The card of a checkpoint.

    Args:
        source: the source model, from `describe`.
        base: its hub id; None for a local folder, whose name means nothing to others.
        matter: front matter of the source's own card.
        shrunk: a sentence on how the shapes changed; empty if they did not.
    """
    units = f"{len(circuit):,} {circuit.unit}s"
    share = f"{circuit.strength * 100:g} % of each of {units} taken away"
    if circuit.strengths:
        share = f"what each of {units} writes multiplied by 1 less its strength"
    action = f"{units} set to zero" if circuit.zeroes else share
    lines = [
        *_make_front_matter(base, matter, ["sparc3", "pruned"]),
        f"# {_plain_text(source['id'])}, without {units}{circuit.at_strength}",
        "",
        f"{_link_model(source['id'], base)} (weights fingerprint {source['fingerprint']}) with {action}, "
        f"chosen by sparc3 {__version__}. Nothing was trained, no other weight changed. {shrunk}".rstrip(),
        "",
        *_describe_selection(circuit),
        "## What was removed",
        "",
        *_list_members(circuit),
        "## What it measured",
        "",
        *_list_results(results),
    ]
    return "\n".join(lines) + "\n"


def make_circuit_card(
    circuit: Circuit, repo: str, *, base: str | None, results: Results | None = None
) -> str:
    """The card of a repository that contains only a circuit."""
    name = _plain_text(circuit.model.get("id"))
    lines = [
        *_make_front_matter(base, {}, ["sparc3", "circuit"], library=False),
        f"# {len(circuit):,} {circuit.unit}s of {name}{circuit.at_strength}",
        "",
        f"A set of {circuit.unit}s of {_link_model(name, base)} (weights fingerprint "
        f"{_plain_text(circuit.model.get('fingerprint'))}), found by sparc3 "
        f"{circuit.provenance.get('version', __version__)}. To take them out of that model and of no other, "
        "which the fingerprint sees to:",
        "",
        "```",
        f"sparc3 ablate {base or 'MODEL'} --circuit {repo} --out DIR",
        "```",
        "",
        *_describe_selection(circuit),
        "## Members",
        "",
        *_list_members(circuit),
        *(["## What it measured", "", *_list_results(results)] if results else []),
    ]
    return "\n".join(lines) + "\n"


def _make_front_matter(
    base: str | None, matter: dict[str, Any], tags: list[str], library: bool = True
) -> list[str]:
    import yaml

    content = {"base_model": base} if base else {}
    content |= {"library_name": "transformers"} if library else {}
    content |= {key: matter[key] for key in KEPT if key in matter} | {"tags": tags}
    return ["---", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _link_model(name: str, base: str | None) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else _plain_text(name)


def _plain_text(value: object) -> str:
    """A value as text for a card, with Markdown, HTML and control characters escaped."""
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", html.escape(one_line(str(value)), quote=False))


def _describe_selection(circuit: Circuit) -> list[str]:
    """How the circuit was found, as a table."""
    selection = circuit.provenance.get("selection") or {}
    scores = {key: _plain_text(value) for key, value in (circuit.provenance.get("scores") or {}).items()}
    settings = [f"{_plain_text(k)} {_plain_text(v)}" for k, v in selection.items() if v is not None]
    return [
        "| | |",
        "|---|---|",
        f"| method | {scores.get('method', 'not recorded')}, target {scores.get('target', '-')}, neuron "
        f"{scores.get('neuron', '-')} |",
        f"| contrast | {scores.get('contrast', '-')} |",
        f"| selection | {', '.join(settings) or '-'} |",
        f"| circuit | `circuit{circuit.suffix}`, fingerprint {circuit.fingerprint}{circuit.at_strength} |",
        "",
    ]


def _list_members(circuit: Circuit) -> list[str]:
    """A table of each site's members by index, with their strengths if each has its own; for weights, their
    number."""
    rows = [f"| module | {circuit.unit}s{' (strength)' if circuit.strengths else ''} |", "|---|---|"]
    for site, count in circuit.counts.items():
        units = circuit.members[site]
        if circuit.unit == "weight":
            members = f"{count:,} of {units.numel():,} ({count / units.numel():.1%})"
        else:
            with_strengths = map("{} ({:.3g})".format, units, circuit.strengths.get(site, ()))
            members = ", ".join(with_strengths if circuit.strengths else map(str, units))
        if count:
            rows.append(f"| `{_plain_text(site)}` | {members} |")
    return [*rows, ""]


def _list_results(results: Results | None) -> list[str]:
    """A table with a row per metric: before, after, and the change with its interval and p."""
    if results is None:
        return ["Nothing was measured on this checkpoint; `sparc3 evaluate` does that."]
    rows = [
        "| metric | original | ablated | change | 95 % interval of the change | p | n |",
        "|---|---|---|---|---|---|---|",
    ]
    before, after = ({m.metric: m for m in results if m.variant == v} for v in ("original", "ablated"))
    change = {d.metric: d for d in results.differences if (d.from_, d.to) == ("original", "ablated")}
    for metric in {**before, **after}:
        first, second, d = before.get(metric), after.get(metric), change.get(metric)
        figures = [_number(m.value if m else None) for m in (first, second)]
        interval = f"{d.ci95[0]:+.4g} to {d.ci95[1]:+.4g}" if d and d.ci95 else "-"
        relative = f"{d.relative:+.1%}" if d and d.relative is not None else "-"
        n = (second or first).n  # type: ignore[union-attr]
        rows.append(
            f"| {_plain_text(metric)} | {' | '.join(figures)} | {relative} | {interval} | "
            f"{_number(d.p if d else None)} | {n} |"
        )
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
