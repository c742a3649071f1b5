"""The page: every section's content put into page.html, with style, script and data inside it."""

import base64
import hashlib
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..safe_text import visible
from ..storage import write_text
from . import compression, discovery, evidence, headline, tables
from .cards import cards, protected, sharing
from .comparison import comparisons, tiles, under_budget
from .compression import by_samples
from .curves import curves
from .examples import Mask, finalize, kinds
from .read import RunFolder, read_folder
from .standing import standing_remarks
from .tradeoff import tradeoffs
from .unit_map import UnitMap, unit_map
from .variant_names import count_units, list_methods, method_colours, method_title
from .words import duration

SAYING = {"discover": discovery, "compress": compression}
"""Job → the file with its headline and remarks; any other job has those of headline.py."""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write report.html into a run folder and return its path.

    The page holds everything it shows, asks the network for nothing, and leaves out what the run did not
    leave behind.

    Raises:
        UserError: the folder holds no results.json.
        DamagedFile: a file of the run is not what it says.
    """
    path = Path(folder) / "report.html"
    write_text(path, render(read_folder(folder)))
    return path


def render(run: RunFolder) -> str:
    """The page as text."""
    loader = PackageLoader("sparc3.report", "")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return (
        environment.get_template("page.html")
        .render(_collect_content(run))
        .encode("utf-8", "replace")
        .decode("utf-8")
    )


def _collect_content(run: RunFolder) -> dict[str, Any]:
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    said = SAYING.get(run.job, headline)
    mask = Mask(tuple(map(str, run.provenance.get("lexicon") or ())))
    recipe = run.recipe and mask.write(run.recipe, mask.spans(run.recipe)).replace("↵\n", "\n")
    pairs, known = kinds(run, mask), cards(run, mask)
    traded, drawn, compared, where = tradeoffs(run), curves(run), comparisons(run), _map_units(run)
    tips = {key: tip for figure in [*traded, *drawn] for key, tip in figure.tips.items()} | (
        where.tips if where else {}
    )
    return {
        **_describe_origin(run),
        "style": Markup(style),
        "script": Markup(script),
        "policy": _write_policy(style, script),
        "headline": said.headline(run),
        "damage": headline.damage(run) if said is headline else None,
        "remarks": said.remarks(run),
        "tiles": tiles(run),
        "behaviour": run.behaviour,
        "proofs": evidence.proofs(run),
        "null": evidence.describe_null(run),
        "power": evidence.power_words(run),
        "scorers": evidence.scorers(run),
        "tradeoffs": traded,
        "standing": standing_remarks(run, run.behaviour) if traded and run.behaviour else [],
        "curves": drawn,
        "by_samples": by_samples(run),
        "legend": [(method_title(method), method_colours(run)[method]) for method in list_methods(run)],
        "comparisons": compared,
        "budgeted": under_budget(run),
        "count": f"{len(run.circuit):,} {count_units(len(run.circuit), run)}" if run.circuit else "",
        "at_strength": run.circuit.at_strength if run.circuit else "",
        "map": where,
        "sharing": sharing(run),
        "protected": protected(run),
        "kinds": pairs,
        "cards": known,
        "masked": 'class="veil' in f"{pairs}{known}{recipe}",
        "all_cards": len(run.cards),
        "columns": tables.columns(run),
        "rows": tables.rows(run),
        "changes": tables.changes(run),
        "recipe": recipe,
        "tips": _make_visible(tips),
    }


def _map_units(run: RunFolder) -> UnitMap | None:
    """Where the circuit's units sit: those removed, or, of a task's circuit, those kept."""
    circuit = discovery.load_sparsest_circuit(run) if run.job == "discover" else None
    return unit_map(replace(run, circuit=circuit), "kept") if circuit else unit_map(run)


def _make_visible(tips: Any) -> Any:
    """The same with every text in it made visible."""
    if isinstance(tips, dict):
        return {key: value if key == "key" else _make_visible(value) for key, value in tips.items()}
    return [_make_visible(one) for one in tips] if isinstance(tips, list) else visible(str(tips))


def _describe_origin(run: RunFolder) -> dict[str, Any]:
    """Where the run came from, and what it says about itself."""
    return {
        "name": str(run.provenance.get("recipe") or "a run"),
        "model": str(run.model.get("id") or ""),
        "architecture": str(run.model.get("architecture") or ""),
        "method": method_title(run.method) if run.method else "",
        "unit": run.unit,
        "units": count_units(None, run),
        "version": str(run.provenance.get("version") or __version__),
        "checks": tables.checks(run),
        "warnings": tables.warnings(run),
        "stages": tables.stages(run),
        "fingerprints": tables.fingerprints(run),
        "environment": tables.environment(run),
        "seeds": tables.seeds(run),
        "samples": run.samples,
    }


def _write_policy(style: str, script: str) -> str:
    """What the browser may do with the page: use its own style and script, and nothing else."""
    own = f"style-src {_hash_source(style)}; script-src {_hash_source(script)}; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _hash_source(source: str) -> str:
    """The source expression by which the page's policy lets this one style or script in, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
