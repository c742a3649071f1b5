"""The page: every section's content put into page.html, with style, script and data inside it."""

import base64
import hashlib
import os
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..safe_text import visible
from ..storage import write_text
from . import compression, discovery, headline, tables, words
from .cards import UnitMap, cards, protected, sharing, unit_map
from .charts import Tip, curves
from .examples import Mask, finalize, kinds
from .read import RunFolder, read_folder
from .tradeoff import tradeoffs
from .words import count_units, method_title, number_of_units

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
    environment = Environment(
        loader=PackageLoader("sparc3.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "change": words.change,
        "change_interval": words.change_interval,
        "duration": words.duration,
        "explained": words.explained,
        "figure": words.value_of,
        "interval": words.interval_of,
        "metric_title": words.title,
        "p": words.format_p,
        "relative": words.relative,
        "variant_title": partial(words.variant_title, run=run),
        "with_interval": words.with_interval,
    }
    page = environment.get_template("page.html").render(_collect_content(run))
    return page.encode("utf-8", "replace").decode("utf-8")


def _collect_content(run: RunFolder) -> dict[str, Any]:
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    said = SAYING.get(run.job, headline)
    mask = Mask(tuple(run.provenance.lexicon))
    recipe = run.recipe and mask.write(run.recipe, mask.spans(run.recipe)).replace("↵\n", "\n")
    pairs, known = kinds(run, mask), cards(run, mask)
    traded, drawn, where = tradeoffs(run), curves(run), _map_units(run)
    tips = {key: tip for figure in [*traded, *drawn] for key, tip in figure.tips.items()}
    tips |= where.tips if where else {}
    return {
        **_describe_origin(run),
        "style": Markup(style),
        "script": Markup(script),
        "policy": _write_policy(style, script),
        "headline": said.headline(run),
        "damage": headline.damage(run) if said is headline else None,
        "remarks": said.remarks(run),
        "tiles": tables.tiles(run),
        "proofs": tables.proofs(run),
        "null": tables.describe_null(run),
        "power": tables.power_words(run),
        "scorers": tables.compare_scorers(run),
        "agreement": tables.describe_agreement(run),
        "tradeoffs": traded,
        "standing": headline.standing_remarks(run, run.behaviour) if traded and run.behaviour else [],
        "curves": drawn,
        "by_samples": compression.draw_samples(run),
        "legend": [(method_title(method), run.colours[method]) for method in run.methods],
        "comparisons": tables.comparisons(run),
        "budgeted": tables.compare_under_budget(run),
        "count": number_of_units(run.count, run) if run.circuit else "",
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
        "changes": run.results.differences,
        "recipe": recipe,
        "tips": {key: _make_visible(tip) for key, tip in tips.items()},
    }


def _map_units(run: RunFolder) -> UnitMap | None:
    """Where the circuit's units sit: those removed, or, of a task's circuit, those kept."""
    circuit = discovery.load_sparsest_circuit(run) if run.job == "discover" else None
    return unit_map(replace(run, circuit=circuit), "kept") if circuit else unit_map(run)


def _make_visible(tip: Tip) -> dict[str, Any]:
    """A tip as the script takes it, every text in it made visible."""
    rows = [{"key": row.key, "name": visible(row.name), "text": visible(row.text)} for row in tip.rows]
    return {"head": visible(tip.head), "rows": rows}


def _describe_origin(run: RunFolder) -> dict[str, Any]:
    """Where the run came from, and what it says about itself."""
    return {
        "name": run.provenance.recipe or "a run",
        "model": str(run.model["id"]),
        "architecture": str(run.model["architecture"]),
        "method": method_title(run.method),
        "unit": run.unit,
        "units": count_units(None, run),
        "version": run.provenance.version or __version__,
        "checks": tables.checks(run),
        "warnings": tables.warnings(run),
        "stages": tables.time_stages(run),
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
