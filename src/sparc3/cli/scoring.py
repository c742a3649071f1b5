"""Scores of units: attribute and merge."""

import argparse
import sys

from .. import distributed
from ..errors import UserError
from .console import Add, model_arguments, precision_arguments, quiet_transformers, say


def add_to(add: Add) -> None:
    attribute = add("attribute", _attribute, "score the units of a model on samples")
    model_arguments(attribute)
    attribute.add_argument("--samples", help="a JSONL or text file, or a source: c4, realtoxicityprompts, wikitext2, ioi, demo-…")
    attribute.add_argument("--count", type=int, help="samples taken (default: all of a file, 128 of a source or of a file that is cut)")
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
    attribute.add_argument("--gradient-checkpointing", default="auto", choices=("auto", "true", "false", "offload"),
                           help="compute layers twice to keep less; offload: on the CPU; auto: if it must be (default: %(default)s)")  # fmt: skip
    attribute.add_argument("--sums-dtype", default="float32", help="of the running sums of unit weight (default: %(default)s)")
    attribute.add_argument("--sums-device", default="cpu", help="where these sums are (default: %(default)s)")
    attribute.add_argument("--non-finite", default="error", help="error, or skip samples without a finite relevance (default: %(default)s)")
    attribute.add_argument("--shard", metavar="I/N", help="look at the I-th of N shares of the samples; --out is then a shard file, for merge")

    merge = add("merge", _merge, "the scores of a reference set, of the files of all its shards")
    merge.add_argument("shards", nargs="+", metavar="SHARD", help="what attribute --shard wrote")
    merge.add_argument("--out", required=True, help="where the scores go (.safetensors)")
    merge.add_argument("--model", help="the model they were made on; needed for weight and Wanda scores")
    precision_arguments(merge)


def _attribute(args: argparse.Namespace) -> None:
    from ..attribution import attribute
    from ..attribution.methods import require_method
    from ..attribution.shards import parse_shard
    from ..files import require_place
    from ..models import load_tokenizer, load_weights
    from ..samples import ReferenceSet
    from ..sources import Request, gather, is_path, require_source

    shard = parse_shard(args.shard) if args.shard else None
    if shard and not require_method(args.method).run:
        raise UserError(f"method {args.method} looks at no sample, so there is nothing to share out; leave out --shard")
    if not args.samples and require_method(args.method).run:
        raise UserError(f"method {args.method} needs --samples: a JSONL or text file, or a source")
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
        loaded = gather(Request(args.samples, args.count or 128, seq_len=args.seq_len, seeds=(args.seed,)), tokenizer)
    scores = attribute(
        model, loaded or [], tokenizer=tokenizer, method=args.method, unit=args.unit, sites=tuple(args.sites.split(",")), target=args.target,
        neuron=args.neuron, reduce=args.reduce, batch_tokens=int(args.batch_tokens) if args.batch_tokens.isdigit() else args.batch_tokens,
        gradient_checkpointing={"true": True, "false": False}.get(args.gradient_checkpointing, args.gradient_checkpointing),
        truncate=args.truncate, skip_positions=args.skip_positions, non_finite=args.non_finite, sums_dtype=args.sums_dtype,
        sums_device=args.sums_device, progress=sys.stderr.isatty(), partial=args.out if shard else f"{args.out}.partial", shard=shard,
    )
    if not distributed.is_main():
        return
    if not shard:
        scores.save(args.out)
    say(f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from {scores.provenance['samples']} samples")


def _merge(args: argparse.Namespace) -> None:
    from ..attribution import merge
    from ..models import load_weights

    quiet_transformers()
    scores = merge(args.shards, model=load_weights(args.model, dtype=args.dtype, device=args.device) if args.model else None)
    scores.save(args.out)
    say(f"{args.out}: {scores.units} {scores.unit}s in {len(scores)} sites, from {scores.provenance['samples']} samples")
