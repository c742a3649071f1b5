"""What a search may look at: validation prompts and texts, which no reference set and no test holds."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Sparc3Error, UserError
from ..evaluation.metrics import KLSettings, PerplexitySettings, Prepared, PromptSettings, require_metric
from ..recipe.schema import CorrectRecipe
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.sources import corpus, is_path, overlap
from .gather import prepare_metric
from .run_folder import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def search_aim(recipe: CorrectRecipe) -> tuple[str, PromptSettings]:
    """The metric that a search betters, and its settings on validation prompts."""
    metrics, tune = recipe.metrics(), recipe.selection.tune
    assert tune
    name = "toxicity" if "toxicity" in metrics else "repetition"
    settings = metrics[name]
    assert isinstance(settings, PromptSettings)
    return name, settings.model_copy(update={"split": "validation", "count": tune.prompts or settings.count})


def search_budget(recipe: CorrectRecipe) -> dict[str, PerplexitySettings]:
    """The metrics that a search keeps within bounds, by name, with the source and the number of their
    validation texts.

    Raises:
        UserError: there is no text that the test does not hold.
    """
    metrics, tune = recipe.metrics(), recipe.selection.tune
    assert tune
    found = {}
    for name in ("perplexity", *(("kl",) if tune.max_kl is not None else ())):
        settings = metrics[name]
        assert isinstance(settings, PerplexitySettings)
        found[name] = settings.model_copy(
            update={
                "split": "validation",
                **_validation_text(recipe, settings),
                "count": tune.texts or settings.count,
            }
        )
    return found


def _validation_text(recipe: CorrectRecipe, settings: PerplexitySettings) -> dict[str, str | None]:
    """Source and column of the texts."""
    if recipe.tune and recipe.tune.text_source:
        return {"source": recipe.tune.text_source, "column": None}
    if not is_path(settings.source):
        return {"source": settings.source, "column": None}
    general = recipe.references["general"].source
    if is_path(general) and Path(general).resolve() == Path(settings.source).resolve():
        raise UserError(
            "evaluation.perplexity and references.general read the same file, which leaves no text for the "
            "search; give selection.tune.text_source another text"
        )
    return {"source": general, "column": recipe.references["general"].column}


GRAM = 12
"""Two texts that have so many consecutive tokens in common are taken to overlap."""


def prepare_validation(work: RunContext) -> tuple[list[Prepared], list[Prepared]]:
    """The metrics of the budget, and the one to better, each with validation samples.

    Prompts come from the split "validation" of the test's source; a source without splits gives prompts that
    neither a reference set nor a test holds. Text comes from the source's validation split, from
    `text_source`, or, where the test text is a file, from the general reference's file, as far as no
    reference sample was cut from it.

    Raises:
        UserError: there is no such text, or not enough such prompts.
    """
    texts = [_prepare_texts(work, name, settings) for name, settings in search_budget(work.correct).items()]
    name, settings = search_aim(work.correct)
    aim = prepare_metric(work, f"validation-{name}", name, settings, _prompts_in_use(work, settings.source))
    _refuse_overlap(work, aim)
    return texts, [aim]


def _prompts_in_use(work: RunContext, source: str) -> frozenset[str]:
    """Prompts that the reference sets and the tests took from this source."""
    tested = [
        p.samples for p in work.prepared if p.metric.prompts and getattr(p.settings, "source", None) == source
    ]
    return work.held(work.references, source) | {
        sample.words for some in tested for sample in some if sample.words
    }


def _refuse_overlap(work: RunContext, aim: Prepared) -> None:
    others = {f"references.{name}": some for name, some in work.references.items()}
    others |= {f"evaluation.{p.metric.name}": p.samples for p in work.prepared if p.metric.prompts}
    for name, some in others.items():
        if same := overlap(some, aim.samples):
            raise UserError(
                f"{len(same)} validation prompts are also in {name}; a search must not see them: give "
                "another file there, or a split or choose_by that keeps them apart"
            )


def _prepare_texts(work: RunContext, name: str, settings: PerplexitySettings) -> Prepared:
    source, count = settings.source, settings.count
    texts = corpus(source, "validation", None if is_path(source) else count, settings.column)
    if is_path(source) or source == "c4":
        texts = _paragraphs_apart(texts, work.references["general"], work.tokenizer)
    if not texts:
        raise UserError(
            f"all of {Path(source).name} is held by the general reference set; give "
            "selection.tune.text_source another text"
        )
    samples = ReferenceSet(tuple(Sample(text=text) for text in texts[:count]), {"source": Path(source).name})
    kind = KLSettings if name == "kl" else PerplexitySettings
    if not isinstance(settings, kind):
        raise Sparc3Error(f"the settings of {name} are not its own")
    return Prepared(require_metric(name), settings, samples)


def _paragraphs_apart(
    texts: Iterable[str], held: ReferenceSet, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The paragraphs that share no GRAM consecutive tokens with a sample."""

    def ids(text: str) -> Sequence[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    known = {gram for sample in held for gram in _token_grams(sample.input_ids or ids(sample.text or ""))}
    pieces = (piece for text in texts for piece in text.split("\n") if piece.strip())
    return [piece for piece in pieces if known.isdisjoint(_token_grams(ids(piece)))]


def _token_grams(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)}
