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
from .cards import cards, protected, sharing, unit_map
from .charts import Tip
from .curves import curves, draw_samples
from .examples import Mask, finalize, heat_maps, kinds
from .read import RunFolder, read_folder
from .tradeoff import tradeoffs

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
        "method_title": words.method_title,
        "metric_title": words.title,
        "p": words.format_p,
        "relative": words.relative,
        "variant_title": partial(words.variant_title, run=run),
        "with_interval": words.with_interval,
        "write": tables.write_value,
    }
    page = environment.get_template("page.html").render(_collect_content(run))
    return page.encode("utf-8", "replace").decode("utf-8")


def _collect_content(run: RunFolder) -> dict[str, Any]:
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    said = SAYING.get(run.provenance.job, headline)
    mask = Mask(tuple(run.provenance.lexicon))
    recipe = run.recipe and mask.write(run.recipe, mask.spans(run.recipe)).replace("↵\n", "\n")
    pairs, known, heated = kinds(run, mask), cards(run, mask), heat_maps(run, mask)
    # Where the circuit's units sit: those removed, or, of a task's circuit, those kept.
    kept = discovery.load_sparsest_circuit(run) if run.provenance.job == "discover" else None
    where = unit_map(replace(run, circuit=kept), "kept") if kept else unit_map(run)
    traded, drawn = tradeoffs(run), curves(run)
    tips = {key: tip for figure in [*traded, *drawn] for key, tip in figure.tips.items()}
    tips |= where.tips if where else {}
    return {
        "run": run,
        "name": run.provenance.recipe or "a run",
        "model": str(run.model["id"]),
        "architecture": str(run.model["architecture"]),
        "method": words.method_title(run.method),
        "version": run.provenance.version or __version__,
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "headline": said.headline(run),
        "damage": headline.damage(run) if said is headline else None,
        "remarks": said.remarks(run),
        "changes": tables.changes(run),
        "null": tables.describe_null(run),
        "power": tables.power_words(run),
        "scorers": tables.compare_scorers(run),
        "agreement": tables.describe_agreement(run),
        "tradeoffs": traded,
        "standing": headline.standing_remarks(run, run.behaviour) if traded and run.behaviour else [],
        "curves": drawn,
        "by_samples": draw_samples(run),
        "comparisons": tables.comparisons(run),
        "budgeted": tables.compare_under_budget(run),
        "count": run.number_of(run.count) if run.circuit else "",
        "at_strength": run.circuit.at_strength if run.circuit else "",
        "map": where,
        "sharing": sharing(run),
        "protected": protected(run),
        "kinds": pairs,
        "cards": known,
        "heat_maps": heated,
        "listed": words.word_list(run),
        "masked": 'class="veil' in f"{pairs}{known}{recipe}{heated}",
        "table": tables.make_table(run),
        "differences": run.results.differences,
        "warnings": tables.warnings(run),
        "seeds": tables.seeds(run),
        "fingerprints": tables.fingerprints(run),
        "environment": dict(tables.flatten(run.environment)),
        "recipe": recipe,
        "tips": {key: _write_tip(tip) for key, tip in tips.items()},
    }


def _write_tip(tip: Tip) -> dict[str, Any]:
    """A tip as the script takes it, every text in it made visible."""
    rows = [{"key": key, "name": visible(name), "text": visible(text)} for name, text, key in tip.rows]
    return {"head": visible(tip.head), "rows": rows}


def _hash_source(source: str) -> str:
    """The source expression by which the page's policy lets this one style or script in, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
