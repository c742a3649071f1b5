"""The command line: parse, call one function, print. Exit codes: 0 done, 2 the user's mistake, 1 anything else."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__, distributed
from .errors import Sparc3Error, UserError, unknown

Command = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """Mistakes end as one line, with the near name where there is one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown("command" if action.dest == "command" else f"value of {action.dest}", value, map(str, action.choices))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; ends the process with its exit code where that is not 0."""
    try:
        parsed = _parser().parse_args(arguments)
        _speak()
        parsed.run(parsed)
        distributed.stop()
    except UserError as error:
        _stop(2, str(error))
    except Sparc3Error as error:
        _stop(1, str(error))
    except KeyboardInterrupt:
        _stop(130, "interrupted; the same command goes on where it was")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(code: int, message: str) -> NoReturn:
    print(f"sparc3: {_plain(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(code)


def _plain(text: str) -> str:
    """No terminal escapes from file or model names: control characters as visible ones."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _plain(super().format(record))


def _speak() -> None:
    """Our log lines on the console, other libraries' chatter not."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(message)s"))
    logger = logging.getLogger("sparc3")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")


def _quiet_transformers() -> None:
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparc3", description="Find the parts of a language model that produce a behaviour, remove them, and prove what that did.")
    parser.add_argument("--version", action="version", version=f"sparc3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "the whole thing on the embedded model, offline, with a report")
    demo.add_argument("--out", default="sparc3-demo", help="run folder (default: %(default)s)")

    run = add("run", _run, "run a recipe; resumes by itself")
    run.add_argument("recipe", help="a bundled recipe's name (see sparc3 recipes), or the path of a YAML file")
    run.add_argument("--out", help="run folder (default: runs/<recipe's name>)")
    run.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change a setting of the recipe; may be repeated")
    run.add_argument("--no-resume", action="store_true", help="refuse a folder that holds this run already")

    attribute = add("attribute", _attribute, "score the units of a model on samples")
    _model_arguments(attribute)
    attribute.add_argument("--samples", help="a JSONL or text file, or a source: c4, realtoxicityprompts, wikitext2, demo-…")
    attribute.add_argument("--count", type=int, default=128, help="samples taken of a source (default: %(default)s)")
    attribute.add_argument("--seq-len", type=int, help="cut the samples of a source to exactly this many tokens")
    attribute.add_argument("--seed", type=int, default=0, help="which samples of a source (default: %(default)s)")
    attribute.add_argument("--out", required=True, help="where the scores go (.safetensors)")
    attribute.add_argument("--method", default="lrp", help="lrp, cp-lrp, gradient, wanda, activation, magnitude, random (default: %(default)s)")
    attribute.add_argument("--unit", default="neuron", help="neuron, head or weight (default: %(default)s)")
    attribute.add_argument("--sites", default="mlp.up", help="comma-separated roles (default: %(default)s)")
    attribute.add_argument("--target", default="predicted", help="predicted, label, contrast, completion[:N], next (default: %(default)s)")
    attribute.add_argument("--neuron", default="abs", help="abs or signed (default: %(default)s)")
    attribute.add_argument("--reduce", default="mean", help="mean, mean_abs, abs_mean (default: %(default)s)")
    attribute.add_argument("--batch-tokens", default="auto", help="padded tokens in one forward pass (default: %(default)s)")
    attribute.add_argument("--truncate", action="store_true", help="cut samples longer than the model's context")
    attribute.add_argument("--skip-positions", type=int, default=0, metavar="N", help="leave the first N positions of each sample out of the sums")
    attribute.add_argument("--sums-dtype", default="float32", help="of the running sums of unit weight (default: %(default)s)")
    attribute.add_argument("--sums-device", default="cpu", help="where these sums are (default: %(default)s)")
    attribute.add_argument("--non-finite", default="error", help="error, or skip samples without a finite relevance (default: %(default)s)")

    attribute.add_argument("--shard", metavar="I/N", help="look at the I-th of N shares of the samples; --out is then a shard file, for merge")

    merge = add("merge", _merge, "the scores of a reference set, of the files of all its shards")
    merge.add_argument("shards", nargs="+", metavar="SHARD", help="what attribute --shard wrote")
    merge.add_argument("--out", required=True, help="where the scores go (.safetensors)")
    merge.add_argument("--model", help="the model they were made on; needed for weight and Wanda scores")
    _precision_arguments(merge)

    select = add("select", _select, "contrast two sets of scores and select units")
    select.add_argument("--general", metavar="A", help="scores on general text")
    select.add_argument("--undesired", metavar="B", help="scores on the behaviour to remove")
    select.add_argument("--matched", metavar="C", help="scores on benign completions of the same kind of prompts")
    select.add_argument("--penalty", type=float, default=1.0, metavar="P", help="weight of general and matched use (with --matched)")
    select.add_argument("--normalize", help="l1: scale each set of scores to a total of one first")
    select.add_argument("--scores", metavar="S", help="select by these scores alone, without a contrast")
    select.add_argument("--count", type=int, metavar="N", help="how many units")
    select.add_argument("--fraction", type=float, metavar="F", help="or which share of them")
    select.add_argument("--scope", default="global", help="global or site; of weights also row, or n:m such as 2:4 (default: %(default)s)")
    select.add_argument("--order", default="lowest", help="lowest or highest (default: %(default)s)")
    select.add_argument("--out", required=True, help="where the circuit goes (circuit.json; of weights circuit.safetensors)")

    circuits = add("circuits", _circuits, "combine two circuits, or say how far they overlap")
    circuits.add_argument("operation", choices=["union", "intersection", "difference", "overlap"])
    circuits.add_argument("one", metavar="A")
    circuits.add_argument("other", metavar="B")
    circuits.add_argument("--out", help="where the combined circuit goes")

    ablate = add("ablate", _ablate, "write the model without a circuit as an ordinary Hugging Face checkpoint")
    _model_arguments(ablate)
    ablate.add_argument("--circuit", required=True, help="circuit.json")
    ablate.add_argument("--results", help="results.json to put into the model card")
    ablate.add_argument("--out", required=True, help="a new folder")
    ablate.add_argument("--force", action="store_true", help="apply a circuit that was made on other weights")

    evaluate = add("evaluate", _evaluate, "measure a model, and the model without a circuit")
    _model_arguments(evaluate)
    evaluate.add_argument("--circuit", help="circuit.json: measure the model without it too")
    evaluate.add_argument("--metrics", required=True, help="comma-separated: perplexity, toxicity, repetition, ioi, sparsity, harness")
    evaluate.add_argument("--set", action="append", default=[], metavar="METRIC.KEY=VALUE", help="such as perplexity.source=wiki.txt")
    evaluate.add_argument("--out", required=True, help="where the results go (results.json)")
    evaluate.add_argument("--force", action="store_true", help="apply a circuit that was made on other weights")

    report = add("report", _report, "rebuild the report of a run folder")
    report.add_argument("run_dir", metavar="RUN_DIR")

    doctor = add("doctor", _doctor, "what this machine has, and whether relevance on a model is right")
    doctor.add_argument("model", nargs="?", help="a hub id, the folder of a checkpoint, a config.json alone (random weights), or demo")
    _precision_arguments(doctor)

    slurm = add("slurm", _slurm, "write a batch file that runs a recipe under SLURM, and goes on after a time-out")
    slurm.add_argument("recipe", help="a bundled recipe's name, or the path of a YAML file")
    slurm.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    slurm.add_argument("--gpus", type=int, default=1, help="on each node, one rank each; 0 for CPUs alone (default: %(default)s)")
    slurm.add_argument("--time", default="04:00:00", help="time limit of one go; the job is queued again until it is done (default: %(default)s)")
    slurm.add_argument("--partition")
    slurm.add_argument("--array", type=int, metavar="N", help="N runs, with seeds 1 to N of the general set, in numbered run folders")
    slurm.add_argument("--run-out", metavar="DIR", help="run folder (default: runs/<recipe's name>)")
    slurm.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change a setting of the recipe; may be repeated")
    slurm.add_argument("--out", metavar="FILE", help="where the batch file goes (default: <recipe's name>.sbatch)")
    slurm.add_argument("--submit", action="store_true", help="hand it to sbatch")

    add("recipes", _recipes, "list the recipes that come with sparc3")
    return parser


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a hub id, or the folder of a checkpoint")
    _precision_arguments(command)


def _precision_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, float64 (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")


def _demo(args: argparse.Namespace) -> None:
    from .experiment import run

    _quiet_transformers()
    _show(run("demo", args.out, progress=sys.stderr.isatty()), args.out)


def _run(args: argparse.Namespace) -> None:
    from .recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    from .experiment import run

    _quiet_transformers()
    out = args.out or f"runs/{recipe.name}"
    _show(run(recipe, out, resume=not args.no_resume, progress=sys.stderr.isatty()), out)


def _show(results: Any, out: str) -> None:
    """The figures of the original and the ablated model, and where the report is."""
    if int(os.environ.get("RANK", "0")):
        return
    if not any(m.variant == "ablated" for m in results):
        _show_variants(results)
        print(f"\nreport: {os.path.join(out, 'report.html')}")
        return
    print(f"{'metric':26} {'original':>10} {'ablated':>10} {'change':>9}  95 % interval of the change")
    for d in results.differences:
        if (d.from_, d.to) == ("original", "ablated"):
            before, after = results.find(d.metric).value, results.find(d.metric, "ablated").value
            relative = f"{d.relative:+.1%}" if d.relative is not None else "-"
            interval = f"{d.ci95[0]:+.4g} to {d.ci95[1]:+.4g}" if d.ci95 else "-"
            print(f"{d.metric:26} {before:10.4g} {after:10.4g} {relative:>9}  {interval}")
    print(f"\nreport: {os.path.join(out, 'report.html')}")


def _show_variants(results: Any) -> None:
    """A line a variant, a column a metric."""
    columns = list(dict.fromkeys(m.metric for m in results))
    rows: dict[str, dict[str, str]] = {}
    for m in results:
        rows.setdefault(m.variant, {})[m.metric] = "-" if m.value is None else format(m.value, ".4g")
    width = max(map(len, rows))
    print(" ".join([" " * width, *columns]))
    for variant, found in rows.items():
        print(" ".join([f"{variant:{width}}", *(f"{found.get(metric, ''):>{len(metric)}}" for metric in columns)]))


def _attribute(args: argparse.Namespace) -> None:
    from .attribution import attribute
    from .attribution.methods import require_method
    from .attribution.shards import parse_shard
    from .models import load_model
    from .samples import ReferenceSet
    from .sources import Request, gather, is_path, require_source

    shard = parse_shard(args.shard) if args.shard else None
    if shard and not require_method(args.method).run:
        raise UserError(f"method {args.method} looks at no sample, so there is nothing to share out; leave out --shard")
    if not args.samples and require_method(args.method).run:
        raise UserError(f"method {args.method} needs --samples: a JSONL or text file, or a source")
    if args.samples:
        require_source(args.samples)
    whole = args.samples and is_path(args.samples) and not args.seq_len
    loaded = ReferenceSet.load(args.samples) if whole else None
    _quiet_transformers()
    distributed.start()
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    if args.samples and loaded is None:
        loaded = gather(Request(args.samples, args.count, seq_len=args.seq_len, seeds=(args.seed,)), tokenizer)
    scores = attribute(
        model, loaded or [], tokenizer=tokenizer, method=args.method, unit=args.unit, sites=tuple(args.sites.split(",")), target=args.target,
        neuron=args.neuron, reduce=args.reduce, batch_tokens=int(args.batch_tokens) if args.batch_tokens.isdigit() else args.batch_tokens,
        truncate=args.truncate, skip_positions=args.skip_positions, non_finite=args.non_finite, sums_dtype=args.sums_dtype,
        sums_device=args.sums_device, progress=sys.stderr.isatty(), partial=args.out if shard else f"{args.out}.partial", shard=shard,
    )
    if not distributed.is_main():
        return
    if not shard:
        scores.save(args.out)
    print(f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from {scores.provenance['samples']} samples")


def _merge(args: argparse.Namespace) -> None:
    from .attribution import merge
    from .models import load_weights

    _quiet_transformers()
    scores = merge(args.shards, model=load_weights(args.model, dtype=args.dtype, device=args.device) if args.model else None)
    scores.save(args.out)
    print(f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from {scores.provenance['samples']} samples")


def _select(args: argparse.Namespace) -> None:
    from .scores import Scores
    from .selection import contrast, select

    if bool(args.scores) == bool(args.general or args.undesired):
        raise UserError("give either --general and --undesired, or --scores")
    if args.scores:
        scores = Scores.load(args.scores)
    elif not (args.general and args.undesired):
        raise UserError("a contrast needs both --general and --undesired")
    else:
        matched = Scores.load(args.matched) if args.matched else None
        scores = contrast(Scores.load(args.general), Scores.load(args.undesired), matched=matched, penalty=args.penalty, normalize=args.normalize)
    circuit = select(scores, count=args.count, fraction=args.fraction, scope=args.scope, order=args.order)
    circuit.save(args.out)
    print(f"{args.out}: {len(circuit)} of {scores.units} {circuit.unit}s")


def _circuits(args: argparse.Namespace) -> None:
    from .circuit import Circuit
    from .circuits import OPERATIONS, overlap

    if (args.operation == "overlap") == bool(args.out):
        raise UserError("overlap prints its figures and takes no --out" if args.out else f"{args.operation} makes a circuit; say where with --out")
    one, other = Circuit.load(args.one), Circuit.load(args.other)
    if args.out:
        combined = OPERATIONS[args.operation](one, other)
        combined.save(args.out)
        print(f"{args.out}: {len(combined)} {combined.unit}s, of {len(one)} and {len(other)}")
        return
    found = overlap(one, other)
    print(f"{found.both} {one.unit}s in both, of {found.one} and {found.other}; Jaccard {found.jaccard:.4g}")
    if found.expected is not None:
        times = [_times(ratio) for ratio in (found.enrichment, found.enrichment_in_sites)]
        print(f"by chance, of {found.units}: {found.expected:.4g}; enrichment {times[0]}, with as many in each site {times[1]}")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.4g} times"


def _ablate(args: argparse.Namespace) -> None:
    from .ablation import export
    from .circuit import Circuit
    from .models import load_model
    from .results import Results

    circuit = Circuit.load(args.circuit)
    results = Results.load(args.results) if args.results else None
    _quiet_transformers()
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    if not args.force:
        circuit.require_model(model)
    print(f"{export(model, tokenizer, circuit, args.out, results=results)}: the model without {len(circuit)} {circuit.unit}s")


def _evaluate(args: argparse.Namespace) -> None:
    from .ablation import ablated
    from .circuit import Circuit
    from .evaluation import evaluate
    from .evaluation.metrics import parse_metrics
    from .models import load_model
    from .recipe import with_settings

    asked: dict[str, Any] = with_settings({name: {} for name in args.metrics.split(",")}, args.set)
    parse_metrics(asked)
    circuit = Circuit.load(args.circuit) if args.circuit else None
    _quiet_transformers()
    distributed.start()
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    if circuit and not args.force:
        circuit.require_model(model)
    variants = {"ablated": lambda: ablated(model, circuit)} if circuit else None
    results = evaluate(model, tokenizer, asked, variants=variants, progress=sys.stderr.isatty())
    if not distributed.is_main():
        return
    results.save(args.out)
    for m in results:
        print(f"{m.metric:26} {m.variant:10} {'-' if m.value is None else format(m.value, '.4g'):>10}")


def _report(args: argparse.Namespace) -> None:
    from .report import write_report

    print(write_report(args.run_dir))


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import environment, examine

    if not args.model:
        for what, how in environment():
            print(f"{what:16} {how}")
        return
    _quiet_transformers()
    found = examine(args.model, dtype=args.dtype, device=args.device)
    print(_plain("\n".join(found.lines())))
    if found.failed:
        raise Sparc3Error(f"{len(found.failed)} of {len(found.findings)} checks failed: {'; '.join(f.name for f in found.failed)}")


def _slurm(args: argparse.Namespace) -> None:
    from .recipe import load_recipe
    from .slurm import sbatch, submit, write_job

    recipe = load_recipe(args.recipe, args.set)
    text = sbatch(
        recipe, args.recipe, nodes=args.nodes, gpus=args.gpus, time=args.time, partition=args.partition, array=args.array, folder=args.run_out,
        sets=tuple(args.set),
    )  # fmt: skip
    path = args.out or f"{recipe.name}.sbatch"
    write_job(path, text)
    print(f"{path}: {f'submitted as job {submit(path)}' if args.submit else f'submit it with sbatch {path}'}")


def _recipes(args: argparse.Namespace) -> None:
    from .recipe import bundled

    for name, about in bundled().items():
        print(f"{name:28} {about}")
