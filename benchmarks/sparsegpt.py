"""SparseGPT beside the methods of a finished compression: the same calibration samples, the same share of zeros, the same test text.

    sparc3 run smollm2-compress --out FOLDER
    OMP_NUM_THREADS=1 python benchmarks/sparsegpt.py FOLDER --blocks 10 --out FILE

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) goes through the layers one by one, each with the inputs that the pruned layers before
it give. Inside a matrix it goes through the columns: it removes weights by their size over the diagonal of the inverse Hessian of the layer's
squared error, and adds to the columns that are still to come what best makes up for it. So, unlike a circuit, it changes the weights
that stay. As its own code has it: blocks of 128 columns, a share is that of each block, damping of 1 % of the Hessian's mean
diagonal. Differences are paired by block of test text.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparc3 import ReferenceSet, Results, load_model, load_recipe
from sparc3.attribution.activations import capture
from sparc3.circuits.select import parse_scope
from sparc3.evaluation.evaluate import prepare
from sparc3.evaluation.metrics import PerplexitySettings
from sparc3.evaluation.perplexity import make_windows, negative_log_likelihoods
from sparc3.evaluation.statistics import Evaluation, Observations, difference, measurement
from sparc3.experiment.prune_sequentially import BATCH_TOKENS, capture_layer_inputs
from sparc3.models.load import context_length, vocabulary_size
from sparc3.models.sites import Site, layers_of, sites_of
from sparc3.recipe.schema import CompressRecipe
from sparc3.samples.batches import encode, make_batches

BLOCK, DAMPING = 128, 0.01
READ_ALIKE = {
    "attn.q": ("attn.q", "attn.k", "attn.v"),
    "attn.o": ("attn.o",),
    "mlp.gate": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}
"""Role → the roles of the matrices that read the same input."""


def pruned(
    weight: Tensor, hessian: Tensor, *, fraction: float = 0.0, groups: tuple[int, int] | None = None
) -> Tensor:
    """The matrix [out, in] after SparseGPT.

    Args:
        hessian: Σ a aᵀ of its inputs [in, in].
        fraction: share of each block of columns that goes.
        groups: (n, m): instead, n of every m weights of a row.
    """
    w, h = weight.detach().double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        piece, u = w[:, start:end], root[start:end, start:end]
        scale, errors = u.diagonal(), torch.zeros_like(w[:, start:end])
        gone = torch.zeros_like(piece, dtype=torch.bool)
        if groups is None:
            saliency = piece.square() / scale.square()
            gone = saliency <= saliency.flatten().kthvalue(int(saliency.numel() * fraction)).values
        for i in range(end - start):
            if groups and i % groups[1] == 0:
                ahead = slice(i, i + groups[1])
                least = (piece[:, ahead].square() / scale[ahead].square()).topk(groups[0], 1, largest=False)
                gone[:, ahead] = torch.zeros_like(gone[:, ahead]).scatter_(1, least.indices, True)
            errors[:, i] = piece[:, i].masked_fill(~gone[:, i], 0) / scale[i]
            piece[:, i:] -= errors[:, i, None] * u[i, i:]
            piece[gone[:, i], i] = 0
        w[:, end:] -= errors @ root[start:end, end:]
    return w.to(weight.dtype)


@torch.no_grad()
def prune_(model: object, tokenizer: object, samples: ReferenceSet, recipe: CompressRecipe) -> None:
    """Prune the model's matrices for good, layer by layer."""
    sites = sites_of(model, recipe.attribution.sites)
    groups, fractions = parse_scope(recipe.compress.scope), recipe.compress.fractions
    encoded = encode(
        samples, tokenizer, "predicted", context=context_length(model), vocabulary=vocabulary_size(model)
    )
    flows = [
        capture_layer_inputs(model, batch)
        for batch in make_batches(encoded, BATCH_TOKENS, torch.device("cpu"))
    ]
    for index, layer in enumerate(layers_of(model)):
        began, here = time.perf_counter(), {site.role: site for site in sites if site.layer == index}
        for role, hessian in hessians(layer, here, flows).items():
            for site in (here[one] for one in READ_ALIKE[role] if one in here):
                site.weight.copy_(
                    pruned(site.weight, hessian, fraction=fractions[0] if fractions else 0.0, groups=groups)
                )
        for flow in flows:
            flow.hidden = flow.run_layer(layer)
        print(f"layer {index}: {time.perf_counter() - began:.1f} s", flush=True)


def hessians(layer: object, here: dict[str, Site], flows: Sequence[object]) -> dict[str, Tensor]:
    """Role → Σ a aᵀ over the tokens of all samples."""
    read = {
        role: here[role]
        for role, alike in READ_ALIKE.items()
        if role in here and any(one in here for one in alike)
    }
    sums = {role: torch.zeros(site.inp, site.inp) for role, site in read.items()}

    def add(role: str, a: Tensor) -> None:
        rows = a.reshape(-1, a.shape[-1])
        sums[role].addmm_(rows.T, rows)

    for flow in flows:
        with capture(read, flow.batch.mask(), add):
            flow.run_layer(layer)
    return sums


def beside(folder: Path, blocks: int) -> Iterator[tuple[str, Observations]]:
    """Perplexity on the first blocks of every variant that the run measured."""
    for path in sorted((folder / "evaluation").glob("*.json")):
        made = Evaluation.load(path)
        yield made.variant, first(next(o for o in made.observations if o.metric == "perplexity"), blocks)


def first(observed: Observations, blocks: int) -> Observations:
    return replace(observed, sums=observed.sums[:blocks], weights=observed.weights[:blocks])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=10, help="blocks of test text that are measured")
    parser.add_argument("--samples", type=int, help="only so many of the run's calibration samples")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = load_recipe(str(args.folder / "recipe.yaml"))
    assert isinstance(recipe, CompressRecipe)
    settings = recipe.metrics()["perplexity"]
    assert isinstance(settings, PerplexitySettings)
    torch.set_num_threads(1)
    model, tokenizer = load_model(recipe.model.id, dtype="float32", device="cpu")
    texts = prepare("perplexity", settings, model, tokenizer).samples
    windows = make_windows(texts, tokenizer, settings, context_length(model))[: args.blocks]
    others = dict(beside(args.folder, args.blocks))
    if any(len(o.sums) != len(windows) for o in others.values()):
        parser.error(f"{args.folder} was measured on other text, or on fewer than {args.blocks} blocks")
    samples = ReferenceSet.load(args.folder / "samples/general.jsonl").samples[: args.samples]
    prune_(model, tokenizer, ReferenceSet(samples), recipe)
    zeros = [float((site.weight == 0).double().mean()) for site in sites_of(model, recipe.attribution.sites)]
    print(f"zeros in a matrix: {min(zeros):.4%} to {max(zeros):.4%}")
    nll = negative_log_likelihoods(model, windows, progress=False)
    weights = tuple(float(predicted) for _, predicted in windows)
    found = Observations("perplexity", settings.split, "perplexity", "lower", tuple(nll), weights, 0, True)
    measured = [measurement(o, name) for name, o in {**others, "sparsegpt": found}.items()]
    differences = [difference(o, found, name, "sparsegpt") for name, o in others.items()]
    about = {
        "recipe": recipe.resolve(),
        "samples": len(samples),
        "zeros": [min(zeros), max(zeros)],
        "nll": {**{n: o.sums for n, o in others.items()}, "sparsegpt": nll},
    }
    Results(tuple(measured), tuple(d for d in differences if d), about).save(args.out)
    for one in measured:
        print(f"{one.variant:28} {one.value:.2f} {one.ci95} n={one.n}")
    for d in differences:
        print(d)


if __name__ == "__main__":
    main()
