"""Commands for single stages: attribute and merge scores; select, combine and compare circuits, remove
them from a checkpoint or a GGUF, push them to the hub."""

import argparse
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..errors import UserError
from .console import FLAG, INTEGER, MODEL, PRECISION, REQUIRED, Add, Arguments, quiet_transformers, say

if TYPE_CHECKING:
    from ..attribution.options import AttributionOptions
    from ..scores import Scores

OPTIONS = {
    "method": "lrp, cp-lrp, relp, gim, gradient, ig, wanda, activation, magnitude, random (default: lrp)",
    "unit": "neuron, head or weight (default: neuron)",
    "sites": "comma-separated roles (default: mlp.up)",
    "target": "predicted, label, contrast, completion[:N], next, logprob, words, logwords (default: "
    "predicted)",
    "words": "of the targets words and logwords: a text file with one word a line, with its leading space",
    "neuron": "abs or signed (default: abs)",
    "reduce": "mean, mean_abs, abs_mean, rms (default: mean)",
    "epsilon": "ε of LRP's rule on linear maps (default: 0)",
    "batch_tokens": "padded tokens in one forward pass (default: auto)",
    "skip_positions": "leave the first N positions of each sample out of the sums (default: 0)",
    "gradient_checkpointing": "true: compute layers twice to save memory; offload: also keep their inputs on "
    "the CPU; auto: only if needed; false (default: auto)",
    "sums_dtype": "dtype of the running sums of unit weight (default: float32)",
    "sums_device": "device of these sums (default: cpu)",
    "non_finite": "error, or skip samples without a finite relevance (default: error)",
}
"""Option of `attribute` → its help; `AttributionOptions` checks the values."""

SCORES_OUT: Arguments = {"--out": ("where the scores go (.safetensors)", REQUIRED)}
ATTRIBUTE: Arguments = {
    **MODEL,
    "--samples": "a JSONL or text file, or a source: c4, realtoxicityprompts, wikitext2, ioi, demo-…",
    "--count": ("number of samples (default: all of a file; 128 of a source or with --seq-len)", INTEGER),
    "--seq-len": ("cut the samples of a source to exactly this many tokens", INTEGER),
    "--seed": ("which samples of a source (default: %(default)s)", {**INTEGER, "default": 0}),
    **SCORES_OUT,
    **{f"--{name.replace('_', '-')}": about for name, about in OPTIONS.items()},
    "--truncate": ("cut samples longer than the model's context", FLAG),
    "--shard I/N": "process the I-th of N shares of the samples; --out is then a shard file for merge",
}
MERGE: Arguments = {
    "shards SHARD": ("what attribute --shard wrote", {"nargs": "+"}),
    **SCORES_OUT,
    "--model": "the model they were made on; needed for weight and Wanda scores",
    **PRECISION,
}
SELECT: Arguments = {
    "--general A": "scores on general text",
    "--undesired B": "scores on the behaviour to remove",
    "--matched C": "scores on benign completions of the same kind of prompts",
    "--penalty P": (
        "weight of the general and matched scores (with --matched)",
        {"type": float, "default": 1.0},
    ),
    "--normalize": "l1: scale each set of scores to a total of one first",
    "--scores S": "select by these scores alone, without a contrast",
    "--count N": ("how many units", INTEGER),
    "--fraction F": ("or the share of units to select", {"type": float}),
    "--scope": (
        "global or site; for weights also row, or n:m such as 2:4 (default: %(default)s)",
        {"default": "global"},
    ),
    "--order": ("lowest or highest (default: %(default)s)", {"default": "lowest"}),
    "--strength S": (
        "share of each unit that is removed: 0.5 halves it (default: 1)",
        {"type": float, "default": 1.0},
    ),
    "--damage D": (
        "fit a strength for each of --count neurons instead, at so much damage to general text, in nats a "
        "token; A are then scores by --method gradient --neuron signed --target logprob --reduce rms",
        {"type": float},
    ),
    "--repair R": (
        "with --damage: from 0 to 1, how much of the step that lowers the loss of general text the strengths "
        "also take (default: 0)",
        {"type": float, "default": 0.0},
    ),
    "--slope S": "for --repair: scores as for --damage, but by --reduce mean",
    "--out": ("output file (circuit.json; for weights circuit.safetensors)", REQUIRED),
}
CIRCUITS: Arguments = {
    "operation": (
        "union, intersection, difference, or overlap",
        {"choices": ["union", "intersection", "difference", "overlap"]},
    ),
    "first A": "a circuit",
    "second B": "another one",
    "--out": "output file of the combined circuit",
}
FORCE: Arguments = {"--force": ("apply a circuit that was made on other weights", FLAG)}
ABLATE: Arguments = {
    **MODEL,
    "--circuit": "circuit.json, a folder that contains one, or USER/REPO on the hub",
    "--results": "results.json to put into the model card",
    "--out": "a new folder; or, of a GGUF, a new file (.gguf), its blocks as they were but the removed ones",
    "--in-place": ("change the GGUF itself; the patch that undoes it is written first", FLAG),
    "--undo PATCH": "put back what this patch took from the GGUF, instead of a circuit",
    "--shrink": ("delete neurons from their matrices; needs the same number in every layer", FLAG),
    **FORCE,
}
PUSH: Arguments = {
    "path PATH": "circuit.json, or the folder of a checkpoint",
    "repo USER/REPO": "created as private if it does not exist; uses the token of hf auth login or HF_TOKEN",
    "--public": ("make the repository public, or push to one that is", FLAG),
    "--base ID": "hub id of the circuit's model, for its card",
    "--results": "results.json to put into a circuit's card",
    "--message": "of the commit",
}


def add_to(add: Add) -> None:
    add("attribute", _attribute, "score the units of a model on samples", ATTRIBUTE)
    add("merge", _merge, "the scores of a reference set, of the files of all its shards", MERGE)
    add("select", _select, "contrast two sets of scores and select units", SELECT)
    add("circuits", _circuits, "combine two circuits, or say how far they overlap", CIRCUITS)
    description = (
        "write the model without a circuit as an ordinary Hugging Face checkpoint, or take the circuit out "
        "of a GGUF itself"
    )
    add("ablate", _ablate, description, ABLATE)
    add("push", _push, "put a circuit, or a folder that ablate wrote, onto the hub", PUSH)


def _attribute(args: argparse.Namespace) -> None:
    from ..attribution.attribute import attribute
    from ..attribution.methods import require_method
    from ..attribution.partial_sums import parse_shard
    from ..models.load import load_tokenizer, load_weights
    from ..samples.reference_set import ReferenceSet
    from ..samples.sources import Request, gather, is_path, require_source
    from ..storage import claim_file, require_place

    options = _parse_options(args)
    shard = parse_shard(args.shard) if args.shard else None
    needs_samples = require_method(options.method).run
    if shard and not needs_samples:
        raise UserError(
            f"method {options.method} uses no samples, so there is nothing to divide; leave out --shard"
        )
    if not args.samples and needs_samples:
        raise UserError(f"method {options.method} needs --samples: a JSONL or text file, or a source")
    if args.count is not None and args.count < 1:
        raise UserError(f"--count is {args.count}; give at least 1")
    if args.samples:
        require_source(args.samples)
    require_place(args.out)
    takes_whole_file = args.samples and is_path(args.samples) and not args.seq_len and args.count is None
    samples = ReferenceSet.load(args.samples) if takes_whole_file else None
    quiet_transformers()
    distributed.start()
    model = load_weights(args.model, dtype=args.dtype, device=args.device)
    has_text = bool(args.samples) and (
        samples is None or any(sample.has_text for sample in samples) or args.words
    )
    tokenizer = load_tokenizer(args.model) if has_text else None
    if tokenizer is not None:
        tokenizer.of_model_type = model.config.model_type
    if args.samples and samples is None:
        request = Request(args.samples, args.count or 128, seq_len=args.seq_len, seeds=(args.seed,))
        samples = gather(request, tokenizer)
    with claim_file(args.out) if distributed.is_main() else nullcontext():
        scores = attribute(
            model,
            samples or [],
            tokenizer=tokenizer,
            **options.model_dump(),
            progress=True,
            partial=args.out if shard else f"{args.out}.partial",
            shard=shard,
        )
        if distributed.is_main() and not shard:
            scores.save(args.out)
    if distributed.is_main():
        _say_scores(args.out, scores)


def _parse_options(args: argparse.Namespace) -> "AttributionOptions":
    from ..attribution.options import AttributionOptions
    from ..samples.batches import OF_WORDS
    from ..settings import parse

    values: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    if args.sites:
        values["sites"] = tuple(args.sites.split(","))
    if args.batch_tokens and args.batch_tokens.isdigit():
        values["batch_tokens"] = int(args.batch_tokens)
    if args.epsilon:
        with suppress(ValueError):  # parse() below refuses what is not a number, and names the key
            values["epsilon"] = float(args.epsilon)
    if args.gradient_checkpointing in ("true", "false"):
        values["gradient_checkpointing"] = args.gradient_checkpointing == "true"
    options = parse(AttributionOptions, {**values, "truncate": args.truncate}, "")
    if bool(options.words) != (options.target in OF_WORDS):
        raise UserError(
            "--words goes with --target words or logwords, and these need it; give both or neither"
        )
    return options


def _merge(args: argparse.Namespace) -> None:
    from ..attribution.attribute import merge
    from ..models.load import load_weights

    quiet_transformers()
    model = load_weights(args.model, dtype=args.dtype, device=args.device) if args.model else None
    scores = merge(args.shards, model=model)
    scores.save(args.out)
    _say_scores(args.out, scores)


def _say_scores(out: str, scores: "Scores") -> None:
    units = f"{scores.units} {scores.unit}s in {len(scores)} sites"
    say(f"{out}: {units}, from {scores.provenance['samples']} samples")


def _select(args: argparse.Namespace) -> None:
    from ..circuits.select import contrast, select
    from ..scores import Scores

    if args.damage is not None:
        _fit(args)
        return
    if args.repair or args.slope:
        raise UserError("--repair and --slope are for fitted strengths; give --damage too")
    if bool(args.scores) == bool(args.general or args.undesired):
        raise UserError("give either --general and --undesired, or --scores")
    if args.scores:
        scores = Scores.load(args.scores)
    elif not (args.general and args.undesired):
        raise UserError("a contrast needs both --general and --undesired")
    else:
        matched = Scores.load(args.matched) if args.matched else None
        scores = contrast(
            Scores.load(args.general),
            Scores.load(args.undesired),
            matched=matched,
            penalty=args.penalty,
            normalize=args.normalize,
        )
    options = {name: getattr(args, name) for name in ("count", "fraction", "scope", "order", "strength")}
    circuit = select(scores, **options)
    circuit.save(args.out)
    say(f"{args.out}: {len(circuit)} of {scores.units} {circuit.unit}s{circuit.at_strength}")


def _fit(args: argparse.Namespace) -> None:
    from ..circuits.fit import fit
    from ..scores import Scores

    unread = {name: getattr(args, name) for name in ("scores", "matched", "normalize", "fraction")}
    unread |= {"scope": args.scope != "global", "order": args.order != "lowest", "penalty": args.penalty != 1}
    unread |= {"strength": args.strength != 1}
    if excess := [name for name, value in unread.items() if value]:
        raise UserError(f"--damage fits strengths and does not read --{excess[0]}; leave it out")
    if not (args.general and args.undesired and args.count):
        raise UserError("--damage needs --general, --undesired and --count")
    if args.slope and not args.repair:
        raise UserError("--slope is read only by a repair; give --repair too, or leave it out")
    effect = Scores.load(args.undesired)
    circuit = fit(
        effect,
        Scores.load(args.general),
        count=args.count,
        damage=args.damage,
        slope=Scores.load(args.slope) if args.slope else None,
        repair=args.repair,
    )
    circuit.save(args.out)
    say(f"{args.out}: {len(circuit)} of {effect.units} {circuit.unit}s{circuit.at_strength}")


def _circuits(args: argparse.Namespace) -> None:
    from ..circuits.algebra import OPERATIONS, overlap
    from ..circuits.circuit import Circuit

    if (args.operation == "overlap") == bool(args.out):
        raise UserError(
            "overlap prints its figures and takes no --out"
            if args.out
            else f"{args.operation} makes a circuit; give its file with --out"
        )
    first, second = Circuit.load(args.first), Circuit.load(args.second)
    if args.out:
        combined = OPERATIONS[args.operation](first, second)
        combined.save(args.out)
        say(f"{args.out}: {len(combined)} {combined.unit}s, of {len(first)} and {len(second)}")
        return
    shared = overlap(first, second)
    say(
        f"{shared.both} {first.unit}s in both, of {shared.first} and "
        f"{shared.second}; Jaccard {shared.jaccard:.4g}"
    )
    if shared.expected is not None:
        ratios = [_format_ratio(ratio) for ratio in (shared.enrichment, shared.enrichment_in_sites)]
        say(
            f"by chance, of {shared.units}: {shared.expected:.4g}; enrichment {ratios[0]}, with as many in "
            f"each site {ratios[1]}"
        )


def _ablate(args: argparse.Namespace) -> None:
    if bool(args.circuit) == bool(args.undo):
        raise UserError("give either --circuit, the units to remove, or --undo, the patch of a GGUF")
    if args.in_place or args.undo or (args.out or "").lower().endswith(".gguf"):
        _ablate_gguf(args)
    elif args.out:
        _ablate_checkpoint(args)
    else:
        raise UserError("give the new model's folder with --out")


def _ablate_gguf(args: argparse.Namespace) -> None:
    from ..checkpoints.gguf_patch import patch_gguf, undo_patch
    from ..circuits.circuit import Circuit

    if args.shrink or args.results:
        raise UserError("a GGUF cannot be shrunk and has no model card; leave out --shrink and --results")
    target = args.out or args.model
    if args.undo:
        patch = undo_patch(args.model, args.undo, args.out, in_place=args.in_place)
        say(f"{target}: {patch.file} as it was, SHA-256 {patch.sha256_before}")
        return
    circuit = Circuit.load(args.circuit)
    patch, patch_path = patch_gguf(args.model, circuit, args.out, in_place=args.in_place, force=args.force)
    say(
        f"{target}: {patch.file} without {len(circuit)} {circuit.unit}s{circuit.at_strength}; "
        f"{patch.bytes_changed:,} of {patch.size:,} bytes changed, {patch_path} undoes it"
    )
    say(f"checked: {patch.checked}")


def _ablate_checkpoint(args: argparse.Namespace) -> None:
    from ..checkpoints.export import export
    from ..circuits.circuit import Circuit
    from ..models.load import load_tokenizer, load_weights
    from ..results import Results
    from ..storage import require_place

    circuit = Circuit.load(args.circuit)
    circuit.require_exportable()
    results = Results.load(args.results) if args.results else None
    require_place(args.out, folder=True)
    quiet_transformers()
    model, tokenizer = load_weights(args.model, dtype=args.dtype, device=args.device), None
    if not args.force:
        circuit.require_model(model)
    try:
        tokenizer = load_tokenizer(args.model)
    except UserError as error:
        say(f"sparc3: {error}; the new folder has none either", error=True)
    out = export(model, tokenizer, circuit, args.out, results=results, shrink=args.shrink)
    say(f"{out}: the model without {len(circuit)} {circuit.unit}s{circuit.at_strength}")


def _push(args: argparse.Namespace) -> None:
    from ..checkpoints.push import push
    from ..results import Results

    results = Results.load(args.results) if args.results else None
    address = push(
        args.path, args.repo, public=args.public, base=args.base, results=results, message=args.message
    )
    say(f"{address} ({'public' if args.public else 'private'})")


def _format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.4g} times"
