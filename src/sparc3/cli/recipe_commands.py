"""Commands for recipes and their results: demo, run, evaluate, report, recipes."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import distributed
from .console import FLAG, MODEL, RECIPE, REPEATED, REQUIRED, SET, Add, Arguments, quiet_transformers, say
from .stage_commands import FORCE

DEMO: Arguments = {"--out": ("run folder (default: %(default)s)", {"default": "sparc3-demo"})}
RUN: Arguments = {
    **RECIPE,
    "--out": "run folder (default: runs/<recipe's name>)",
    **SET,
    "--no-resume": ("refuse a folder that already contains a run", FLAG),
    "--track": (
        "send stages, measurements and the report to this tracker, which must be installed",
        {"choices": ("wandb", "trackio", "tensorboard")},
    ),
}
EVALUATE: Arguments = {
    **MODEL,
    "--circuit": "circuit.json, or USER/REPO on the hub: also measure the model without it",
    "--metrics": (
        "comma-separated: perplexity, kl, toxicity, fluency, repetition, ioi, sparsity, harness",
        REQUIRED,
    ),
    "--set METRIC.KEY=VALUE": ("such as perplexity.source=wiki.txt", REPEATED),
    "--out": ("where the results go (results.json)", REQUIRED),
    **FORCE,
    "--engine": (
        "engine that generates continuations for toxicity and repetition; llama.cpp needs a GGUF "
        "(default: %(default)s)",
        {"default": "transformers", "choices": ("transformers", "llama.cpp")},
    ),
}


def add_to(add: Add) -> None:
    add("demo", _demo, "the whole thing on the embedded model, offline, with a report", DEMO)
    description = "run a recipe; it resumes by itself, and after a change redoes what the change affects"
    add("run", _run, description, RUN)
    add("evaluate", _evaluate, "measure a model, and the model without a circuit", EVALUATE)
    add("report", _report, "rebuild the report of a run folder", {"run_dir RUN_DIR": "what run wrote"})
    add("recipes", _recipes, "list the recipes that come with sparc3", {})


def _demo(args: argparse.Namespace) -> None:
    from ..experiment.run import run

    quiet_transformers()
    _show(run("demo", args.out, progress=True), args.out)


def _run(args: argparse.Namespace) -> None:
    from ..recipe.schema import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    from ..experiment.run import run

    quiet_transformers()
    out = args.out or f"runs/{recipe.name}"
    _show(run(recipe, out, resume=not args.no_resume, track=args.track, progress=True), out)


def _evaluate(args: argparse.Namespace) -> None:
    from ..circuits.ablate import ablated
    from ..circuits.circuit import Circuit
    from ..evaluation.engines import llama_cpp, require_llama_cpp
    from ..evaluation.evaluate import evaluate
    from ..evaluation.metrics import parse_metrics
    from ..models.load import load_model
    from ..recipe.schema import apply_settings
    from ..storage import require_place

    metrics: dict[str, Any] = apply_settings({name: {} for name in args.metrics.split(",")}, args.set)
    parse_metrics(metrics)
    circuit = Circuit.load(args.circuit) if args.circuit else None
    require_place(args.out)
    quiet_transformers()
    distributed.start()
    with ExitStack() as stack:
        files: tuple[Path, Path] | None = None
        if args.engine == "llama.cpp":
            engine = require_llama_cpp()
            files = _files_for_llama_cpp(args.model, circuit, Path(stack.enter_context(TemporaryDirectory())))
            stack.enter_context(llama_cpp(files[0]))
        model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
        if circuit and not args.force:
            circuit.require_model(model)

        @contextmanager
        def ablate_model(circuit: Circuit) -> Iterator[None]:
            with ablated(model, circuit), llama_cpp(files[1]) if files else nullcontext():
                yield

        variants = {"ablated": lambda: ablate_model(circuit)} if circuit else None
        results = evaluate(model, tokenizer, metrics, variants=variants, progress=True)
    if not distributed.is_main():
        return
    if files:
        results = replace(results, provenance={**results.provenance, "engine": engine})
    results.save(args.out)
    for m in results:
        say(f"{m.metric:26} {m.variant:10} {'-' if m.value is None else format(m.value, '.4g'):>10}")


def _files_for_llama_cpp(model: str, circuit: Any, folder: Path) -> tuple[Path, Path]:
    """The GGUF, and a copy in the folder without the circuit (the same file if there is no circuit)."""
    from ..checkpoints.gguf_patch import locate_gguf, patch_gguf

    path = locate_gguf(model)
    if circuit is None:
        return path, path
    patch_gguf(path, circuit, folder / "ablated.gguf", force=True)  # the caller checks the model
    return path, folder / "ablated.gguf"


def _report(args: argparse.Namespace) -> None:
    from ..report.write import write_report

    say(write_report(args.run_dir))


def _recipes(args: argparse.Namespace) -> None:
    from ..recipe.schema import bundled_recipes

    def matched_first(name: str) -> tuple[str, bool]:
        """Sort a behaviour's matched contrast, which the README recommends, before its plain one."""
        return name.removesuffix("-matched"), not name.endswith("-matched")

    descriptions = bundled_recipes()
    for name in sorted(descriptions, key=matched_first):
        say(f"{name:28} {descriptions[name]}")


def _show(results: Any, out: str) -> None:
    """Print the figures of the original and the ablated model, or of all variants, and the report's path."""
    if int(os.environ.get("RANK", "0")):
        return
    if any(m.variant == "ablated" for m in results):
        _show_change(results)
    else:
        _show_variants(results)
    if verdict := results.provenance.get("verdict"):
        say(f"\nverdict: {verdict['said']}")
    say(f"\nreport: {os.path.join(out, 'report.html')}")


def _show_change(results: Any) -> None:
    say(f"{'metric':26} {'original':>10} {'ablated':>10} {'change':>9}  95 % interval of the change")
    for d in results.differences:
        if (d.from_, d.to) == ("original", "ablated"):
            before, after = results.find(d.metric).value, results.find(d.metric, "ablated").value
            relative = f"{d.relative:+.1%}" if d.relative is not None else "-"
            interval = f"{d.ci95[0]:+.4g} to {d.ci95[1]:+.4g}" if d.ci95 else "-"
            say(f"{d.metric:26} {before:10.4g} {after:10.4g} {relative:>9}  {interval}")


def _show_variants(results: Any) -> None:
    """Print a line per variant with a column per metric."""
    columns = list(dict.fromkeys(m.metric for m in results))
    rows: dict[str, dict[str, str]] = {}
    for m in results:
        rows.setdefault(m.variant, {})[m.metric] = "-" if m.value is None else format(m.value, ".4g")
    width = max(map(len, rows), default=0)
    if not rows:
        say("nothing was measured: the recipe has no evaluation")
    say(" ".join([" " * width, *columns]))
    for variant, figures_by_metric in rows.items():
        figures = [f"{figures_by_metric.get(metric, ''):>{len(metric)}}" for metric in columns]
        say(" ".join([f"{variant:{width}}", *figures]))
