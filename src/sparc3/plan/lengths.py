"""How long the samples are: read where they are at hand, assumed, and said so, where they are on the hub or
the model would choose them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.evaluate import prepare
from ..evaluation.metrics import HarnessSettings, MetricSettings, SampledSettings
from ..experiment.gather import search_aim, search_budget, validation_texts, words_held, words_taken
from ..experiment.seeds import reference_sets
from ..models.gguf import SMOLLM2
from ..models.load import load_tokenizer
from ..recipe.schema import Recipe
from ..samples.batches import OF_WORDS, Encoded, parse_target
from ..samples.reference_set import ReferenceSet
from ..samples.sources import Request, corpus, gather, is_path, request_for
from ..samples.tokens import read_sample, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROMPTS = {"realtoxicityprompts": 16, "ioi": 20, "agreement": 12}
"""Source → tokens of a prompt, about; of any other, 32."""

TEXTS = {"wikitext2": 310_000, "c4": 530_000}
"""Source → tokens of its test text, about."""

TASKS = {
    "boolq": (3270, 2, 150),
    "rte": (277, 2, 90),
    "hellaswag": (10042, 4, 100),
    "winogrande": (1267, 2, 30),
    "arc_easy": (2376, 4, 40),
    "arc_challenge": (1172, 4, 45),
    "openbookqa": (500, 4, 20),
}
"""Task of lm-evaluation-harness → questions, answers to each, tokens of a question with an answer, about; of
any other, UNKNOWN_TASK."""

UNKNOWN_TASK = (1000, 4, 100)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample's text and of its completion, and whether they were read or assumed."""

    pairs: tuple[tuple[int, int], ...]
    assumed: bool = False

    def encoded(self, target: str, context: int) -> list[Encoded]:
        """Samples of these lengths, of which every token is the first one; longest first."""
        name, first = parse_target(target)
        made = [
            _make_encoded(place, text, min(completion, first or completion), name)
            for place, (text, completion) in enumerate(self.pairs)
        ]
        return sorted((_cut(one, context) for one in made), key=lambda one: (-len(one.ids), one.index))

    def first(self, count: int | None) -> "Lengths":
        """Of the first so many samples."""
        return replace(self, pairs=self.pairs[:count])

    def joined(self, context: int) -> list[Encoded]:
        """Texts with their completions, where nothing is predicted; longest first."""
        whole = (text + completion * (completion > 1) for text, completion in self.pairs)
        made = [
            _cut(_make_encoded(place, length, 1, "predicted"), context) for place, length in enumerate(whole)
        ]
        return sorted(made, key=lambda one: (-len(one.ids), one.index))

    @property
    def completed(self) -> bool:
        """Whether the samples have completions."""
        return any(completion > 1 for _, completion in self.pairs)

    @property
    def longest(self) -> int:
        return max(text for text, _ in self.pairs)


def _make_encoded(place: int, text: int, completion: int, target: str) -> Encoded:
    last = text - 1
    if target in ("next", "logprob"):
        return Encoded(place, (0,) * text, tuple(range(last)), (0,) * last, log=target == "logprob")
    if target in OF_WORDS:
        end = text + completion * (completion > 1)
        places = tuple(range(last if completion > 1 else 0, end))
        return Encoded(place, (0,) * end, places, (), log=target == "logwords", among=(0,))
    if target == "completion":
        return Encoded(
            place, (0,) * (text + completion - 1), tuple(range(last, last + completion)), (0,) * completion
        )
    one = None if target == "predicted" else (0,)
    return Encoded(place, (0,) * text, (last,), one, one if target == "contrast" else None)


def _cut(one: Encoded, context: int) -> Encoded:
    if len(one.ids) <= context:
        return one
    positions = tuple(position for position in one.positions if position < context) or (context - 1,)
    tokens = one.tokens and one.tokens[: len(positions)]
    return replace(one, ids=one.ids[:context], positions=positions, tokens=tokens)


def is_model_here(name: str) -> bool:
    """Whether a model is the demo, smollm2, a folder or a GGUF file."""
    path = Path(name)
    return name in ("demo", SMOLLM2) or path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())


def tokenizer_at_hand(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model that is here; of the hub's models none, which would have to be fetched."""
    if not is_model_here(name):
        return None
    try:
        return load_tokenizer(name)
    except UserError:
        return None


def samples_at_hand(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict[str, ReferenceSet], list[tuple[str, MetricSettings, ReferenceSet]]]:
    """The reference sets, and the metrics with their samples, those of a search among them, that can be had
    without the hub and without the model; as `check_samples` takes them."""

    def is_there(spec: Any) -> bool:
        return _is_at_hand(spec.source) and not by_model(spec)

    sets: dict[str, ReferenceSet] = {}
    for name, spec in reference_sets(recipe):
        if is_there(spec):
            taken = words_taken(recipe, sets, name, spec.source)
            sets[name] = gather(request_for(spec, taken), tokenizer)
    unread: Any = None  # prompts that no model chooses ask for none
    found: list[tuple[str, MetricSettings, ReferenceSet]] = []
    for name, settings in recipe.metrics().items():
        if isinstance(settings, SampledSettings) and is_there(settings):
            held = words_held(recipe, sets, settings.source)
            samples = prepare(name, settings, unread, tokenizer, {settings.source: held}).samples
            found.append((f"evaluation.{name}", settings, samples))
    if recipe.job == "correct" and recipe.tune:
        aim, asked = search_aim(recipe)
        if is_there(asked):
            tested = [some for _, other, some in found if getattr(other, "source", None) == asked.source]
            held = words_held(recipe, sets, asked.source)
            held |= {sample.words for some in tested for sample in some if sample.words}
            samples = prepare(aim, asked, unread, tokenizer, {asked.source: held}).samples
            found.append((f"validation of evaluation.{aim}", asked, samples))
        for name, text in search_budget(recipe).items():
            if _is_at_hand(text.source) and "general" in sets:
                samples = validation_texts(sets, tokenizer, text)
                found.append((f"validation of evaluation.{name}", text, samples))
    return sets, found


def _is_at_hand(source: str) -> bool:
    """Whether a source needs no hub: made by the demo or for a tokenizer, or a file."""
    return source.startswith("demo-") or source in ("ioi", "agreement") or is_path(source)


def of_samples(spec: Any, tokenizer: "PreTrainedTokenizerBase | None", default_count: int = 100) -> Lengths:
    """Of a reference set, or of a metric's prompts: anything with a source, a count, and maybe seeds,
    seq_len, choose_by.

    Where the model's own texts decide which prompts are chosen, the source's first ones stand in for them,
    with completions as long as can be.
    """
    count, seq_len = spec.count or default_count, getattr(spec, "seq_len", None)
    seeds = getattr(spec, "seeds", None) or (getattr(spec, "seed", 0),)
    if seq_len or spec.source in ("c4", "wikitext2"):
        return Lengths(((seq_len or 2048, 1),) * (count * len(seeds)))
    written = getattr(spec, "max_new_tokens", 50) if by_model(spec) else None
    if (
        tokenizer is not None
        and _is_at_hand(spec.source)
        and (by_model(spec) or getattr(spec, "choose_by", None) is None)
    ):
        chat = getattr(spec, "chat", False)
        request = Request(spec.source, count, spec.split, seeds=seeds, column=spec.column, chat=chat)
        found = gather(request, tokenizer)
        return Lengths(
            tuple(
                (max(1, len(one.prompt)), written or max(1, len(one.completion)))
                for one in (read_sample(sample, tokenizer) for sample in found)
            )
        )
    text = PROMPTS.get(spec.source, 32)
    return Lengths(((text, written or text),) * count, assumed=True)


def by_model(spec: Any) -> bool:
    """Whether samples are chosen by what the model writes."""
    return getattr(spec, "choose_by", None) in ("completion", "repetition")


def of_tasks(settings: HarnessSettings) -> Lengths:
    """Of every question with every answer, the examples before it included."""
    rows: list[tuple[int, int]] = []
    for task in settings.tasks:
        questions, answers, tokens = TASKS.get(task, UNKNOWN_TASK)
        rows += [(tokens * (1 + settings.fewshot), 1)] * (
            min(questions, settings.limit or questions) * answers
        )
    return Lengths(tuple(rows), assumed=True)


def of_text(spec: Any, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, bool]:
    """Tokens of a perplexity text, and whether they were assumed."""
    if tokenizer is None or not _is_at_hand(spec.source):
        whole = TEXTS.get(spec.source, 100_000)
        return (min(whole, 500 * spec.count) if spec.count else whole), True
    return _count_joined(corpus(spec.source, spec.split, spec.count, spec.column), tokenizer), False


def _count_joined(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(tokenize("\n\n".join(texts), tokenizer))
