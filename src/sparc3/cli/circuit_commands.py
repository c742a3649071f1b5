"""Scores of units: attribute and merge."""

import argparse
from contextlib import nullcontext

from .. import distributed
from ..errors import UserError
from .console import Add, model_arguments, precision_arguments, quiet_transformers, say

OPTIONS = {
    "method": "lrp, cp-lrp, gradient, wanda, activation, magnitude, random (default: lrp)",
    "unit": "neuron, head or weight (default: neuron)",
    "sites": "comma-separated roles (default: mlp.up)",
    "target": "predicted, label, contrast, completion[:N], next (default: predicted)",
    "neuron": "abs or signed (default: abs)",
    "reduce": "mean, mean_abs, abs_mean (default: mean)",
    "batch_tokens": "padded tokens in one forward pass (default: auto)",
    "skip_positions": "leave so many first positions of each sample out of the sums (default: 0)",
    "gradient_checkpointing": "true: compute layers twice to keep less; offload: and that on the CPU; auto: "
    "if it must be; false "
    "(default: auto)",
    "sums_dtype": "of the running sums of unit weight (default: float32)",
    "sums_device": "where these sums are (default: cpu)",
    "non_finite": "error, or skip samples without a finite relevance (default: error)",
}
"""Options of `attribute`, whose values `AttributionOptions` checks, and what they are."""


def add_score_commands(add: Add) -> None:
    attribute = add("attribute", _attribute, "score the units of a model on samples")
    model_arguments(attribute)
    attribute.add_argument(
        "--samples", help="a JSONL or text file, or a source: c4, realtoxicityprompts, wikitext2, ioi, demo-…"
    )
    attribute.add_argument(
        "--count",
        type=int,
        help="number of samples (default: all of a file; 128 of a source or with --seq-len)",
    )
    attribute.add_argument(
        "--seq-len", type=int, help="cut the samples of a source to exactly this many tokens"
    )
    attribute.add_argument(
        "--seed", type=int, default=0, help="which samples of a source (default: %(default)s)"
    )
    attribute.add_argument("--out", required=True, help="where the scores go (.safetensors)")
    for name, about in OPTIONS.items():
        attribute.add_argument(f"--{name.replace('_', '-')}", help=about)
    attribute.add_argument(
        "--truncate", action="store_true", help="cut samples longer than the model's context"
    )
    attribute.add_argument(
        "--shard",
        metavar="I/N",
        help="process the I-th of N shares of the samples; --out is then a shard file for merge",
    )

    merge = add("merge", _merge, "the scores of a reference set, of the files of all its shards")
    merge.add_argument("shards", nargs="+", metavar="SHARD", help="what attribute --shard wrote")
    merge.add_argument("--out", required=True, help="where the scores go (.safetensors)")
    merge.add_argument("--model", help="the model they were made on; needed for weight and Wanda scores")
    precision_arguments(merge)


def _attribute(args: argparse.Namespace) -> None:
    from ..attribution.attribute import attribute
    from ..attribution.methods import require_method
    from ..attribution.options import AttributionOptions
    from ..attribution.partial_sums import parse_shard
    from ..models.load import load_tokenizer, load_weights
    from ..samples.reference_set import ReferenceSet
    from ..samples.sources import Request, gather, is_path, require_source
    from ..settings import parse
    from ..storage import claim_file, require_place

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.sites:
        given["sites"] = tuple(args.sites.split(","))
    if args.batch_tokens and args.batch_tokens.isdigit():
        given["batch_tokens"] = int(args.batch_tokens)
    if args.gradient_checkpointing in ("true", "false"):
        given["gradient_checkpointing"] = args.gradient_checkpointing == "true"
    options = parse(AttributionOptions, {**given, "truncate": args.truncate}, "")
    shard = parse_shard(args.shard) if args.shard else None
    if shard and not require_method(options.method).run:
        raise UserError(
            f"method {options.method} looks at no sample, so there is nothing to share out; leave out --shard"
        )
    if not args.samples and require_method(options.method).run:
        raise UserError(f"method {options.method} needs --samples: a JSONL or text file, or a source")
    if args.count is not None and args.count < 1:
        raise UserError(f"--count is {args.count}; give at least 1")
    if args.samples:
        require_source(args.samples)
    require_place(args.out)
    whole = args.samples and is_path(args.samples) and not args.seq_len and args.count is None
    loaded = ReferenceSet.load(args.samples) if whole else None
    quiet_transformers()
    distributed.start()
    model = load_weights(args.model, dtype=args.dtype, device=args.device)
    text = bool(args.samples) and (loaded is None or any(sample.written for sample in loaded))
    tokenizer = load_tokenizer(args.model) if text else None
    if args.samples and loaded is None:
        loaded = gather(
            Request(args.samples, args.count or 128, seq_len=args.seq_len, seeds=(args.seed,)), tokenizer
        )
    with claim_file(args.out) if distributed.is_main() else nullcontext():
        scores = attribute(
            model,
            loaded or [],
            tokenizer=tokenizer,
            **options.model_dump(),
            progress=True,
            partial=args.out if shard else f"{args.out}.partial",
            shard=shard,
        )
        if distributed.is_main() and not shard:
            scores.save(args.out)
    if not distributed.is_main():
        return
    say(
        f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from "
        f"{scores.provenance['samples']} samples"
    )


def _merge(args: argparse.Namespace) -> None:
    from ..attribution.attribute import merge
    from ..models.load import load_weights

    quiet_transformers()
    scores = merge(
        args.shards,
        model=load_weights(args.model, dtype=args.dtype, device=args.device) if args.model else None,
    )
    scores.save(args.out)
    say(
        f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from "
        f"{scores.provenance['samples']} samples"
    )


# Circuits: select, combine, compare, take out of a checkpoint.


def add_circuit_commands(add: Add) -> None:
    select = add("select", _select, "contrast two sets of scores and select units")
    select.add_argument("--general", metavar="A", help="scores on general text")
    select.add_argument("--undesired", metavar="B", help="scores on the behaviour to remove")
    select.add_argument(
        "--matched", metavar="C", help="scores on benign completions of the same kind of prompts"
    )
    select.add_argument(
        "--penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="weight of the general and matched scores (with --matched)",
    )
    select.add_argument("--normalize", help="l1: scale each set of scores to a total of one first")
    select.add_argument("--scores", metavar="S", help="select by these scores alone, without a contrast")
    select.add_argument("--count", type=int, metavar="N", help="how many units")
    select.add_argument("--fraction", type=float, metavar="F", help="or the share of units to select")
    select.add_argument(
        "--scope",
        default="global",
        help="global or site; for weights also row, or n:m such as 2:4 (default: %(default)s)",
    )
    select.add_argument("--order", default="lowest", help="lowest or highest (default: %(default)s)")
    select.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="S",
        help="share of each unit that is removed: 0.5 halves it (default: 1)",
    )
    select.add_argument(
        "--out", required=True, help="output file (circuit.json; for weights circuit.safetensors)"
    )

    circuits = add("circuits", _circuits, "combine two circuits, or say how far they overlap")
    circuits.add_argument("operation", choices=["union", "intersection", "difference", "overlap"])
    circuits.add_argument("one", metavar="A")
    circuits.add_argument("other", metavar="B")
    circuits.add_argument("--out", help="output file of the combined circuit")

    ablate = add(
        "ablate",
        _ablate,
        "write the model without a circuit as an ordinary Hugging Face checkpoint, or take the circuit out "
        "of a GGUF itself",
    )
    model_arguments(ablate)
    ablate.add_argument("--circuit", help="circuit.json, a folder that contains one, or USER/REPO on the hub")
    ablate.add_argument("--results", help="results.json to put into the model card")
    ablate.add_argument(
        "--out",
        help="a new folder; or, of a GGUF, a new file (.gguf), its blocks as they were but the removed ones",
    )
    ablate.add_argument(
        "--in-place",
        action="store_true",
        help="change the GGUF itself; the patch that undoes it is written first",
    )
    ablate.add_argument(
        "--undo", metavar="PATCH", help="put back what this patch took from the GGUF, instead of a circuit"
    )
    ablate.add_argument(
        "--shrink",
        action="store_true",
        help="delete neurons from their matrices; needs the same number in every layer",
    )
    ablate.add_argument("--force", action="store_true", help="apply a circuit that was made on other weights")

    push = add("push", _push, "put a circuit, or a folder that ablate wrote, onto the hub")
    push.add_argument("path", metavar="PATH", help="circuit.json, or the folder of a checkpoint")
    push.add_argument(
        "repo",
        metavar="USER/REPO",
        help="created as private if it does not exist; uses the token of hf auth login or HF_TOKEN",
    )
    push.add_argument(
        "--public", action="store_true", help="make the repository public, or push to one that is"
    )
    push.add_argument("--base", metavar="ID", help="hub id of the circuit's model, for its card")
    push.add_argument("--results", help="results.json to put into a circuit's card")
    push.add_argument("--message", help="of the commit")


def _select(args: argparse.Namespace) -> None:
    from ..circuits.select import contrast, select
    from ..scores import Scores

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
    circuit = select(
        scores,
        count=args.count,
        fraction=args.fraction,
        scope=args.scope,
        order=args.order,
        strength=args.strength,
    )
    circuit.save(args.out)
    say(f"{args.out}: {len(circuit)} of {scores.units} {circuit.unit}s{circuit.at_strength}")


def _circuits(args: argparse.Namespace) -> None:
    from ..circuits.algebra import OPERATIONS, overlap
    from ..circuits.circuit import Circuit

    if (args.operation == "overlap") == bool(args.out):
        raise UserError(
            "overlap prints its figures and takes no --out"
            if args.out
            else f"{args.operation} makes a circuit; say where with --out"
        )
    one, other = Circuit.load(args.one), Circuit.load(args.other)
    if args.out:
        combined = OPERATIONS[args.operation](one, other)
        combined.save(args.out)
        say(f"{args.out}: {len(combined)} {combined.unit}s, of {len(one)} and {len(other)}")
        return
    found = overlap(one, other)
    say(f"{found.both} {one.unit}s in both, of {found.one} and {found.other}; Jaccard {found.jaccard:.4g}")
    if found.expected is not None:
        times = [_times(ratio) for ratio in (found.enrichment, found.enrichment_in_sites)]
        say(
            f"by chance, of {found.units}: {found.expected:.4g}; enrichment {times[0]}, with as many in each "
            f"site {times[1]}"
        )


def _ablate(args: argparse.Namespace) -> None:
    if bool(args.circuit) == bool(args.undo):
        raise UserError("give --circuit, what to remove, or --undo, the patch of a GGUF")
    if args.in_place or args.undo or (args.out or "").lower().endswith(".gguf"):
        _ablate_gguf(args)
    elif args.out:
        _ablate_checkpoint(args)
    else:
        raise UserError("say where the model goes with --out")


def _ablate_gguf(args: argparse.Namespace) -> None:
    from ..checkpoints.gguf_patch import patch_gguf, undo_patch
    from ..circuits.circuit import Circuit

    if args.shrink or args.results:
        raise UserError("a GGUF is not shrunk and has no model card; leave out --shrink and --results")
    target = args.out or args.model
    if args.undo:
        undone = undo_patch(args.model, args.undo, args.out, in_place=args.in_place)
        say(f"{target}: {undone.file} as it was, SHA-256 {undone.sha256_before}")
        return
    circuit = Circuit.load(args.circuit)
    patch, kept = patch_gguf(args.model, circuit, args.out, in_place=args.in_place, force=args.force)
    say(
        f"{target}: {patch.file} without {len(circuit)} {circuit.unit}s{circuit.at_strength}; "
        f"{patch.bytes_changed:,} of {patch.size:,} bytes changed, {kept} undoes it"
    )
    say(f"checked: {patch.checked}")


def _ablate_checkpoint(args: argparse.Namespace) -> None:
    from ..checkpoints.export import export
    from ..circuits.circuit import Circuit
    from ..models.load import load_tokenizer, load_weights
    from ..results import Results
    from ..storage import require_place

    circuit = Circuit.load(args.circuit)
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


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.4g} times"
