"""The samples stage: reference sets, test samples, and a search's validation samples, without a prompt in two
of them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attribution.options import WordsBy
from ..errors import UserError
from ..evaluation.evaluate import prepare
from ..evaluation.metrics import (
    FluencySettings,
    MetricSettings,
    PerplexitySettings,
    Prepared,
    PromptSettings,
    SampledSettings,
    ToxicitySettings,
    require_metric,
)
from ..evaluation.scorers import make_scorer
from ..evaluation.tasks import response_scores
from ..evaluation.toxicity import completion_scores
from ..recipe.schema import CorrectRecipe, Recipe
from ..recipe.sections import Reference
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.sources import Score, corpus, gather, is_path, overlap, request_for
from ..samples.tokens import token_text
from ..storage import file_digest
from ..verdict import FLUENCY_MARGIN
from .run_folder import RunContext, load_or_make
from .seeds import reference_sets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
GRAM = 12
"""Two texts that share this many consecutive tokens are treated as overlapping."""


def gather_all(work: RunContext) -> None:
    """Fill work.references and work.prepared, and for a search work.budget and work.aim. Raises UserError if
    they share a prompt."""
    for name, spec in reference_sets(work.recipe):
        work.references[name] = _load_or_make_reference(work, name, spec)
    for name, settings in work.recipe.metrics().items():
        source = settings.source if isinstance(settings, SampledSettings) else ""
        taken = collect_prompts(work.recipe, work.references, source)
        work.prepared.append(_prepare_metric(work, f"evaluation-{name}", name, settings, taken))
    for prepared in (p for p in work.prepared if p.metric.prompts):
        for name, reference in work.references.items():
            if shared := overlap(reference, prepared.samples):
                raise UserError(
                    f"{len(shared)} prompts of evaluation.{prepared.metric.name} are also in "
                    f"references.{name}; an effect must be shown on prompts that were not used to find the "
                    "circuit: give another file, or a split or choose_by that keeps them apart"
                )
    if work.recipe.tune:
        _prepare_validation(work)


def find_words(tokenizer: "PreTrainedTokenizerBase", request: WordsBy) -> tuple[str, ...]:
    """The words that a recipe requests, each with its leading space. Raises UserError if there are none."""
    texts = [token_text(tokenizer, token) for token in range(len(tokenizer))]
    candidates = [text for text in texts if text[:1] == " " and text[1:].isalpha() and len(text) > 3]
    scores = make_scorer(request.scorer)([word.strip() for word in candidates])
    words = [
        word for word, score in zip(candidates, scores, strict=True) if score and score >= request.min_score
    ]
    if not words:
        raise UserError(
            f"no word of the tokenizer is rated {request.min_score:g} or more by {request.scorer}; lower "
            "attribution.words.min_score"
        )
    log.info("words: %d that %s rates %g or more", len(words), request.scorer, request.min_score)
    return tuple(words)


def collect_prompts(recipe: Recipe, sets: Mapping[str, ReferenceSet], source: str) -> frozenset[str]:
    """The prompts in the reference sets that come from `source`."""
    matching = [
        samples
        for name, samples in sets.items()
        if recipe.references[name.partition(".")[0]].source == source
    ]
    return frozenset(sample.words for samples in matching for sample in samples if sample.words)


def collect_taken(recipe: Recipe, sets: Mapping[str, ReferenceSet], name: str, source: str) -> frozenset[str]:
    """The prompts that the reference set `name` must not use, because an earlier set of the same source has
    them. Seeds of one set are drawn independently of each other, and in the other jobs so are all sets."""
    if recipe.job != "correct":
        return frozenset()
    base = name.partition(".")[0]
    others = {other: samples for other, samples in sets.items() if other.partition(".")[0] != base}
    return collect_prompts(recipe, others, source)


def score_by_model(
    spec: Any, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", progress: bool = False
) -> Score:
    """The scores by which a set with choose_by completion or repetition is chosen: the model's own completion
    of each prompt, with its toxicity or its RUR."""
    if spec.choose_by == "repetition":
        return response_scores(model, tokenizer, spec.max_new_tokens, progress)
    settings = ToxicitySettings(scorer=spec.scorer, max_new_tokens=spec.max_new_tokens, source=spec.source)
    return completion_scores(model, tokenizer, settings, progress)


def _load_or_make_reference(work: RunContext, name: str, spec: Reference) -> ReferenceSet:
    taken = collect_taken(work.recipe, work.references, name, spec.source)
    score = score_by_model(spec, work.model, work.tokenizer, work.progress)
    request, spec_fields = request_for(spec, taken), spec.model_dump(exclude={"target"})
    return _load_or_make_samples(
        work,
        name,
        {"spec": spec_fields, "taken": sorted(taken)},
        spec.source,
        lambda: gather(request, work.tokenizer, score),
    )


def _prepare_metric(
    work: RunContext, file: str, name: str, settings: MetricSettings, taken: frozenset[str]
) -> Prepared:
    """A metric with its samples, saved as samples/`file`.jsonl, without the prompts in `taken`."""
    if not isinstance(settings, SampledSettings):
        return prepare(name, settings, work.model, work.tokenizer)
    source, taken_by_source = settings.source, {settings.source: taken}
    samples = _load_or_make_samples(
        work,
        file,
        {"metric": name, "settings": settings.model_dump(), "taken": sorted(taken)},
        source,
        lambda: prepare(name, settings, work.model, work.tokenizer, taken_by_source).samples,
    )
    return Prepared(require_metric(name), settings, samples)


def _load_or_make_samples(
    work: RunContext, name: str, request: dict[str, Any], source: str, make: Callable[[], ReferenceSet]
) -> ReferenceSet:
    # The model too: prompts may be chosen by its own completions, and completions end with its tokens.
    digest = file_digest(source) if is_path(source) else None
    inputs = {**request, "file": digest, "model": work.fingerprint}
    samples = load_or_make(work, f"samples/{name}.jsonl", ReferenceSet, inputs, make)
    log.info("samples %s: %d from %s", name, len(samples), Path(source).name)
    if samples.repeats:
        work.warn(
            f"{samples.repeats} of the {len(samples)} samples of {name} are the same as an earlier one, and "
            "count again"
        )
    return samples


# The validation prompts and texts of a search, which are in no reference set and no test.


def search_aim(recipe: CorrectRecipe) -> tuple[str, PromptSettings]:
    """The metric that a search improves, and its settings on validation prompts."""
    metrics, tune = recipe.metrics(), recipe.selection.tune
    name = "toxicity" if "toxicity" in metrics else "repetition"
    settings = metrics[name]
    assert tune
    assert isinstance(settings, PromptSettings)
    return name, settings.model_copy(update={"split": "validation", "count": tune.prompts or settings.count})


def search_budget(recipe: CorrectRecipe) -> dict[str, PerplexitySettings]:
    """The metrics that a search keeps within bounds, by name, with their settings on validation texts.

    Raises:
        UserError: every text is already in the test.
    """
    metrics, tune, general = recipe.metrics(), recipe.selection.tune, recipe.references["general"]
    assert tune
    budget = {}
    for name in ("perplexity", *(("kl",) if tune.max_kl is not None else ())):
        settings = metrics[name]
        assert isinstance(settings, PerplexitySettings)
        source, column = tune.text_source or settings.source, None
        if not tune.text_source and is_path(settings.source):
            source, column = general.source, general.column
            if is_path(source) and Path(source).resolve() == Path(settings.source).resolve():
                raise UserError(
                    "evaluation.perplexity and references.general read the same file, which leaves no text "
                    "for the search; give selection.tune.text_source another text"
                )
        changes = {"source": source, "column": column, "count": tune.texts or settings.count}
        budget[name] = settings.model_copy(update={"split": "validation", **changes})
    return budget


def search_fluency(recipe: CorrectRecipe) -> tuple[FluencySettings, float] | None:
    """The settings of the fluency of what a search's candidates write, and the largest relative increase that
    the search allows; None if the recipe does not measure the fluency of those texts."""
    settings, tune = recipe.metrics().get("fluency"), recipe.selection.tune
    if not isinstance(settings, FluencySettings) or settings.of != search_aim(recipe)[0]:
        return None
    assert tune
    margin = recipe.margins.fluency if recipe.margins else None
    limits = (tune.max_fluency_increase, margin, FLUENCY_MARGIN)
    return settings, next(limit for limit in limits if limit is not None)


def _prepare_validation(work: RunContext) -> None:
    """Fill work.budget and work.aim, each metric with validation samples.

    Prompts come from the split "validation" of the test's source; a source without splits gives prompts that
    are in no reference set and no test. Text comes from the source's validation split, from `text_source`,
    or, if the test text is a file, from the parts of the general reference's file that no reference sample
    uses.

    Raises:
        UserError: there is no such text, or there are too few such prompts.
    """
    for name, text in search_budget(work.correct).items():
        samples = validation_texts(work.references, work.tokenizer, text)
        work.budget.append(Prepared(require_metric(name), text, samples))
    # The test's prompts are taken too: a source without splits would give the same ones again.
    name, settings = search_aim(work.correct)
    tested = {p.metric.name: p for p in work.prepared if p.metric.prompts}
    used = [p.samples for p in tested.values() if getattr(p.settings, "source", None) == settings.source]
    taken = collect_prompts(work.recipe, work.references, settings.source)
    taken |= {sample.words for samples in used for sample in samples if sample.words}
    aim = _prepare_metric(work, f"validation-{name}", name, settings, taken)
    others = {f"references.{name}": samples for name, samples in work.references.items()}
    others |= {f"evaluation.{name}": p.samples for name, p in tested.items()}
    for name, samples in others.items():
        if shared := overlap(samples, aim.samples):
            raise UserError(
                f"{len(shared)} validation prompts are also in {name}; a search must not see them: give "
                "another file there, or a split or choose_by that keeps them apart"
            )
    work.aim.append(aim)
    if fluency := search_fluency(work.correct):
        work.aim.append(Prepared(require_metric("fluency"), fluency[0], ReferenceSet(())))


def validation_texts(
    references: Mapping[str, ReferenceSet], tokenizer: "PreTrainedTokenizerBase", settings: PerplexitySettings
) -> ReferenceSet:
    """The texts on which a search keeps a metric within bounds. Raises UserError if none is left."""
    source, count = settings.source, settings.count
    texts = corpus(source, "validation", None if is_path(source) else count, settings.column)
    if is_path(source) or source == "c4":
        texts = _select_unseen_paragraphs(texts, references["general"], tokenizer)
    if not texts:
        raise UserError(
            f"the general reference set uses all of {Path(source).name}; give selection.tune.text_source "
            "another text"
        )
    return ReferenceSet(tuple(Sample(text=text) for text in texts[:count]), {"source": Path(source).name})


def _select_unseen_paragraphs(
    texts: Iterable[str], reference: ReferenceSet, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The paragraphs that share no GRAM consecutive tokens with a reference sample."""

    def grams(ids: Sequence[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)}

    def read(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    known_grams = {
        gram for sample in reference for gram in grams(sample.input_ids or read(sample.text or ""))
    }
    pieces = (piece for text in texts for piece in text.split("\n") if piece.strip())
    return [piece for piece in pieces if known_grams.isdisjoint(grams(read(piece)))]
