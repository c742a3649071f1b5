"""The samples stage: reference sets, test samples, and the validation samples of a search; no prompt in two
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
from ..samples.tokens import text_of
from ..storage import file_digest
from ..verdict import FLUENCY_MARGIN
from .run_folder import RunContext, load_or_make
from .seeds import reference_sets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
GRAM = 12
"""Two texts that have so many consecutive tokens in common are taken to overlap."""


def gather_all(work: RunContext) -> None:
    """Fill work.references and work.prepared, and for a search work.budget and work.aim. Raises UserError
    where they share a prompt."""
    for name, spec in reference_sets(work.recipe):
        work.references[name] = _load_or_make_reference(work, name, spec)
    for name, settings in work.recipe.metrics().items():
        source = settings.source if isinstance(settings, SampledSettings) else ""
        held = words_held(work.recipe, work.references, source)
        work.prepared.append(_prepare_metric(work, f"evaluation-{name}", name, settings, held))
    for one in (p for p in work.prepared if p.metric.prompts):
        for name, reference in work.references.items():
            if same := overlap(reference, one.samples):
                raise UserError(
                    f"{len(same)} prompts of evaluation.{one.metric.name} are also in references.{name}; an "
                    "effect must be shown on prompts that were not used to find the circuit: give another "
                    "file, or a split or choose_by that keeps them apart"
                )
    if work.recipe.tune:
        _prepare_validation(work)


def find_words(tokenizer: "PreTrainedTokenizerBase", asked: WordsBy) -> tuple[str, ...]:
    """The words that a recipe asks for, each with its leading space. Raises UserError where there is none."""
    texts = [text_of(tokenizer, token) for token in range(len(tokenizer))]
    words = [text for text in texts if text[:1] == " " and text[1:].isalpha() and len(text) > 3]
    rated = make_scorer(asked.scorer)([word.strip() for word in words])
    found = [word for word, score in zip(words, rated, strict=True) if score and score >= asked.min_score]
    if not found:
        raise UserError(
            f"no word of the tokenizer is rated {asked.min_score:g} or more by {asked.scorer}; lower "
            "attribution.words.min_score"
        )
    log.info("words: %d that %s rates %g or more", len(found), asked.scorer, asked.min_score)
    return tuple(found)


def words_held(recipe: Recipe, sets: Mapping[str, ReferenceSet], source: str) -> frozenset[str]:
    """Prompts that those of these reference sets which come from `source` hold."""
    found = [
        some for name, some in sets.items() if recipe.references[name.partition(".")[0]].source == source
    ]
    return frozenset(sample.words for some in found for sample in some if sample.words)


def words_taken(recipe: Recipe, sets: Mapping[str, ReferenceSet], name: str, source: str) -> frozenset[str]:
    """Prompts that the reference set `name` leaves to those before it: of two sets of one source, the later
    gets what is left. Seeds of one set are drawn independently of each other."""
    if recipe.job != "correct":
        return frozenset()
    others = {one: some for one, some in sets.items() if one.partition(".")[0] != name.partition(".")[0]}
    return words_held(recipe, others, source)


def score_by_model(
    spec: Any, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", progress: bool = False
) -> Score:
    """What a set with choose_by completion or repetition is chosen by: the model's own completion of each
    prompt, with its toxicity or its RUR."""
    if spec.choose_by == "repetition":
        return response_scores(model, tokenizer, spec.max_new_tokens, progress)
    settings = ToxicitySettings(scorer=spec.scorer, max_new_tokens=spec.max_new_tokens, source=spec.source)
    return completion_scores(model, tokenizer, settings, progress)


def _load_or_make_reference(work: RunContext, name: str, spec: Reference) -> ReferenceSet:
    taken = words_taken(work.recipe, work.references, name, spec.source)
    score = score_by_model(spec, work.model, work.tokenizer, work.progress)
    request, asked = request_for(spec, taken), spec.model_dump(exclude={"target"})
    return _load_or_make_samples(
        work,
        name,
        {"spec": asked, "taken": sorted(taken)},
        spec.source,
        lambda: gather(request, work.tokenizer, score),
    )


def _prepare_metric(
    work: RunContext, file: str, name: str, settings: MetricSettings, held: frozenset[str]
) -> Prepared:
    """A metric with its samples, kept as samples/`file`.jsonl; of its source, the prompts in `held` are left
    out."""
    if not isinstance(settings, SampledSettings):
        return prepare(name, settings, work.model, work.tokenizer)
    source, taken = settings.source, {settings.source: held}
    samples = _load_or_make_samples(
        work,
        file,
        {"metric": name, "settings": settings.model_dump(), "taken": sorted(held)},
        source,
        lambda: prepare(name, settings, work.model, work.tokenizer, taken).samples,
    )
    return Prepared(require_metric(name), settings, samples)


def _load_or_make_samples(
    work: RunContext, name: str, asked: dict[str, Any], source: str, make: Callable[[], ReferenceSet]
) -> ReferenceSet:
    digest = file_digest(source) if is_path(source) else None
    inputs = {**asked, "file": digest, "model": work.fingerprint}
    found = load_or_make(work, f"samples/{name}.jsonl", ReferenceSet, inputs, make)
    log.info("samples %s: %d from %s", name, len(found), Path(source).name)
    if found.repeated:
        work.warn(
            f"{found.repeated} of the {len(found)} samples of {name} are the same as an earlier one, and "
            "count again"
        )
    return found


# What a search may look at: validation prompts and texts, which no reference set and no test holds.


def search_aim(recipe: CorrectRecipe) -> tuple[str, PromptSettings]:
    """The metric that a search betters, and its settings on validation prompts."""
    metrics, tune = recipe.metrics(), recipe.selection.tune
    name = "toxicity" if "toxicity" in metrics else "repetition"
    settings = metrics[name]
    assert tune
    assert isinstance(settings, PromptSettings)
    return name, settings.model_copy(update={"split": "validation", "count": tune.prompts or settings.count})


def search_budget(recipe: CorrectRecipe) -> dict[str, PerplexitySettings]:
    """The metrics that a search keeps within bounds, by name, with the source and the number of their
    validation texts.

    Raises:
        UserError: there is no text that the test does not hold.
    """
    metrics, tune, general = recipe.metrics(), recipe.selection.tune, recipe.references["general"]
    assert tune
    found = {}
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
        found[name] = settings.model_copy(update={"split": "validation", **changes})
    return found


def search_fluency(recipe: CorrectRecipe) -> tuple[FluencySettings, float] | None:
    """How a search reads what its candidates write, and the largest relative increase that it allows; None
    where the recipe does not measure the fluency of those texts."""
    asked, tune = recipe.metrics().get("fluency"), recipe.selection.tune
    if not isinstance(asked, FluencySettings) or asked.of != search_aim(recipe)[0]:
        return None
    assert tune
    margin = recipe.margins.fluency if recipe.margins else None
    said = (tune.max_fluency_increase, margin, FLUENCY_MARGIN)
    return asked, next(one for one in said if one is not None)


def _prepare_validation(work: RunContext) -> None:
    """Fill work.budget and work.aim, each metric with validation samples.

    Prompts come from the split "validation" of the test's source; a source without splits gives prompts that
    neither a reference set nor a test holds. Text comes from the source's validation split, from
    `text_source`, or, where the test text is a file, from the general reference's file, as far as no
    reference sample was cut from it.

    Raises:
        UserError: there is no such text, or not enough such prompts.
    """
    for name, text in search_budget(work.correct).items():
        samples = validation_texts(work.references, work.tokenizer, text)
        work.budget.append(Prepared(require_metric(name), text, samples))
    name, settings = search_aim(work.correct)
    tested = {p.metric.name: p for p in work.prepared if p.metric.prompts}
    used = [p.samples for p in tested.values() if getattr(p.settings, "source", None) == settings.source]
    held = words_held(work.recipe, work.references, settings.source)
    held |= {sample.words for some in used for sample in some if sample.words}
    aim = _prepare_metric(work, f"validation-{name}", name, settings, held)
    others = {f"references.{name}": some for name, some in work.references.items()}
    others |= {f"evaluation.{name}": p.samples for name, p in tested.items()}
    for name, some in others.items():
        if same := overlap(some, aim.samples):
            raise UserError(
                f"{len(same)} validation prompts are also in {name}; a search must not see them: give "
                "another file there, or a split or choose_by that keeps them apart"
            )
    work.aim.append(aim)
    if found := search_fluency(work.correct):
        work.aim.append(Prepared(require_metric("fluency"), found[0], ReferenceSet(())))


def validation_texts(
    references: Mapping[str, ReferenceSet], tokenizer: "PreTrainedTokenizerBase", settings: PerplexitySettings
) -> ReferenceSet:
    """The texts on which a search keeps a metric within bounds. Raises UserError where none is left."""
    source, count = settings.source, settings.count
    texts = corpus(source, "validation", None if is_path(source) else count, settings.column)
    if is_path(source) or source == "c4":
        texts = _paragraphs_apart(texts, references["general"], tokenizer)
    if not texts:
        raise UserError(
            f"all of {Path(source).name} is held by the general reference set; give "
            "selection.tune.text_source another text"
        )
    return ReferenceSet(tuple(Sample(text=text) for text in texts[:count]), {"source": Path(source).name})


def _paragraphs_apart(
    texts: Iterable[str], held: ReferenceSet, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The paragraphs that share no GRAM consecutive tokens with a sample."""

    def grams(ids: Sequence[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)}

    def read(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    known = {gram for sample in held for gram in grams(sample.input_ids or read(sample.text or ""))}
    pieces = (piece for text in texts for piece in text.split("\n") if piece.strip())
    return [piece for piece in pieces if known.isdisjoint(grams(read(piece)))]
