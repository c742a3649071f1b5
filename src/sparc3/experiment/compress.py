"""Compression layer by layer: each layer is scored on what the already pruned layers before it give
(sequential Wanda)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__, distributed
from ..attribution.activations import capture
from ..attribution.methods import require_method
from ..attribution.patching import frozen
from ..circuits.ablate import ablated
from ..circuits.circuit import Circuit
from ..circuits.select import parse_scope, select, share_of
from ..errors import Sparc3Error, UserError
from ..evaluation.evaluate import evaluated_on, to_results
from ..evaluation.statistics import Evaluation
from ..models.families import ROLES
from ..models.fingerprint import describe
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..models.sites import Site, family_of, layers_of, sites_of
from ..progress import Progress
from ..recipe.sections import SEQUENTIAL, Compress
from ..results import Check, Provenance, Results, Stage, Variant
from ..samples.batches import Batch, encode, make_batches
from ..samples.reference_set import ReferenceSet, Sample
from ..scores import Scores
from ..storage import fingerprint
from .measure import load_or_make_evaluation
from .run_folder import RunContext, load_or_make
from .sample_counts import by_samples
from .score import ScoringSpec, load_or_make_parts
from .sizes import prunings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH_TOKENS = 2048
"""Padded tokens that run through a layer at once."""


def prune_sequentially(
    model: "PreTrainedModel",
    samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    fraction: float | None = None,
    scope: str = "row",
    sites: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    truncate: bool = False,
    progress: bool = False,
) -> Circuit:
    """The weights that Wanda's own code would remove (Sun et al. 2024): layer after layer, by |W_ij| · ‖a_j‖₂
    with the activations of the model without what was removed before. Inside a layer all sites see the layer
    as it was.

    One pass over the layers, each run twice; the hidden states of all samples are held at once. The model is
    afterwards as it was.

    Args:
        samples: as in `attribute`.
        tokenizer: as in `attribute`.
        truncate: as in `attribute`.
        fraction: the share of every output row, or of every site.
        scope: "row", "site", or "n:m" without a fraction.
        sites: canonical roles; all that the model has where none is given.
        batch_tokens: padded tokens that run through a layer at once.

    Returns:
        a circuit of weights, to be given to `ablated`, `ablate_` or `export`.

    Raises:
        UserError: as `attribute` and `select` do.
    """
    if scope == "global":
        raise UserError(
            "sequential pruning works one layer at a time, so it has no scope global; use row, site, "
            "or n:m such as 2:4"
        )
    references = ReferenceSet.of(samples)
    where = sites_of(model, sites or [role for role in ROLES if role in family_of(model).roles])
    encoded = encode(
        references,
        tokenizer,
        "predicted",
        context=context_length(model),
        vocabulary=vocabulary_size(model),
        truncate=truncate,
    )
    described = describe(model)
    members: dict[str, Tensor] = {}
    with frozen(model), torch.no_grad(), ExitStack() as removed:
        flows = [
            capture_layer_inputs(model, batch)
            for batch in make_batches(
                distributed.stride(encoded), batch_tokens, device_of(model), rope_switches(model)
            )
        ]
        layers = list(layers_of(model))
        shown = removed.enter_context(Progress(len(layers), "pruning", "layer", show=progress))
        for index, layer in enumerate(shown.each(layers)):
            scores = layer_scores(layer, [site for site in where if site.layer == index], flows, described)
            part = select(scores, fraction=fraction, scope=scope)
            members |= part.members
            removed.enter_context(ablated(model, part))
            for flow in flows:
                flow.hidden = flow.through(layer)
    return Circuit(
        "weight",
        members,
        described,
        {
            "selection": {"fraction": fraction, "scope": scope, "order": "lowest", "sequential": True},
            "scores": {
                "method": "wanda",
                "unit": "weight",
                "samples": len(encoded),
                "samples_fingerprint": references.fingerprint,
            },
            "sizes": {site.name: site.out * site.inp for site in where},
            "version": __version__,
        },
    )


@dataclass
class _LayerFlow:
    """One batch on its way through the layers.

    Attributes:
        hidden: [B, T, hidden], what enters the next layer.
        others: layer → the other arguments that the model gives it (masks, position embeddings).
    """

    batch: Batch
    hidden: Tensor
    others: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]

    def through(self, layer: nn.Module) -> Tensor:
        args, kwargs = self.others[layer]
        output = layer(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def capture_layer_inputs(model: "PreTrainedModel", batch: Batch) -> _LayerFlow:
    """What the model gives to its layers, seen in one forward pass."""
    layers = list(layers_of(model))
    first: list[Tensor] = []
    others: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not first:
            first.append(hidden)
        others[layer] = args[1:], kwargs

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model.base_model(input_ids=batch.ids, use_cache=False)
    return _LayerFlow(batch, first[0], others)


def layer_scores(
    layer: nn.Module, sites: list[Site], flows: list[_LayerFlow], described: dict[str, str]
) -> Scores:
    """|W_ij| · ‖a_j‖₂ of one layer's sites, over the tokens of all samples and ranks."""
    squares = {site.name: torch.zeros(site.inp, dtype=torch.float64) for site in sites}
    by_name = {site.name: site for site in sites}
    for flow in flows:
        mask = flow.batch.mask()

        def receive(name: str, a: Tensor, mask: Tensor = mask) -> None:
            squares[name] += a[mask.to(a.device)].square().sum(0).cpu()

        with capture(by_name, mask, receive):
            flow.through(layer)
    distributed.sum_(squares.values())
    values = {
        site.name: site.weight.detach()
        .to("cpu", torch.float32, copy=True)
        .abs_()
        .mul_(squares[site.name].sqrt().float())
        for site in sites
    }
    return Scores(values, {"unit": "weight", "method": "wanda", "model": described})


# The job `compress`: the least weights of every row go, by each method; what is left is counted in the
# matrices and measured.


log = logging.getLogger("sparc3")
Pruned = list[tuple[str, Path]]
"""Variant → where its circuit is: those of a large model are read one at a time."""


def settings(work: RunContext) -> Compress:
    assert work.recipe.job == "compress"
    return work.recipe.compress


def prune_by_all_methods(work: RunContext) -> Pruned:
    """What each method removes at each fraction, saved as circuits/METHOD@COUNT.safetensors for `sparc3
    ablate`."""
    found: Pruned = []
    for name, method, reduce in prunings_of(settings(work), sampled=False):
        for fraction in settings(work).fractions or (None,):
            where, circuit = (
                _prune_layer_by_layer(work, fraction)
                if method == SEQUENTIAL
                else _prune_at_once(work, name, method, reduce, fraction)
            )
            log.info("%s: %d weights in %d sites", name, len(circuit), len(circuit.members))
            found.append((str(Variant(name, len(circuit))), where))
    return found


def _prune_at_once(
    work: RunContext, name: str, method: str, reduce: str, fraction: float | None
) -> tuple[Path, Circuit]:
    scores = _load_or_make_scores(work, method, reduce)
    scope = settings(work).scope
    made_from = fingerprint(
        {"scores": scores.fingerprint, "fraction": fraction, "scope": scope, "version": __version__}
    )
    return _load_or_make_circuit(
        work, name, fraction, made_from, lambda: select(scores, fraction=fraction, scope=scope)
    )


def _load_or_make_scores(work: RunContext, method: str, reduce: str) -> Scores:
    asked = work.recipe.attribution.but(method=method, reduce=reduce)
    how = ScoringSpec(asked, {"general": work.recipe.references["general"].target or asked.target})
    place = f"{reduce}." if require_method(method).targeted else ""
    return load_or_make_parts(work, how, place=place)["general"]


def _prune_layer_by_layer(work: RunContext, fraction: float | None) -> tuple[Path, Circuit]:
    asked, scope = work.recipe.attribution, settings(work).scope
    made_from = fingerprint(
        {
            "model": work.fingerprint,
            "samples": work.references["general"].fingerprint,
            "sites": asked.sites,
            "fraction": fraction,
            "scope": scope,
            "truncate": asked.truncate,
            "version": __version__,
        }
    )
    return _load_or_make_circuit(
        work,
        SEQUENTIAL,
        fraction,
        made_from,
        lambda: prune_sequentially(
            work.model,
            work.references["general"],
            tokenizer=work.tokenizer,
            fraction=fraction,
            scope=scope,
            sites=asked.sites,
            truncate=asked.truncate,
            progress=work.progress,
        ),
    )


def _load_or_make_circuit(
    work: RunContext, name: str, fraction: float | None, made_from: str, make: Any
) -> tuple[Path, Circuit]:
    size = settings(work).scope.replace(":", "of") if fraction is None else f"{fraction:g}"
    name = f"circuits/{name}-{size}.safetensors"

    def mark() -> Circuit:
        made: Circuit = make()
        return replace(made, model=work.described, provenance={**made.provenance, "made_from": made_from})

    made = load_or_make(work, name, made_from, Circuit.load, lambda c: c.provenance.get("made_from"), mark)
    return work.folder / name, made


def measure_pruned(work: RunContext, pruned: Pruned, seconds: Mapping[str, float]) -> Results:
    found = [load_or_make_evaluation(work, "original", Circuit("weight", {}, work.described))]
    checks = []
    sizes: dict[str, int] = {}
    for variant, where in pruned:
        circuit = Circuit.load(where)
        sizes = sizes or dict(circuit.provenance["sizes"])
        found.append(load_or_make_evaluation(work, variant, circuit))
        checks.append(_every_row(work, found[-1], circuit))
    by_number, drawn = by_samples(work, prunings_of(settings(work), sampled=True))
    sizes = sizes or {
        site.name: site.out * site.inp for site in sites_of(work.model, work.recipe.attribution.sites)
    }
    provenance = _provenance(work, sizes, checks, seconds, drawn if by_number else {})
    return to_results([*found, *by_number], provenance.to_dict())


def _every_row(work: RunContext, evaluation: Evaluation, circuit: Circuit) -> Check:
    """A check: the least and the most zeros of any row are what was asked for. Other scopes are told, not
    judged.

    Raises:
        Sparc3Error: a row has fewer zeros than it should, so the figures would be of another model than they
            say.
    """
    least, most = (_samples_figure(evaluation, f"sparsity.row_{end}") for end in ("min", "max"))
    name, value = f"zeros in a row, {evaluation.variant}", f"{least:.4%} to {most:.4%}"
    groups, fraction = parse_scope(settings(work).scope), circuit.provenance["selection"].get("fraction")
    elsewhere = set(evaluated_on(work.prepared)["metrics"]["sparsity"]["sites"]) != set(
        work.recipe.attribution.sites
    )
    if elsewhere or (groups is None and settings(work).scope != "row"):
        return Check(name, value, None)
    columns = {mask.shape[1] for mask in circuit.members.values()}
    asked = {(groups[0] / groups[1]) if groups else share_of(fraction, width) / width for width in columns}
    if least < min(asked) - 1e-9:
        raise Sparc3Error(
            f"{evaluation.variant} has a row with {least:.4%} zeros where {min(asked):.4%} were to be "
            "removed; report this"
        )
    return Check(name, value, most <= max(asked) + 1e-9)


def _samples_figure(evaluation: Evaluation, metric: str) -> float:
    return float(next(o.sums[0] or 0.0 for o in evaluation.observations if o.metric == metric))


def _provenance(
    work: RunContext,
    sizes: dict[str, int],
    checks: list[Check],
    seconds: Mapping[str, float],
    drawn: Mapping[str, Any],
) -> Provenance:
    return Provenance(
        recipe=work.recipe.name,
        job="compress",
        made_from=work.recipe.fingerprint,
        model=work.described,
        method=work.recipe.attribution.method,
        unit="weight",
        scope=settings(work).scope,
        sizes=sizes,
        **evaluated_on(work.prepared),
        checks=checks,
        stages=[Stage(name, took) for name, took in seconds.items()],
        warnings=work.warnings,
        version=__version__,
        **drawn,
    )
