"""`attribute`: samples in, scores out. Batching, sharing the work among ranks and reducing belong here and to
no method."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, distributed
from ..errors import NonFinite, Sparc3Error, UserError
from ..models.fingerprint import describe, tokenizer_fingerprint
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.memory import out_of_memory, remember, room, too_large
from ..models.offloading import device_of, is_offloaded
from ..models.sites import Site, sites_of
from ..progress import Progress
from ..samples.batches import Batch, Encoded, encode, make_batches, token_budget
from ..samples.reference_set import ReferenceSet, Sample
from ..scores import Scores
from ..settings import parse
from ..storage import fingerprint
from .methods import Method, needs_weight, require_method, settings_for
from .options import AttributionOptions
from .partial_sums import PartialSums, Task, combine_shards
from .sums import Settings, Sums, all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")


def attribute(
    model: "PreTrainedModel",
    samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: str = "lrp",
    unit: str = "neuron",
    sites: Sequence[str] = ("mlp.up",),
    target: str = "predicted",
    neuron: str = "abs",
    reduce: str = "mean",
    batch_tokens: int | str = "auto",
    truncate: bool = False,
    skip_positions: int = 0,
    non_finite: str = "error",
    gradient_checkpointing: bool | str = "auto",
    sums_dtype: str = "float32",
    sums_device: str = "cpu",
    partial: str | Path | None = None,
    save_every: float = 60.0,
    shard: tuple[int, int] | None = None,
    progress: bool = False,
) -> Scores:
    """Score every unit of the sites on the samples.

    Args:
        samples: a ReferenceSet, texts, or token-id lists. The methods magnitude and random use none: pass an
            empty list.
        tokenizer: the model's own; not needed for token ids.
        method: lrp, cp-lrp, gradient, wanda, activation, magnitude, random (random:SEED).
        unit: "neuron", "head" (sites must be attn.o) or "weight".
        sites: canonical roles.
        target: predicted, label, contrast, completion (completion:N), next; see docs/targets.md.
        neuron: "abs", Σ_j |R_W,ij| of each sample, or "signed", Σ_t ĝ_ti z_ti.
        reduce: "mean" over samples (Eq. 1), "mean_abs" (mean of absolute values), "abs_mean" (absolute value
            of the mean).
        batch_tokens: padded tokens in one forward pass; "auto" starts from what suits the device. A batch
            that does not fit into memory is halved.
        truncate: cut samples that are longer than the model's context instead of refusing them.
        skip_positions: number of positions at the start of each sample to leave out of the sum over
            positions: 1 for models with massive activations on the first token (docs/targets.md). The model
            still reads them, and targets there count.
        non_finite: "error", or "skip": leave a sample out whose relevance is not finite, and count it in the
            provenance. Relevance of weights streams into its sums, so for it there is no skip.
        gradient_checkpointing: True: decoder layers keep only their inputs and are computed again in the
            backward pass, which saves memory and takes about a third more time. "offload": these inputs also
            wait on the CPU, for very long samples on a GPU; on a CPU it is the same as True. "auto": turned
            on when a single sample does not fit into memory without it, and always True for a model with
            weights offloaded to the CPU.
        sums_dtype: of the running sums of weight relevance, one number a weight: "float32", "float64", or
            "bfloat16", which is half the memory and rounds away what many samples add little by little.
        sums_device: where they are; on the model's own GPU if they fit there, else on the CPU.
        partial: a file for the sums so far. An interrupted call that is repeated with it resumes, and ends
            with the same scores; the file is removed at the end.
        save_every: seconds between two savings of the sums; more where they are so large that saving would
            take over 5 % of the time.
        shard: (2, 3) looks at the second third of the samples only (every third from the second on), and
            leaves its sums in `partial`, for `merge`. The scores returned are those of that share.
        progress: show a progress bar on a terminal, and elsewhere log a line a minute.

    Returns:
        Scores, one float32 tensor a site: [out] for neurons, [heads] for heads, [out, in] for weights,
            however the module stores them.

    Raises:
        UserError: an unknown name, samples that do not fit the model or the target, no sample left, or scores
            that need the values of quantised weights.
        UnsupportedModel: a module without a rule.
        NonFinite: a NaN or Inf, named by sample and site.
    """
    arguments = locals().copy()  # first, while there is nothing else among them
    roles = (sites,) if isinstance(sites, str) else tuple(sites)
    given = {**arguments, "sites": roles}
    options = parse(AttributionOptions, {name: given[name] for name in AttributionOptions.model_fields}, "")
    requested = replace(Settings.of(options), sums_device=_device(sums_device))
    chosen, settings = settings_for(requested, roles)
    where = sites_of(model, roles)
    if needs_weight(chosen, settings):
        for site in where:
            site.require_values()
    sums, described, references, reader = Sums(settings), describe(model), None, None
    if chosen.run:
        references = ReferenceSet.of(samples)
        encoded = _encode_samples(model, references, tokenizer, chosen, settings, truncate)
        _log_samples(references, encoded, truncate, context_length(model))
        if tokenizer is not None and any(sample.written for sample in references):
            reader = tokenizer_fingerprint(tokenizer)
        task = _make_task(settings, described, model, reader, references, encoded, where, shard)
        share, budget = (
            _samples_of_shard(encoded, task, partial),
            token_budget(batch_tokens, device_of(model).type),
        )
        budget = room(model, _room_key(settings), budget) if batch_tokens == "auto" else budget
        batches = make_batches(distributed.stride(share), budget, device_of(model), rope_switches(model))
        sums = _sum_batches(
            model,
            chosen,
            where,
            sums,
            batches,
            PartialSums(Path(partial), task, save_every) if partial else None,
            progress,
        )
        if sums.samples == 0:
            raise Sparc3Error(
                f"none of the {len(references)} samples gave a finite relevance; load the model in bfloat16 "
                "or float32"
            )
    digest = references.fingerprint if references else None
    about = _provenance(described, reader, settings, roles, sums, digest)
    return _finish_scores(chosen, where, sums, about)


def merge(shards: Sequence[str | Path], *, model: "PreTrainedModel | None" = None) -> Scores:
    """The scores of a whole reference set, of the files that `attribute(shard=...)` left for each share of
    it.

    Args:
        shards: the files of all shards, in any order.
        model: the model they were made on; needed for scores that are made of the weights' values (unit
            weight, Wanda).

    Raises:
        UserError: shards of different attributions, one twice, one missing or not finished (each by name); no
            model where one is needed.
        DamagedFile: a file that is not as it was written.
    """
    task, sums = combine_shards(shards)
    settings, described = task.settings, dict(task.model)
    reader = described.pop("tokenizer", None)
    described.pop("dtype", None)
    chosen = require_method(settings.method)
    sites = task.stand_ins()
    if chosen.weighs or settings.unit == "weight":
        if model is None:
            raise UserError(
                f"{settings.method} scores of {settings.unit}s need the values of the model's weights; name "
                "the model with --model"
            )
        if describe(model)["fingerprint"] != described["fingerprint"]:
            raise UserError(
                f"the shards were made on {described['id']}, whose weights differ from this model's; give "
                "that model"
            )
        sites = sites_of(model, {site.role for site in sites})
    roles = tuple(dict.fromkeys(site.role for site in sites))
    return _finish_scores(
        chosen, sites, sums, _provenance(described, reader, settings, roles, sums, task.samples_fingerprint)
    )


def _encode_samples(
    model: "PreTrainedModel",
    references: ReferenceSet,
    tokenizer: "PreTrainedTokenizerBase | None",
    method: Method,
    settings: Settings,
    truncate: bool,
) -> list[Encoded]:
    # A method that looks at activations alone has no target, and asks the samples for none.
    asked = settings.target if method.targeted else "predicted"
    encoded = encode(
        references,
        tokenizer,
        asked,
        context=context_length(model),
        vocabulary=vocabulary_size(model),
        truncate=truncate,
    )
    _require_longer(encoded, settings.skip_positions)
    return encoded


def _finish_scores(method: Method, sites: list[Site], sums: Sums, provenance: dict[str, Any]) -> Scores:
    empty = torch.zeros(0, dtype=torch.float64)
    values = {
        site.name: method.finish(site, sums.totals.pop(site.name, empty), sums).to("cpu", torch.float32)
        for site in sites
    }
    for name, tensor in values.items():
        if not all_finite(tensor):
            raise NonFinite(
                f"the {method.name} scores of {name} are not finite; look at that weight, or load the model "
                "in float32"
            )
    return Scores(values, provenance)


def _make_task(
    settings: Settings,
    described: dict[str, str],
    model: "PreTrainedModel",
    reader: str | None,
    references: ReferenceSet,
    encoded: list[Encoded],
    sites: list[Site],
    shard: tuple[int, int] | None,
) -> Task:
    tokens = fingerprint([[e.ids, e.positions, e.tokens, e.against] for e in encoded])
    shapes = tuple((site.name, site.role, site.layer, site.out, site.inp, site.heads) for site in sites)
    return Task(
        settings,
        {**described, "dtype": str(model.dtype), **({"tokenizer": reader} if reader else {})},
        references.fingerprint,
        tokens,
        len(encoded),
        shapes,
        shard,
    )


def _samples_of_shard(encoded: list[Encoded], task: Task, partial: str | Path | None) -> list[Encoded]:
    """The samples of the task's shard. Raises UserError where there is none, or nowhere to leave its sums."""
    if task.shard is None:
        return encoded
    if partial is None:
        raise UserError("a shard leaves its sums in a file; name it with partial=")
    if not task.share():
        raise UserError(
            f"only {len(encoded)} samples were given, so shard {task.shard[0]}/{task.shard[1]} has none; use "
            "fewer shards"
        )
    return [encoded[place] for place in task.share()]


def _sum_batches(
    model: "PreTrainedModel",
    method: Method,
    sites: list[Site],
    sums: Sums,
    batches: list[Batch],
    keeper: PartialSums | None,
    progress: bool,
) -> Sums:
    """The sums over all batches of all ranks."""
    if keeper:
        batches = keeper.skip_done(batches, keeper.begin(sums))
    with keeper.listening() if keeper else nullcontext():
        _run_batches(model, method, sites, sums, batches, keeper, progress)
    whole = sums.over_ranks([site.name for site in sites])
    if keeper:
        keeper.end(whole)
    return whole


def _log_samples(references: ReferenceSet, encoded: list[Encoded], truncate: bool, context: int) -> None:
    """What the reader of the scores should know of the samples."""
    if references.repeated and distributed.is_main():
        log.warning(
            "%d of %d samples repeat an earlier one and are counted again",
            references.repeated,
            len(references),
        )
    if truncate and distributed.is_main():
        full = sum(len(e.ids) == context for e in encoded)
        log.info("%d of %d samples were cut to the model's context of %d tokens", full, len(encoded), context)


def _require_longer(encoded: list[Encoded], skip: int) -> None:
    """Raise UserError unless something of each sample is left after the positions that are skipped."""
    for sample in encoded:
        if len(sample.ids) <= skip:
            raise UserError(
                f"sample {sample.index} has {len(sample.ids)} tokens, so skip_positions {skip} leaves none; "
                "skip fewer, or leave it out"
            )


def _run_batches(
    model: "PreTrainedModel",
    method: Method,
    sites: list[Site],
    sums: Sums,
    batches: list[Batch],
    keeper: PartialSums | None,
    progress: bool,
) -> None:
    """Run the method over all batches; one that does not fit into memory is halved, and so are those to come
    of its size."""
    assert method.run
    waiting, settings = list(reversed(batches)), sums.settings
    automatic = settings.gradient_checkpointing == "auto" and method.targeted
    if automatic:
        longest = max((length for batch in batches for length in batch.lengths), default=0)
        settings = replace(settings, gradient_checkpointing=_least_checkpointing(model, settings, longest))
    with Progress(sum(len(b.samples) for b in batches), method.name, "sample", show=progress) as bar:
        while waiting:
            try:
                # Closed here and now: the generator holds the model's patches, also where saving the sums
                # raises.
                running = method.run(model, _iterate_last(waiting), sites, settings, sums)
                with closing(running):
                    for done in running:
                        waiting.pop()
                        bar.update(len(done.samples))
                        if keeper:
                            keeper.after(done, sums)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(waiting[-1].samples) > 1:
                    large = waiting[-1].ids.numel()
                    remember(model, _room_key(settings), large // 2)
                    waiting = [
                        half
                        for batch in waiting
                        for half in (reversed(batch.halves()) if _is_at_least(batch, large) else [batch])
                    ]
                elif automatic and (more := _more_checkpointing(model, settings)):
                    length = waiting[-1].lengths[0]
                    remember(model, _room_key_of_single(settings), length - 1)
                    settings = replace(settings, gradient_checkpointing=more)
                    log.info(
                        "a sample of %d tokens does not fit into memory; layers are now computed twice%s",
                        length,
                        ", and their inputs wait on the CPU" if more == "offload" else "",
                    )
                else:
                    raise too_large(
                        f"sample {waiting[-1].samples[0].index}, {waiting[-1].lengths[0]} tokens,", error
                    ) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _room_key(settings: Settings) -> str:
    """The kind of work for which it is remembered how many tokens fit into memory at once."""
    return f"{settings.method} {settings.unit} {settings.neuron} {settings.target}"


def _room_key_of_single(settings: Settings) -> str:
    """The kind of work for which it is remembered how many tokens of one sample fit."""
    return f"{_room_key(settings)}, one sample, {settings.gradient_checkpointing}"


def _more_checkpointing(model: "PreTrainedModel", settings: Settings) -> bool | str:
    """What to set `gradient_checkpointing` to when one sample alone does not fit; False where nothing is left
    to try."""
    if not settings.gradient_checkpointing:
        return True
    return "offload" if settings.gradient_checkpointing is True and _elsewhere(model) else False


def _elsewhere(model: "PreTrainedModel") -> bool:
    """Whether the CPU's memory is another one than the model's."""
    return device_of(model).type != "cpu"


def _least_checkpointing(model: "PreTrainedModel", settings: Settings, longest: int) -> bool | str:
    """The cheapest `gradient_checkpointing` under which a sample of this length has not run out of memory."""
    how: bool | str = is_offloaded(model)
    while longest > room(
        model, _room_key_of_single(tried := replace(settings, gradient_checkpointing=how)), longest
    ) and (more := _more_checkpointing(model, tried)):
        how = more
    return how


def _is_at_least(batch: Batch, tokens: int) -> bool:
    return len(batch.samples) > 1 and batch.ids.numel() >= tokens


def _iterate_last(waiting: list[Batch]) -> Iterator[Batch]:
    """The last batch of the list, again and again, while whoever iterates takes what is done off its end."""
    while waiting:
        yield waiting[-1]


def _device(name: str) -> str:
    """The full name of a device, after a trial allocation."""
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"sums_device is '{name}', which PyTorch does not support here; use cpu, or cuda if there is a "
            "GPU"
        ) from None


def _provenance(
    model: dict[str, str],
    reader: str | None,
    settings: Settings,
    roles: tuple[str, ...],
    sums: Sums,
    samples_fingerprint: str | None,
) -> dict[str, Any]:
    return {
        "method": settings.method,
        "unit": settings.unit,
        "sites_roles": list(roles),
        "target": settings.target,
        "neuron": settings.neuron,
        "reduce": settings.reduce,
        "skip_positions": settings.skip_positions,
        "samples": sums.samples,
        "tokens": sums.tokens,
        "targets": sums.targets,
        "skipped": sums.skipped,
        "model": model,
        "samples_fingerprint": samples_fingerprint,
        **({"tokenizer": reader} if reader else {}),
        "version": __version__,
    }
