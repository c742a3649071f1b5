"""Circuits: select, combine, compare, take out of a checkpoint, push to the hub."""

import argparse

from ..errors import UserError
from .console import Add, model_arguments, quiet_transformers, say


def add_to(add: Add) -> None:
    _add_select(add)
    _add_circuits(add)
    _add_ablate(add)
    _add_push(add)


def _add_select(add: Add) -> None:
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


def _add_circuits(add: Add) -> None:
    circuits = add("circuits", _circuits, "combine two circuits, or say how far they overlap")
    circuits.add_argument("operation", choices=["union", "intersection", "difference", "overlap"])
    circuits.add_argument("one", metavar="A")
    circuits.add_argument("other", metavar="B")
    circuits.add_argument("--out", help="output file of the combined circuit")


def _add_ablate(add: Add) -> None:
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


def _add_push(add: Add) -> None:
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
