"""`attribute`: samples in, scores out. Batching, ranks and the final division are handled here, not by the
methods."""

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
    epsilon: float = 0.0,
    words: str | Sequence[str | int] = (),
    partial: str | Path | None = None,
    save_every: float = 60.0,
    shard: tuple[int, int] | None = None,
    progress: bool = False,
) -> Scores:
    """Score every unit of the sites on the samples.

    Args:
        samples: a ReferenceSet, texts, or token-id lists. The methods magnitude and random need none: pass an
            empty list.
        tokenizer: the model's own; not needed for token ids.
        method: lrp, cp-lrp, relp, gim, gradient, ig (ig:STEPS), wanda, activation, magnitude, random
            (random:SEED).
        unit: "neuron", "head" (sites must be attn.o) or "weight".
        sites: canonical roles.
        target: predicted, label, contrast, completion (completion:N), next, logprob, words, logwords; see
            docs/targets.md.
        neuron: "abs", Σ_j |R_W,ij| of each sample, or "signed", Σ_t ĝ_ti z_ti.
        reduce: "mean" over samples (Eq. 1), "mean_abs" (mean of absolute values), "abs_mean" (absolute value
            of the mean); of weights also "rms" (root mean square over all tokens of W_ij ĝ_ti a_tj), and of
            signed neurons (of ĝ_ti z_ti).
        batch_tokens: padded tokens in one forward pass; "auto" starts with a number that suits the device. A
            batch that does not fit into memory is halved.
        truncate: cut samples that are longer than the model's context instead of refusing them.
        skip_positions: number of positions at the start of each sample to leave out of the sum over
            positions: 1 for models with massive activations on the first token (docs/targets.md). The model
            still reads them, and targets there count.
        non_finite: "error", or "skip": leave out a sample whose relevance is not finite, and count it in the
            provenance. Unit weight has no "skip", because a sample cannot be removed from its running sums.
        gradient_checkpointing: True: decoder layers keep only their inputs and are computed again in the
            backward pass, which saves memory and takes about a third more time. "offload": these inputs also
            wait on the CPU, for very long samples on a GPU; on a CPU it is the same as True. "auto": turned
            on when a single sample does not fit into memory without it, and always True for a model with
            weights offloaded to the CPU.
        sums_dtype: dtype of the running sums of weight relevance, one number per weight: "float32",
            "float64", or "bfloat16", which halves the memory but loses small additions to a large sum.
        sums_device: device of these sums: the model's GPU if they fit there, else the CPU.
        epsilon: ε of LRP's rule on linear maps, R_{i←j} = a_i w_ji R_j / (z_j + ε sign z_j), for lrp, cp-lrp
            and relp; 0 is the limit.
        words: the words of the targets words and logwords: each a single token, with its leading space, or
            a token id; or a text file with one word per line.
        partial: a file for the sums so far. An interrupted call that is repeated with the same file resumes,
            and ends with the same scores; the file is removed at the end.
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
    values = {**arguments, "sites": roles}
    options = parse(AttributionOptions, {name: values[name] for name in AttributionOptions.model_fields}, "")
    requested = replace(Settings.from_options(options), sums_device=_resolve_device(sums_device))
    scoring_method, settings = settings_for(requested, roles)
    if shard and partial is None:
        raise UserError("a shard leaves its sums in a file; name it with partial=")
    model_sites = sites_of(model, roles)
    if needs_weight(scoring_method, settings):
        for site in model_sites:
            site.require_values()
    sums = Sums(settings)
    source_info: dict[str, Any] = {"model": describe(model), "samples_fingerprint": None}
    if scoring_method.run:
        references = ReferenceSet.of(samples)
        encoded = _encode_samples(model, references, tokenizer, scoring_method, settings, options)
        source_info["samples_fingerprint"] = references.fingerprint
        if tokenizer is not None and any(sample.has_text for sample in references):
            source_info["tokenizer"] = tokenizer_fingerprint(tokenizer)
        task = _make_task(settings, source_info, str(model.dtype), encoded, model_sites, shard)
        budget = token_budget(batch_tokens, device_of(model).type)
        budget = room(model, _room_key(settings), budget) if batch_tokens == "auto" else budget
        share = distributed.stride([encoded[index] for index in task.share()])
        batches = make_batches(share, budget, device_of(model), rope_switches(model))
        keeper = PartialSums(Path(partial), task, save_every) if partial else None
        sums = _sum_batches(model, scoring_method, model_sites, sums, batches, keeper, progress)
        if sums.samples == 0:
            raise Sparc3Error(
                f"none of the {len(references)} samples gave a finite relevance; load the model in bfloat16 "
                "or float32"
            )
    return _finish_scores(scoring_method, model_sites, sums, roles, source_info)


def merge(shards: Sequence[str | Path], *, model: "PreTrainedModel | None" = None) -> Scores:
    """The scores of a whole reference set, from the files that `attribute(shard=...)` left for each shard.

    Args:
        shards: the files of all shards, in any order.
        model: the model they were made on; needed for scores that use the weights' values (unit weight,
            Wanda).

    Raises:
        UserError: shards of different attributions, a shard given twice, missing or unfinished (each by
            name), or no model although one is needed.
        DamagedFile: the content is invalid or was changed.
    """
    task, sums = combine_shards(shards)
    model_info = {key: value for key, value in task.model.items() if key not in ("tokenizer", "dtype")}
    method, sites = require_method(task.settings.method), task.stand_ins()
    if method.weighs or task.settings.unit == "weight":
        if model is None:
            raise UserError(
                f"{method.name} scores of {task.settings.unit}s need the values of the model's weights; name "
                "the model with --model"
            )
        if describe(model)["fingerprint"] != model_info["fingerprint"]:
            raise UserError(
                f"the shards were made on {model_info['id']}, whose weights differ from this model's; name "
                "that model"
            )
        sites = sites_of(model, {site.role for site in sites})
    source_info: dict[str, Any] = {"model": model_info, "samples_fingerprint": task.samples_fingerprint}
    if "tokenizer" in task.model:
        source_info["tokenizer"] = task.model["tokenizer"]
    return _finish_scores(method, sites, sums, tuple(dict.fromkeys(site.role for site in sites)), source_info)


def _encode_samples(
    model: "PreTrainedModel",
    references: ReferenceSet,
    tokenizer: "PreTrainedTokenizerBase | None",
    method: Method,
    settings: Settings,
    options: AttributionOptions,
) -> list[Encoded]:
    context, truncate = context_length(model), options.truncate
    # Methods that need only activations have no target, so samples without one are fine.
    target, skip = settings.target if method.targeted else "predicted", settings.skip_positions
    vocabulary = vocabulary_size(model)
    encoded = encode(
        references,
        tokenizer,
        target,
        context=context,
        vocabulary=vocabulary,
        truncate=truncate,
        words=options.word_list,
    )
    for sample in encoded:
        if len(sample.ids) <= skip:
            raise UserError(
                f"sample {sample.index} has {len(sample.ids)} tokens, so skip_positions {skip} leaves none; "
                "skip fewer, or leave it out"
            )
    if references.repeats and distributed.is_main():
        repeats = references.repeats
        log.warning("%d of %d samples repeat an earlier one and count again", repeats, len(references))
    if truncate and distributed.is_main():
        cut = sum(len(e.ids) == context for e in encoded)
        log.info("%d of %d samples were cut to the model's context of %d tokens", cut, len(encoded), context)
    return encoded


def _make_task(
    settings: Settings,
    source_info: dict[str, Any],
    dtype: str,
    encoded: list[Encoded],
    sites: list[Site],
    shard: tuple[int, int] | None,
) -> Task:
    model = {**source_info["model"], "dtype": dtype}
    if "tokenizer" in source_info:
        model["tokenizer"] = source_info["tokenizer"]
    tokens = fingerprint(
        [[e.ids, e.positions, e.tokens, e.against, *([e.among] if e.among else [])] for e in encoded]
    )
    shapes = tuple((site.name, site.role, site.layer, site.out, site.inp, site.heads) for site in sites)
    task = Task(settings, model, source_info["samples_fingerprint"], tokens, len(encoded), shapes, shard)
    if shard and not task.share():
        raise UserError(
            f"only {len(encoded)} samples were given, so shard {shard[0]}/{shard[1]} has none; use "
            "fewer shards"
        )
    return task


def _sum_batches(
    model: "PreTrainedModel",
    method: Method,
    sites: list[Site],
    sums: Sums,
    batches: list[Batch],
    partial_sums: PartialSums | None,
    progress: bool,
) -> Sums:
    """The sums over all batches of all ranks."""
    if partial_sums:
        batches = partial_sums.skip_done(batches, partial_sums.begin(sums))
    with partial_sums.finish_batch_first() if partial_sums else nullcontext():
        _run_batches(model, method, sites, sums, batches, partial_sums, progress)
    total = sums.sum_over_ranks([site.name for site in sites])
    if partial_sums:
        partial_sums.end(total)
    return total


def _run_batches(
    model: "PreTrainedModel",
    method: Method,
    sites: list[Site],
    sums: Sums,
    batches: list[Batch],
    partial_sums: PartialSums | None,
    progress: bool,
) -> None:
    """Run the method over all batches. A batch that does not fit into memory is halved, and so are later ones
    of its size. If a single sample does not fit, the next checkpointing mode is tried."""
    assert method.run
    waiting, key = list(reversed(batches)), _room_key(sums.settings)
    automatic = sums.settings.gradient_checkpointing == "auto" and method.targeted
    modes = _checkpointing_kinds(model) if automatic else [sums.settings.gradient_checkpointing]
    longest = max((length for batch in batches for length in batch.lengths), default=0)
    while len(modes) > 1 and longest > room(model, f"{key}, one sample, {modes[0]}", longest):
        modes.pop(0)
    with Progress(sum(len(b.samples) for b in batches), method.name, "sample", show=progress) as bar:
        while waiting:
            settings = replace(sums.settings, gradient_checkpointing=modes[0])
            try:
                # Close at once, also if saving the sums raises: until then the generator keeps the model
                # patched.
                with closing(method.run(model, _iterate_last(waiting), sites, settings, sums)) as running:
                    for batch in running:
                        waiting.pop()
                        bar.update(len(batch.samples))
                        if partial_sums:
                            partial_sums.record(batch, sums)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                tokens, length = waiting[-1].ids.numel(), waiting[-1].lengths[0]
                if len(waiting[-1].samples) > 1:
                    remember(model, key, tokens // 2)
                    waiting = [part for batch in waiting for part in _halve_large(batch, tokens)]
                elif len(modes) > 1:
                    remember(model, f"{key}, one sample, {modes.pop(0)}", length - 1)
                    suffix = ", and their inputs wait on the CPU" if modes[0] == "offload" else ""
                    message = "a sample of %d tokens does not fit into memory; layers are now computed twice"
                    log.info(message + suffix, length)
                else:
                    sample = f"sample {waiting[-1].samples[0].index}, {length} tokens,"
                    raise too_large(sample, error) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _room_key(settings: Settings) -> str:
    """The key under which `remember` keeps how many tokens fit into memory for this kind of work."""
    return f"{settings.method} {settings.unit} {settings.neuron} {settings.target}"


def _checkpointing_kinds(model: "PreTrainedModel") -> list[bool | str]:
    """The modes that `gradient_checkpointing="auto"` tries, the fastest first."""
    modes: list[bool | str] = [] if is_offloaded(model) else [False]
    return [*modes, True, *(["offload"] if _has_own_memory(model) else [])]


def _has_own_memory(model: "PreTrainedModel") -> bool:
    """Whether the model's device has memory apart from the CPU's."""
    return device_of(model).type != "cpu"


def _iterate_last(waiting: list[Batch]) -> Iterator[Batch]:
    """The last batch of the list, until the list is empty; the caller removes each batch when it is done."""
    while waiting:
        yield waiting[-1]


def _halve_large(batch: Batch, tokens: int) -> list[Batch]:
    """The batch, or its halves if it has this many tokens or more, with the first half last."""
    return batch.halves()[::-1] if len(batch.samples) > 1 and batch.ids.numel() >= tokens else [batch]


def _resolve_device(name: str) -> str:
    """The full name of a device, such as "cuda:0", after a trial allocation."""
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"sums_device is '{name}', which PyTorch does not support here; use cpu, or cuda if there is a "
            "GPU"
        ) from None


def _finish_scores(
    method: Method, sites: list[Site], sums: Sums, roles: tuple[str, ...], source_info: dict[str, Any]
) -> Scores:
    """The scores from the sums. `source_info` is the part of the provenance on the model and the samples."""
    values, settings = {}, sums.settings
    for site in sites:
        total = sums.totals.pop(site.name, torch.zeros(0, dtype=torch.float64))
        values[site.name] = method.finish(site, total, sums).to("cpu", torch.float32)
        if not all_finite(values[site.name]):
            raise NonFinite(
                f"the {method.name} scores of {site.name} are not finite; look at that weight, or load the "
                "model in float32"
            )
    provenance = {key: getattr(settings, key) for key in ("target", "neuron", "reduce", "skip_positions")}
    counts = {key: getattr(sums, key) for key in ("samples", "tokens", "targets", "skipped")}
    kind = {"method": settings.method, "unit": settings.unit, "sites_roles": list(roles)}
    provenance |= {name: value for name in ("epsilon", "words") if (value := getattr(settings, name))}
    return Scores(values, {**kind, **provenance, **counts, **source_info, "version": __version__})
