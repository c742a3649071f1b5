"""`run`: the stages in order."""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, distributed
from ..attribution.options import WordsBy
from ..evaluation.evaluate import check_metrics
from ..models.fingerprint import describe
from ..models.load import context_length, load_model, require_loadable, vocabulary_size
from ..models.offloading import device_of, named_values
from ..models.sites import sites_of
from ..recipe.schema import Recipe, load_recipe
from ..report.write import write_report
from ..results import Results
from ..storage import write_json
from . import compress, discover
from .check_recipe import Limits, check_lengths, check_samples, check_sizes
from .gather import find_words, gather_all
from .measure import measure_variants
from .neuron_cards import write_cards
from .run_folder import RunContext, accept_recipe, claim_folder, log_to_folder, tidy
from .score import Found, find_circuit, protect_units, scoring_of_recipe
from .search import search_circuit
from .seeds import count_seeds
from .token_maps import write_token_maps
from .tracking import TrackedRun, Tracker, require_tracker
from .work_list import list_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger("sparc3")
SIGNS = {True: "pass", False: "FAIL", None: "note"}
"""How a criterion came out; a note is for the reader to judge."""


def run(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe",
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    track: "str | Tracker | None" = None,
    progress: bool = False,
) -> Results:
    """Run a recipe into the folder `out`, and write its results and its report.

    Args:
        recipe: a bundled recipe's name, a YAML path, its content, or a Recipe.
        resume: go on with a run that `out` holds, finished or not. What fits the recipe is used again,
            whatever recipe made it; the rest is made anew, and results of an earlier recipe are moved into
            `earlier/`. False refuses such a folder.
        track: "wandb", "trackio", "tensorboard", or an object with the methods of `Tracker`. It is told
            stages, measurements and the report; one that fails is left out with a warning.

    Raises:
        UserError: an unknown tracker; a recipe that does not fit, `out` holding other files, or a run that is
            going on; prompts that are in a reference and an evaluation set.
    """
    loaded = load_recipe(recipe)
    require_tracker(track)
    if loaded.job == "discover":
        discover.require_task(loaded)
    require_loadable(loaded.model.id, dtype=loaded.model.dtype, device=loaded.model.device)
    check_metrics(loaded.metrics())
    folder = Path(out)
    distributed.start()
    with claim_folder(folder, loaded, resume), log_to_folder(folder):
        tracked = TrackedRun(track, loaded, folder)
        try:
            results = _run_stages(loaded, folder, Stages(tracked), progress)
        except BaseException:
            tracked.tell("close", False)
            raise
        tracked.tell("close", True)
        return results


def _run_stages(recipe: Recipe, folder: Path, stages: "Stages", progress: bool) -> Results:
    began = time.perf_counter()
    with stages.stage("model"):
        work = _load_context(recipe, folder, progress)
        recipe = work.recipe
    sites = sites_of(work.model, recipe.attribution.sites)
    check_sizes(recipe, sites)
    check_lengths(recipe, context_length(work.model))
    with stages.stage("samples"):
        gather_all(work)
    metrics = [(f"evaluation.{p.metric.name}", p.settings, p.samples) for p in work.prepared]
    searched = [*work.budget, *work.aim]
    metrics += [(f"validation of evaluation.{p.metric.name}", p.settings, p.samples) for p in searched]
    limits = Limits(work.tokenizer, context_length(work.model), vocabulary_size(work.model))
    check_samples(recipe, work.references, metrics, limits)
    accept_recipe(work)
    if distributed.is_main():
        write_json(folder / "environment.json", describe_environment(work.model))
    completed = {
        name: all(sample.completion is not None for sample in samples)
        for name, samples in work.references.items()
    }
    log.info("work: %s", list_work(recipe, sites, completed.__getitem__).summary)
    score, evaluate = JOBS[recipe.job]
    with stages.stage("scores"):
        found = score(work)
    with stages.stage("evaluation"):
        results = evaluate(work, found, stages.seconds)
    if distributed.is_main():
        results.save(folder / "results.json")
        stages.tracked.tell("measurements", list(results))
        page = write_report(folder)
        log.info("report: %s", page)
        stages.tracked.tell("report", page)
        tidy(work)
        for check in results.provenance.get("checks") or ():
            log.info("%s  %s: %s", SIGNS[check["ok"]], check["name"], check["value"])
        if verdict := results.provenance.get("verdict"):
            log.info("verdict: %s", verdict["said"])
    distributed.wait()
    log.info("done in %.0f s", time.perf_counter() - began)
    return results


def _find_circuits(work: RunContext) -> list[Found]:
    """One a seed where seeds are kept apart, otherwise one."""
    protect_units(work)
    if work.recipe.tune:
        return [search_circuit(work)]
    seeds = range(count_seeds(work.correct))
    return [(scoring_of_recipe(work, seed), find_circuit(work, seed)) for seed in seeds]


def _measure_circuits(work: RunContext, found: list[Found], seconds: Mapping[str, float]) -> Results:
    """The cards and the tokens' relevance are of the first one."""
    results = measure_variants(work, found, seconds)
    how, circuit = found[0]
    write_cards(work, circuit)
    write_token_maps(work, how)
    return results


JOBS: dict[str, tuple[Callable[[RunContext], Any], Callable[[RunContext, Any, Mapping[str, float]], Results]]]
JOBS = {
    "correct": (_find_circuits, _measure_circuits),
    "discover": (discover.rank_units, discover.measure_circuits),
    "compress": (compress.prune_by_all_methods, compress.measure_pruned),
}
"""Job → what its stages "scores" and "evaluation" do; the second gets what the first gives, and the seconds
that each stage took."""


class Stages:
    """Notes how long each stage took, and tells the tracker."""

    def __init__(self, tracked: TrackedRun) -> None:
        self.tracked = tracked
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
        self.tracked.tell("stage", name, self.seconds[name])


def _load_context(recipe: Recipe, folder: Path, progress: bool) -> RunContext:
    model, tokenizer = load_model(recipe.model.id, dtype=recipe.model.dtype, device=recipe.model.device)
    described = describe(model)
    parameters = sum(value.numel() for _, value in named_values(model))
    log.info(
        "model %s: %s, fingerprint %s, %s on %s",
        described["id"],
        f"{parameters:,} parameters",
        described["fingerprint"],
        str(model.dtype).removeprefix("torch."),
        device_of(model),
    )
    if isinstance(asked := recipe.attribution.words, WordsBy):
        options = recipe.attribution.but(words=find_words(tokenizer, asked))
        recipe = recipe.model_copy(update={"attribution": options})
    return RunContext(recipe, folder, progress, model, tokenizer, described, waiting=[])


def describe_environment(model: "PreTrainedModel") -> dict[str, Any]:
    """What the run ran on: versions and hardware, nothing that names the user or the machine."""
    import torch
    import transformers

    device = device_of(model)
    return {
        "format": "sparc3.environment/1",
        "sparc3": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world(),
    }
