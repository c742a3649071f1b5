"""What circuits have in common, and which units were kept out of every one of them."""

from dataclasses import dataclass

from .discovery import sparsest
from .folder import RunFolder
from .numbers import percent, plain
from .unit_map import place
from .variants import colours, named, parsed


@dataclass(frozen=True)
class Sharing:
    """Another method's circuit of the same size: how many units it shares with this one, and how many would by chance."""

    name: str
    colour: str
    both: str
    share: float
    expected: str


def sharing(run: RunFolder) -> list[Sharing]:
    """The methods whose circuits share most first. Of a run that looked for a task, the circuits of the size it settled on."""
    count = _count(run)
    rows = []
    for one in run.provenance.get("overlaps") or []:
        name = parsed(str(one.get("variant")))
        if name is None or name[1] != count or not one.get("size"):
            continue
        both, expected = float(one["both"]), one.get("expected")
        share = both / float(one["size"])
        chance = f"{expected:,.0f}" if expected is not None else ""
        rows.append(Sharing(named(name[0]), colours(run).get(name[0], "mr"), f"{both:,.0f} ({percent(share)})", 100 * share, chance))
    return sorted(rows, key=lambda row: -row.share)


def _count(run: RunFolder) -> int:
    """How many units the circuit that is compared removes; 0 without one."""
    if run.job != "discover":
        return len(run.circuit) if run.circuit else 0
    best = sparsest(run, run.method or "")
    return best.count if best else 0


def protected(run: RunFolder) -> list[tuple[str, str]] | None:
    """(unit, what its removal alone multiplies perplexity by) of those kept out of every selection; None where nothing was looked for."""
    found = run.provenance.get("protected")
    if found is None:
        return None
    return [(f"{place(str(one['module']))}, {run.unit} {int(one['index']):,}", _times(one["perplexity_ratio"])) for one in found]


def _times(ratio: float | None) -> str:
    return "beyond all numbers" if ratio is None else plain(float(ratio))
