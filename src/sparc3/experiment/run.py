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
from ..storage import read_text, write_json, write_text
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
"""Outcome of a check → its word in the log; a note is left for the reader to judge."""


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
        resume: continue a run in `out`, finished or not. Files that fit the recipe are reused, whatever
            recipe made them; the rest is made again, and results of an earlier recipe are moved into
            `earlier/`. False refuses such a folder.
        track: "wandb", "trackio", "tensorboard", or an object with the methods of `Tracker`. It gets the
            stages, measurements and report; if it fails, a warning says so and the run goes on.

    Raises:
        UserError: an unknown tracker; a recipe that does not fit the model or samples; other files or an
            active run in `out`; prompts that are both in a reference and an evaluation set.
    """
    loaded_recipe = load_recipe(recipe)
    require_tracker(track)
    if loaded_recipe.job == "discover":
        discover.require_task(loaded_recipe)
    require_loadable(
        loaded_recipe.model.id, dtype=loaded_recipe.model.dtype, device=loaded_recipe.model.device
    )
    check_metrics(loaded_recipe.metrics())
    folder = Path(out)
    distributed.start()  # under torchrun, join the other ranks; otherwise nothing
    with claim_folder(folder, loaded_recipe, resume), log_to_folder(folder):
        tracked = TrackedRun(track, loaded_recipe, folder)
        try:
            results = _run_stages(loaded_recipe, folder, Stages(tracked), progress)
        except BaseException:
            tracked.notify("close", False)
            raise
        tracked.notify("close", True)
        return results


def _run_stages(recipe: Recipe, folder: Path, stages: "Stages", progress: bool) -> Results:
    start = time.perf_counter()
    with stages.stage("model"):
        work = _load_context(recipe, folder, progress)
        recipe = work.recipe
    sites = sites_of(work.model, recipe.attribution.sites)
    check_sizes(recipe, sites)
    check_lengths(recipe, context_length(work.model))
    with stages.stage("samples"):
        gather_all(work)
    metrics = [(f"evaluation.{p.metric.name}", p.settings, p.samples) for p in work.prepared]
    validation = [*work.budget, *work.aim]
    metrics += [(f"validation of evaluation.{p.metric.name}", p.settings, p.samples) for p in validation]
    limits = Limits(work.tokenizer, context_length(work.model), vocabulary_size(work.model))
    check_samples(recipe, work.references, metrics, limits)
    # Up to here, a recipe that does not fit has been refused without a change to an earlier run's files.
    accept_recipe(work)
    if distributed.is_main():
        write_json(folder / "environment.json", describe_environment(work.model))
    has_completions = {
        name: all(sample.completion is not None for sample in samples)
        for name, samples in work.references.items()
    }
    log.info("work: %s", list_work(recipe, sites, has_completions.__getitem__).summary)
    score, evaluate = JOBS[recipe.job]
    with stages.stage("scores"):
        selected = score(work)
    with stages.stage("evaluation"):
        results = evaluate(work, selected, stages.seconds)
    if distributed.is_main():
        results.save(folder / "results.json")
        stages.tracked.notify("measurements", list(results))
        page = write_report(folder)
        log.info("report: %s", page)
        stages.tracked.notify("report", page)
        tidy(work)
        for check in results.provenance.get("checks") or ():
            log.info("%s  %s: %s", SIGNS[check["ok"]], check["name"], check["value"])
        if verdict := results.provenance.get("verdict"):
            log.info("verdict: %s", verdict["said"])
    distributed.wait()
    log.info("done in %.0f s", time.perf_counter() - start)
    return results


def _find_circuits(work: RunContext) -> list[Found]:
    """One a seed where seeds are kept apart, otherwise one."""
    protect_units(work)
    if work.recipe.tune:
        return [search_circuit(work)]
    seeds = range(count_seeds(work.correct))
    return [(scoring_of_recipe(work, seed), find_circuit(work, seed)) for seed in seeds]


def _measure_circuits(work: RunContext, circuits: list[Found], seconds: Mapping[str, float]) -> Results:
    """The results; cards and token maps are those of the first circuit."""
    results = measure_variants(work, circuits, seconds)
    spec, circuit = circuits[0]
    write_cards(work, circuit)
    write_token_maps(work, spec)
    return results


JOBS: dict[str, tuple[Callable[[RunContext], Any], Callable[[RunContext, Any, Mapping[str, float]], Results]]]
JOBS = {
    "correct": (_find_circuits, _measure_circuits),
    "discover": (discover.rank_units, discover.measure_circuits),
    "compress": (compress.prune_by_all_methods, compress.measure_pruned),
}
"""Job → the functions of its stages "scores" and "evaluation". The second gets the first's return value, and
the seconds of each stage so far."""


class Stages:
    """Times each stage, and notifies the tracker."""

    def __init__(self, tracked: TrackedRun) -> None:
        self.tracked = tracked
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.tracked.notify("stage", name, self.seconds[name])


def _load_context(recipe: Recipe, folder: Path, progress: bool) -> RunContext:
    model, tokenizer = load_model(recipe.model.id, dtype=recipe.model.dtype, device=recipe.model.device)
    model_info = describe(model)
    parameters = sum(value.numel() for _, value in named_values(model))
    log.info(
        "model %s: %s, fingerprint %s, %s on %s",
        model_info["id"],
        f"{parameters:,} parameters",
        model_info["fingerprint"],
        str(model.dtype).removeprefix("torch."),
        device_of(model),
    )
    if isinstance(words := recipe.attribution.words, WordsBy):
        options = recipe.attribution.copy_with(words=find_words(tokenizer, words))
        found = recipe.model_copy(update={"attribution": options})
        # A new folder has the recipe as it was given, which is not another one.
        if distributed.is_main() and read_text(folder / "recipe.yaml") == recipe.to_yaml():
            write_text(folder / "recipe.yaml", found.to_yaml())
        recipe = found
    return RunContext(recipe, folder, progress, model, tokenizer, model_info, pending_samples=[])


def describe_environment(model: "PreTrainedModel") -> dict[str, Any]:
    """Versions and hardware of the run; nothing that names the user or the machine."""
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
