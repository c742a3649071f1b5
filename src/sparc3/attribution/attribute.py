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
    epsilon: float = 0.0,
    words: str | Sequence[str | int] = (),
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
        epsilon: ε of LRP's rule on linear maps, R_{i←j} = a_i w_ji R_j / (z_j + ε sign z_j), for lrp, cp-lrp
            and relp; 0 is the limit.
        words: of the targets words and logwords: the words, each one token, with its leading space, or token
            ids; or a text file with one a line.
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
    asked = replace(Settings.of(options), sums_device=_device(sums_device))
    chosen, settings = settings_for(asked, roles)
    if shard and partial is None:
        raise UserError("a shard leaves its sums in a file; name it with partial=")
    where = sites_of(model, roles)
    if needs_weight(chosen, settings):
        for site in where:
            site.require_values()
    sums = Sums(settings)
    about: dict[str, Any] = {"model": describe(model), "samples_fingerprint": None}
    if chosen.run:
        references = ReferenceSet.of(samples)
        encoded = _encode_samples(model, references, tokenizer, chosen, settings, options)
        about["samples_fingerprint"] = references.fingerprint
        if tokenizer is not None and any(sample.written for sample in references):
            about["tokenizer"] = tokenizer_fingerprint(tokenizer)
        task = _make_task(settings, about, str(model.dtype), encoded, where, shard)
        budget = token_budget(batch_tokens, device_of(model).type)
        budget = room(model, _room_key(settings), budget) if batch_tokens == "auto" else budget
        share = distributed.stride([encoded[place] for place in task.share()])
        batches = make_batches(share, budget, device_of(model), rope_switches(model))
        keeper = PartialSums(Path(partial), task, save_every) if partial else None
        sums = _sum_batches(model, chosen, where, sums, batches, keeper, progress)
        if sums.samples == 0:
            raise Sparc3Error(
                f"none of the {len(references)} samples gave a finite relevance; load the model in bfloat16 "
                "or float32"
            )
    return _finish_scores(chosen, where, sums, roles, about)


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
    made_on = {key: value for key, value in task.model.items() if key not in ("tokenizer", "dtype")}
    chosen, sites = require_method(task.settings.method), task.stand_ins()
    if chosen.weighs or task.settings.unit == "weight":
        if model is None:
            raise UserError(
                f"{chosen.name} scores of {task.settings.unit}s need the values of the model's weights; name "
                "the model with --model"
            )
        if describe(model)["fingerprint"] != made_on["fingerprint"]:
            raise UserError(
                f"the shards were made on {made_on['id']}, whose weights differ from this model's; give "
                "that model"
            )
        sites = sites_of(model, {site.role for site in sites})
    about: dict[str, Any] = {"model": made_on, "samples_fingerprint": task.samples_fingerprint}
    if "tokenizer" in task.model:
        about["tokenizer"] = task.model["tokenizer"]
    return _finish_scores(chosen, sites, sums, tuple(dict.fromkeys(site.role for site in sites)), about)


def _encode_samples(
    model: "PreTrainedModel",
    references: ReferenceSet,
    tokenizer: "PreTrainedTokenizerBase | None",
    method: Method,
    settings: Settings,
    options: AttributionOptions,
) -> list[Encoded]:
    context, truncate = context_length(model), options.truncate
    # A method that looks at activations alone has no target, and asks the samples for none.
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
    if references.repeated and distributed.is_main():
        again = references.repeated
        log.warning("%d of %d samples repeat an earlier one and are counted again", again, len(references))
    if truncate and distributed.is_main():
        full = sum(len(e.ids) == context for e in encoded)
        log.info("%d of %d samples were cut to the model's context of %d tokens", full, len(encoded), context)
    return encoded


def _make_task(
    settings: Settings,
    about: dict[str, Any],
    dtype: str,
    encoded: list[Encoded],
    sites: list[Site],
    shard: tuple[int, int] | None,
) -> Task:
    model = {**about["model"], "dtype": dtype}
    if "tokenizer" in about:
        model["tokenizer"] = about["tokenizer"]
    tokens = fingerprint(
        [[e.ids, e.positions, e.tokens, e.against, *([e.among] if e.among else [])] for e in encoded]
    )
    shapes = tuple((site.name, site.role, site.layer, site.out, site.inp, site.heads) for site in sites)
    task = Task(settings, model, about["samples_fingerprint"], tokens, len(encoded), shapes, shard)
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
    of its size. Where a single sample does not fit, the next kind of checkpointing is tried."""
    assert method.run
    waiting, key = list(reversed(batches)), _room_key(sums.settings)
    automatic = sums.settings.gradient_checkpointing == "auto" and method.targeted
    kinds = _checkpointing_kinds(model) if automatic else [sums.settings.gradient_checkpointing]
    longest = max((length for batch in batches for length in batch.lengths), default=0)
    while len(kinds) > 1 and longest > room(model, f"{key}, one sample, {kinds[0]}", longest):
        kinds.pop(0)
    with Progress(sum(len(b.samples) for b in batches), method.name, "sample", show=progress) as bar:
        while waiting:
            settings = replace(sums.settings, gradient_checkpointing=kinds[0])
            try:
                # Closed here and now: the generator holds the model's patches, also where saving the sums
                # raises.
                with closing(method.run(model, _iterate_last(waiting), sites, settings, sums)) as running:
                    for done in running:
                        waiting.pop()
                        bar.update(len(done.samples))
                        if keeper:
                            keeper.after(done, sums)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                large, length = waiting[-1].ids.numel(), waiting[-1].lengths[0]
                if len(waiting[-1].samples) > 1:
                    remember(model, key, large // 2)
                    waiting = [part for batch in waiting for part in _halve_large(batch, large)]
                elif len(kinds) > 1:
                    remember(model, f"{key}, one sample, {kinds.pop(0)}", length - 1)
                    away = ", and their inputs wait on the CPU" if kinds[0] == "offload" else ""
                    said = "a sample of %d tokens does not fit into memory; layers are now computed twice%s"
                    log.info(said, length, away)
                else:
                    what = f"sample {waiting[-1].samples[0].index}, {length} tokens,"
                    raise too_large(what, error) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _room_key(settings: Settings) -> str:
    """The kind of work for which it is remembered how many tokens fit into memory at once."""
    return f"{settings.method} {settings.unit} {settings.neuron} {settings.target}"


def _checkpointing_kinds(model: "PreTrainedModel") -> list[bool | str]:
    """What `gradient_checkpointing` "auto" tries, the cheapest first."""
    plain: list[bool | str] = [] if is_offloaded(model) else [False]
    return [*plain, True, *(["offload"] if _elsewhere(model) else [])]


def _elsewhere(model: "PreTrainedModel") -> bool:
    """Whether the CPU's memory is another one than the model's."""
    return device_of(model).type != "cpu"


def _iterate_last(waiting: list[Batch]) -> Iterator[Batch]:
    """The last batch of the list, again and again, while whoever iterates takes what is done off its end."""
    while waiting:
        yield waiting[-1]


def _halve_large(batch: Batch, tokens: int) -> list[Batch]:
    """The batch, or, where it has this many tokens or more, its halves with the first one last."""
    return batch.halves()[::-1] if len(batch.samples) > 1 and batch.ids.numel() >= tokens else [batch]


def _device(name: str) -> str:
    """The full name of a device, after a trial allocation."""
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"sums_device is '{name}', which PyTorch does not support here; use cpu, or cuda if there is a "
            "GPU"
        ) from None


def _finish_scores(
    method: Method, sites: list[Site], sums: Sums, roles: tuple[str, ...], about: dict[str, Any]
) -> Scores:
    """The scores that the sums make. `about` is what the provenance says of the model and the samples."""
    values, settings = {}, sums.settings
    for site in sites:
        total = sums.totals.pop(site.name, torch.zeros(0, dtype=torch.float64))
        values[site.name] = method.finish(site, total, sums).to("cpu", torch.float32)
        if not all_finite(values[site.name]):
            raise NonFinite(
                f"the {method.name} scores of {site.name} are not finite; look at that weight, or load the "
                "model in float32"
            )
    said = {key: getattr(settings, key) for key in ("target", "neuron", "reduce", "skip_positions")}
    counts = {key: getattr(sums, key) for key in ("samples", "tokens", "targets", "skipped")}
    kind = {"method": settings.method, "unit": settings.unit, "sites_roles": list(roles)}
    said |= {name: value for name in ("epsilon", "words") if (value := getattr(settings, name))}
    return Scores(values, {**kind, **said, **counts, **about, "version": __version__})
