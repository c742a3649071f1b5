"""The lengths of samples: read from local sources; assumed, and marked as such, if they are on the hub or
if the model would choose them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.evaluate import prepare
from ..evaluation.metrics import HarnessSettings, MetricSettings, SampledSettings
from ..experiment.gather import collect_prompts, collect_taken, search_aim, search_budget, validation_texts
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
"""Source → approximate number of tokens in a prompt; 32 for other sources."""

TEXTS = {"wikitext2": 310_000, "c4": 530_000}
"""Source → approximate number of tokens in its test text."""

TASKS = {
    "boolq": (3270, 2, 150),
    "rte": (277, 2, 90),
    "hellaswag": (10042, 4, 100),
    "winogrande": (1267, 2, 30),
    "arc_easy": (2376, 4, 40),
    "arc_challenge": (1172, 4, 45),
    "openbookqa": (500, 4, 20),
}
"""Task of lm-evaluation-harness → questions, answers per question, approximate tokens of a question with an
answer; UNKNOWN_TASK for other tasks."""

UNKNOWN_TASK = (1000, 4, 100)


@dataclass(frozen=True)
class Lengths:
    """The numbers of tokens in each sample's text and completion; `assumed`: whether they are not read
    from the samples."""

    pairs: tuple[tuple[int, int], ...]
    assumed: bool = False

    def encode(self, target: str, context: int) -> list[Encoded]:
        """Samples of these lengths in which every token has id 0; longest first."""
        name, first = parse_target(target)
        encoded = [
            _make_encoded(index, text, min(completion, first or completion), name)
            for index, (text, completion) in enumerate(self.pairs)
        ]
        return sorted(
            (_cut(sample, context) for sample in encoded), key=lambda sample: (-len(sample.ids), sample.index)
        )

    def first(self, count: int | None) -> "Lengths":
        """The lengths of the first `count` samples."""
        return replace(self, pairs=self.pairs[:count])

    def join_completions(self, context: int) -> list[Encoded]:
        """Texts with their completions, for work that predicts nothing; longest first."""
        lengths = (text + completion * (completion > 1) for text, completion in self.pairs)
        encoded = [
            _cut(_make_encoded(index, length, 1, "predicted"), context)
            for index, length in enumerate(lengths)
        ]
        return sorted(encoded, key=lambda sample: (-len(sample.ids), sample.index))

    @property
    def have_completions(self) -> bool:
        """Whether the samples have completions."""
        return any(completion > 1 for _, completion in self.pairs)

    @property
    def longest(self) -> int:
        return max(text for text, _ in self.pairs)


def _make_encoded(index: int, text: int, completion: int, target: str) -> Encoded:
    last = text - 1
    if target in ("next", "logprob"):
        return Encoded(index, (0,) * text, tuple(range(last)), (0,) * last, log=target == "logprob")
    if target in OF_WORDS:
        end = text + completion * (completion > 1)
        positions = tuple(range(last if completion > 1 else 0, end))
        return Encoded(index, (0,) * end, positions, (), log=target == "logwords", among=(0,))
    if target == "completion":
        return Encoded(
            index, (0,) * (text + completion - 1), tuple(range(last, last + completion)), (0,) * completion
        )
    token = None if target == "predicted" else (0,)
    return Encoded(index, (0,) * text, (last,), token, token if target == "contrast" else None)


def _cut(sample: Encoded, context: int) -> Encoded:
    if len(sample.ids) <= context:
        return sample
    positions = tuple(position for position in sample.positions if position < context) or (context - 1,)
    tokens = sample.tokens and sample.tokens[: len(positions)]
    return replace(sample, ids=sample.ids[:context], positions=positions, tokens=tokens)


def is_model_here(name: str) -> bool:
    """Whether a model is the demo, smollm2, a folder or a GGUF file."""
    path = Path(name)
    return name in ("demo", SMOLLM2) or path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())


def tokenizer_at_hand(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model on this machine; None for models on the hub, which would have to be
    downloaded."""
    if not is_model_here(name):
        return None
    try:
        return load_tokenizer(name)
    except UserError:
        return None


def samples_at_hand(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict[str, ReferenceSet], list[tuple[str, MetricSettings, ReferenceSet]]]:
    """The reference sets and the metrics with their samples (including a search's) that are available
    without the hub and the model, as arguments for `check_samples`."""

    def is_there(spec: Any) -> bool:
        return _is_at_hand(spec.source) and not is_chosen_by_model(spec)

    sets: dict[str, ReferenceSet] = {}
    for name, spec in reference_sets(recipe):
        if is_there(spec):
            taken = collect_taken(recipe, sets, name, spec.source)
            sets[name] = gather(request_for(spec, taken), tokenizer)
    no_model: Any = None  # not used for prompts that the model does not choose
    metrics: list[tuple[str, MetricSettings, ReferenceSet]] = []
    for name, settings in recipe.metrics().items():
        if isinstance(settings, SampledSettings) and is_there(settings):
            taken = collect_prompts(recipe, sets, settings.source)
            samples = prepare(name, settings, no_model, tokenizer, {settings.source: taken}).samples
            metrics.append((f"evaluation.{name}", settings, samples))
    if recipe.job == "correct" and recipe.tune:
        aim, settings_of_aim = search_aim(recipe)
        if is_there(settings_of_aim):
            source = settings_of_aim.source
            tests = [samples for _, other, samples in metrics if getattr(other, "source", None) == source]
            taken = collect_prompts(recipe, sets, source)
            taken |= {sample.words for test in tests for sample in test if sample.words}
            samples = prepare(aim, settings_of_aim, no_model, tokenizer, {source: taken}).samples
            metrics.append((f"validation of evaluation.{aim}", settings_of_aim, samples))
        for name, text in search_budget(recipe).items():
            if _is_at_hand(text.source) and "general" in sets:
                samples = validation_texts(sets, tokenizer, text)
                metrics.append((f"validation of evaluation.{name}", text, samples))
    return sets, metrics


def _is_at_hand(source: str) -> bool:
    """Whether a source needs no hub: made by the demo or for a tokenizer, or a file."""
    return source.startswith("demo-") or source in ("ioi", "agreement") or is_path(source)


def estimate_samples(
    spec: Any, tokenizer: "PreTrainedTokenizerBase | None", default_count: int = 100
) -> Lengths:
    """The lengths of a reference set's samples or a metric's prompts: anything with a source and a count, and
    possibly seeds, seq_len, choose_by.

    If the model's own texts decide which prompts are chosen, the source's first prompts stand in for them,
    with completions of the maximum length.
    """
    count, seq_len = spec.count or default_count, getattr(spec, "seq_len", None)
    seeds = getattr(spec, "seeds", None) or (getattr(spec, "seed", 0),)
    if seq_len or spec.source in ("c4", "wikitext2"):
        return Lengths(((seq_len or 2048, 1),) * (count * len(seeds)))
    completion_length = getattr(spec, "max_new_tokens", 50) if is_chosen_by_model(spec) else None
    if (
        tokenizer is not None
        and _is_at_hand(spec.source)
        and (is_chosen_by_model(spec) or getattr(spec, "choose_by", None) is None)
    ):
        chat = getattr(spec, "chat", False)
        request = Request(spec.source, count, spec.split, seeds=seeds, column=spec.column, chat=chat)
        samples = gather(request, tokenizer)
        return Lengths(
            tuple(
                (max(1, len(tokens.prompt)), completion_length or max(1, len(tokens.completion)))
                for tokens in (read_sample(sample, tokenizer) for sample in samples)
            )
        )
    text = PROMPTS.get(spec.source, 32)
    return Lengths(((text, completion_length or text),) * count, assumed=True)


def is_chosen_by_model(spec: Any) -> bool:
    """Whether the model's own texts decide which samples are chosen."""
    return getattr(spec, "choose_by", None) in ("completion", "repetition")


def estimate_tasks(settings: HarnessSettings) -> Lengths:
    """The lengths of every question with every answer, including the few-shot examples."""
    rows: list[tuple[int, int]] = []
    for task in settings.tasks:
        questions, answers, tokens = TASKS.get(task, UNKNOWN_TASK)
        rows += [(tokens * (1 + settings.fewshot), 1)] * (
            min(questions, settings.limit or questions) * answers
        )
    return Lengths(tuple(rows), assumed=True)


def estimate_text(spec: Any, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, bool]:
    """(number of tokens in a perplexity text, whether it is assumed)."""
    if tokenizer is None or not _is_at_hand(spec.source):
        total = TEXTS.get(spec.source, 100_000)
        return (min(total, 500 * spec.count) if spec.count else total), True
    texts = corpus(spec.source, spec.split, spec.count, spec.column)
    return len(tokenize("\n\n".join(texts), tokenizer)), False
