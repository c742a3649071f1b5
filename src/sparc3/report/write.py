"""Write the page: fill page.html with the content of every section, and include style, script and data."""

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
from .cards import cards, draw_unit_map, list_protected, list_shared
from .charts import Tip
from .curves import curves, draw_samples
from .examples import Mask, finalize, heat_maps, kinds
from .read import RunFolder, read_folder
from .tradeoff import tradeoffs

SAYING = {"discover": discovery, "compress": compression}
"""Job → the file with its headline and remarks; any other job has those of headline.py."""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write report.html into a run folder and return its path.

    The page contains everything it shows, makes no network requests, and leaves out sections for which the
    run has no data.

    Raises:
        UserError: the folder contains no results.json.
        DamagedFile: a file of the run does not follow its format.
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
        "explained": words.explain,
        "figure": words.value_of,
        "interval": words.interval_of,
        "method_title": words.method_title,
        "metric_title": words.title,
        "p": words.format_p,
        "relative": words.relative,
        "variant_title": partial(words.variant_title, run=run),
        "with_interval": words.format_with_interval,
        "write": tables.write_value,
    }
    page = environment.get_template("page.html").render(_collect_content(run))
    # A model's text may contain half of a surrogate pair, which no UTF-8 file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


def _collect_content(run: RunFolder) -> dict[str, Any]:
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    words_of_job = SAYING.get(run.provenance.job, headline)
    mask = Mask(tuple(run.provenance.lexicon))
    recipe = run.recipe and mask.write(run.recipe, mask.spans(run.recipe)).replace("↵\n", "\n")
    pairs, unit_cards, token_maps = kinds(run, mask), cards(run, mask), heat_maps(run, mask)
    # The map shows the removed units, or, in a discovery, those that its sparsest circuit keeps.
    kept_circuit = discovery.load_sparsest_circuit(run) if run.provenance.job == "discover" else None
    map = draw_unit_map(replace(run, circuit=kept_circuit), "kept") if kept_circuit else draw_unit_map(run)
    tradeoff_figures, curve_figures = tradeoffs(run), curves(run)
    tips = {key: tip for figure in [*tradeoff_figures, *curve_figures] for key, tip in figure.tips.items()}
    tips |= map.tips if map else {}
    return {
        "run": run,
        "name": run.provenance.recipe or "a run",
        "model": str(run.model["id"]),
        "architecture": str(run.model["architecture"]),
        "method": words.method_title(run.method),
        "version": run.provenance.version or __version__,
        "style": Markup(style),
        "script": Markup(script),
        # A content security policy: no requests, and no style or script besides the page's own two.
        "policy": f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "headline": words_of_job.headline(run),
        "damage": headline.damage(run) if words_of_job is headline else None,
        "remarks": words_of_job.remarks(run),
        "changes": tables.changes(run),
        "null": tables.describe_null(run),
        "power": tables.power_words(run),
        "scorers": tables.compare_scorers(run),
        "agreement": tables.describe_agreement(run),
        "tradeoffs": tradeoff_figures,
        "standing": headline.standing_remarks(run, run.behaviour)
        if tradeoff_figures and run.behaviour
        else [],
        "curves": curve_figures,
        "by_samples": draw_samples(run),
        "comparisons": tables.comparisons(run),
        "budgeted": tables.compare_under_budget(run),
        "count": run.write_count(run.count) if run.circuit else "",
        "at_strength": run.circuit.at_strength if run.circuit else "",
        "map": map,
        "sharing": list_shared(run),
        "protected": list_protected(run),
        "kinds": pairs,
        "cards": unit_cards,
        "heat_maps": token_maps,
        "listed": words.word_list(run),
        # Whether any word is masked; only then does the page have the checkbox that reveals them.
        "masked": 'class="veil' in f"{pairs}{unit_cards}{recipe}{token_maps}",
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
    """A tip as data for the script, with every text made visible."""
    rows = [{"key": key, "name": visible(name), "text": visible(text)} for name, text, key in tip.rows]
    return {"head": visible(tip.head), "rows": rows}


def _hash_source(source: str) -> str:
    """The source expression with which the page's content security policy allows only this style or
    script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
