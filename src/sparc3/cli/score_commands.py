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


def add_to(add: Add) -> None:
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
