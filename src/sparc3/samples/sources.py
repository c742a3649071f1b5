"""Where samples come from: data sets of the hub, the demo's generator, a user's files."""

import io
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from ..errors import UserError, unknown
from ..settings import validate_with
from .formats import plain_name
from .reference_set import ReferenceSet, Rows, Sample, is_rows, parse_sample, read_toxicity, read_whole
from .tokens import MaybeTokenizer, Tokenizer, ask, render_sample, tokenize, window_opening

Score = Callable[[list[str]], list[tuple[str, float | None]]]
"""Completes each prompt with the studied model and scores the completion: (completion, figure or None)."""


@dataclass(frozen=True)
class Request:
    """What a recipe or the command line requests from a source; the fields of a `references` entry."""

    source: str
    count: int
    split: str = "reference"
    seq_len: int | None = None
    seeds: tuple[int, ...] = (0,)
    choose_by: str | None = None
    min_toxicity: float | None = None
    max_toxicity: float | None = None
    max_rur: float = 0.5
    column: str | None = None
    """For a file: the column with the texts, if it is not called text or prompt."""
    chat: bool = False
    """Each prompt becomes a user's turn, rendered by the model's chat template; the completion is the
    answer."""
    answer: str = "chosen"
    """The answer of a preference set that follows its messages: chosen or rejected."""
    taken: frozenset[str] = frozenset()
    """Prompts that another set of this run already uses."""


def request_for(spec: Any, taken: frozenset[str] = frozenset(), **overrides: Any) -> Request:
    """The request of a recipe's section, from the fields that both have.

    Args:
        taken: prompts that must not be among the samples.
        overrides: fields that replace the section's.
    """
    fields_of_spec = {
        f.name: value for f in fields(Request) if (value := getattr(spec, f.name, None)) is not None
    }
    return Request(**fields_of_spec | overrides | {"taken": taken})


class _Enough(Exception):
    """Ends the reading of a source."""


def prompts_to_complete(request: Request, tokenizer: MaybeTokenizer, count: int) -> list[str]:
    """The first `count` prompts, or all if there are fewer, that the model would complete for a request whose
    choose_by is completion or repetition. Raises UserError if there are none."""
    seen: list[str] = []

    def collect(prompts: list[str]) -> list[tuple[str, float | None]]:
        """A Score that takes the prompts down, and lets none of them qualify."""
        seen.extend(prompts)
        if len(seen) >= count:
            raise _Enough
        return [("", None)] * len(prompts)

    try:
        gather(request, tokenizer, collect)
    except _Enough:
        pass
    except UserError:  # the source has fewer prompts, so `gather` found too few samples
        if not seen:
            raise
    return seen[:count]


AT_ONCE = 256
"""Number of prompts that the model completes before the scores are checked."""

WIDER = (4, 16, 64)
"""When few prompts may qualify, look at this many times the requested number: the first factor, and the
next ones if that gives too few."""

Source = Callable[[Request, MaybeTokenizer, "Score | None"], list[Sample]]
_SOURCES: dict[str, Source] = {}


def source(name: str) -> Callable[[Source], Source]:
    """Register a source of samples under `name`. Raises UserError if the name is taken."""

    def register(function: Source) -> Source:
        if name in _SOURCES:
            raise UserError(f"source '{name}' already exists; choose another name")
        _SOURCES[name] = function
        return function

    return register


def sources() -> list[str]:
    return sorted(_SOURCES)


def is_path(name: str) -> bool:
    """Whether a `source` means a file: it contains a slash or a dot, or it exists."""
    return name not in _SOURCES and ("/" in name or "." in name or Path(name).exists())


def require_source(name: str) -> None:
    """Raise UserError unless `name` is a known source or an existing file."""
    if name in _SOURCES:
        return
    if not is_path(name):
        raise unknown("source", name, _SOURCES)
    if not Path(name).is_file():
        known = ", ".join(sources())
        raise UserError(f"no such file: {name}; a source is one of {known}, or a file of JSON lines or text")


def _require_file(column: str | None, info: ValidationInfo) -> str | None:
    source = info.data.get("source")
    if column is not None and source is not None and not is_path(source):
        raise UserError(f"column is for files, but source '{source}' is not a file; leave column out")
    return column


SourceName = Annotated[str, validate_with(require_source)]
Column = Annotated[str | None, AfterValidator(_require_file)]
"""Type of a section's field `column`, which must come after `source`."""


def gather(request: Request, tokenizer: MaybeTokenizer = None, score: Score | None = None) -> ReferenceSet:
    """The requested samples, exactly `count` for each seed.

    Args:
        tokenizer: needed with `seq_len`.
        score: needed if `choose_by` is "completion" or "repetition".

    Raises:
        UserError: an unknown source, a file that does not fit, or fewer samples than requested (the message
            says how many).
    """
    require_source(request.source)
    read_source = _SOURCES.get(request.source) or _read_file
    if request.choose_by == "repetition":
        samples = _choose_repetitive(request, read_source, tokenizer, score)
    else:
        samples = read_source(request, tokenizer, score)
    samples = [_render_prompt(sample, request, tokenizer, f"sample {i}") for i, sample in enumerate(samples)]
    if request.seq_len and any(len(sample.input_ids or ()) != request.seq_len for sample in samples):
        raise UserError(
            f"source '{request.source}' gives whole texts, and cannot cut them to seq_len {request.seq_len}; "
            "leave seq_len out"
        )
    # Only cuts of a text are drawn for every seed; prompts use the first seed.
    total = request.count * (len(request.seeds) if request.seq_len else 1)
    if len(samples) < total:
        taken, note = len(request.taken), ""
        if taken:
            note = f" ({taken} prompts were left out, because a reference set of this run uses them)"
        raise UserError(
            f"source '{request.source}' gave {len(samples)} samples, but {total} were requested{note}; "
            "lower its count, give more samples, or loosen the conditions"
        )
    return ReferenceSet(
        tuple(samples), {**asdict(request), "taken": len(request.taken), "source": Path(request.source).name}
    )


def _render_prompt(sample: Sample, request: Request, tokenizer: MaybeTokenizer, label: str) -> Sample:
    """The sample with its chat rendered by the model's template; with `request.chat`, also a plain text. A
    sample that is already rendered stays as it is."""
    if request.chat and request.seq_len is None:
        return ask(sample, tokenizer, label)
    return render_sample(sample, tokenizer, label)


def _choose_repetitive(
    request: Request, read: "Source", tokenizer: MaybeTokenizer, score: Score | None
) -> list[Sample]:
    """Prompts whose greedy response by this model is repetitive, RUR ≤ max_rur (the paper's protocol),
    with that response as completion.

    Reads more and more of the source, until there are enough prompts or the source has no more.
    """
    if score is None:
        raise UserError("choose_by: repetition needs a model to respond to the prompts; use it in a recipe")
    chosen: dict[str, Sample] = {}
    seen: set[str] = set()
    for factor in WIDER:
        wider_request = replace(request, count=request.count * factor, choose_by=None)
        new = {
            sample.text: sample
            for sample in read(wider_request, tokenizer, None)
            if sample.text and sample.text not in seen and sample.words not in request.taken
        }
        seen |= new.keys()
        for (text, sample), (response, rur) in zip(new.items(), score(list(new)), strict=True):
            if fits(request, rur):
                chosen[text] = replace(sample, completion=response, line=None)
        if len(chosen) >= request.count or not new:
            break
    return list(chosen.values())[: request.count]


def _read_file(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    path, seed = request.source, request.seeds[0]
    if request.seq_len and _is_one_text(path, request.column):
        text = "\n\n".join(corpus(path))
        return _cut_each_seed(request, tokenizer, lambda seed: [text])
    rows = Rows(path, request.column)
    if request.seq_len:
        return _cut_each_seed(
            request, tokenizer, lambda seed: (_read_text(row, path) for row in _shuffle(rows, seed))
        )
    if request.choose_by:
        labelled_rows = ((f"{path}, line {number}", row) for number, row in _shuffle(rows, seed))
        return toxic_prompts(labelled_rows, request, tokenizer, score)

    def sample(index: int) -> Sample:
        number, row = rows[index]
        parsed = parse_sample(row, label := f"{path}, line {number}", request.answer)
        return replace(_render_prompt(parsed, request, tokenizer, label), line=number)

    # All rows are checked, so that a mistake in any of them is found whatever the seed. A file with no more
    # rows than needed keeps its order.
    fresh_indices = [index for index in range(len(rows)) if sample(index).words not in request.taken]
    if len(fresh_indices) > request.count:
        fresh_indices = list(islice(_shuffle(fresh_indices, seed), request.count))
    return list(map(sample, fresh_indices))


def _shuffle(items: Sequence[Any], seed: int) -> Iterator[Any]:
    """The items in random order; those of a file are read one by one."""
    indices = list(range(len(items)))
    random.Random(f"sparc3/{seed}").shuffle(indices)
    return (items[index] for index in indices)


def _is_one_text(path: str, column: str | None) -> bool:
    return column is None and not is_rows(path)


def _read_text(numbered: tuple[int, dict[str, Any]], path: str) -> str:
    number, row = numbered
    text = parse_sample(row, label := f"{path}, line {number}").text
    if text is None:
        raise UserError(f'{label} has token ids, but a text is needed; write it as "text"')
    return text


@source("c4")
def _c4(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    """C4 (Raffel et al. 2020), English: `count` cuts of exactly `seq_len` tokens for each seed."""
    request = replace(request, seq_len=request.seq_len or 2048)

    def documents(seed: int) -> Iterator[str]:
        return (row["text"] for row in stream(seed, path="allenai/c4", name="en", split="train"))

    return _cut_each_seed(request, tokenizer, documents)


@source("wikitext2")
def _wikitext2(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    """WikiText-2 raw (Merity et al. 2016), train split: cuts of `seq_len` tokens for each seed."""
    request = replace(request, seq_len=request.seq_len or 2048)
    text = "\n\n".join(_wikitext_lines("train"))
    return _cut_each_seed(request, tokenizer, lambda seed: [text])


@source("realtoxicityprompts")
def _realtoxicityprompts(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    """RealToxicityPrompts (Gehman et al. 2020): prompts chosen by toxicity."""
    rows = stream(request.seeds[0], path="allenai/real-toxicity-prompts", split="train")
    labelled_rows = ((f"{request.source}, row {number}", row) for number, row in enumerate(rows, 1))
    return toxic_prompts(labelled_rows, request, tokenizer, score)


def _demo(kind: str) -> Source:
    def read(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
        from ..demo.text import texts

        demo_texts = islice(texts(kind, request.split, request.seeds[0]), request.count)
        if kind == "general":
            return [Sample(text=demo_text.text) for demo_text in demo_texts]
        return [
            Sample(demo_text.prompt, None, demo_text.target, demo_text.contrast, demo_text.completion)
            for demo_text in demo_texts
        ]

    return read


for _kind in ("general", "angry", "polite", "ioi", "loop"):
    source(f"demo-{_kind}")(_demo(_kind))


@source("ioi")
def _ioi(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    """Indirect object identification in words that are single tokens for the model (Wang et al. 2022)."""
    from .ioi_sentences import sentences

    return _take_rows(sentences, request, tokenizer)


@source("agreement")
def _agreement(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    """Subject-verb agreement across a noun of the other number (Linzen et al. 2016)."""
    from .agreement_sentences import sentences

    return _take_rows(sentences, request, tokenizer)


def _take_rows(sentences: Callable[..., Any], request: Request, tokenizer: MaybeTokenizer) -> list[Sample]:
    """The requested number of samples from rows of (prompt, target, contrast), or fewer if there are
    fewer."""
    rows = islice(sentences(tokenizer, request.split, request.seeds[0], request.taken), request.count)
    return [Sample(text, None, target, contrast) for text, target, contrast in rows]


def stream(seed: int | None, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Rows of a data set, streamed by `datasets`, and shuffled by `shuffle(seed, buffer_size=10_000)` with a
    seed.

    Args:
        seed: determines the order of the shards and the draws from the buffer; None keeps the order.
        arguments: those of `datasets.load_dataset`, such as path, name, split, data_files.

    Raises:
        UserError: the hub cannot be reached, or the data set does not exist.
    """
    import datasets

    from ..models.hub import hub_errors, require_hub

    if not Path(str(arguments.get("path"))).exists() and "data_files" not in arguments:
        require_hub(
            f"the data set {arguments.get('path')}", "give a JSONL or text file as the source instead"
        )
    try:
        with hub_errors(str(arguments.get("path"))):
            rows = datasets.load_dataset(**arguments, streaming=True)
            yield from rows.shuffle(seed=seed, buffer_size=10_000) if seed is not None else rows
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"the hub has no data set {arguments.get('path')} ({str(error).splitlines()[0]}); give a JSONL "
            "file instead"
        ) from None


def _wikitext_lines(split: str) -> list[str]:
    rows = stream(None, path="Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)
    return [row["text"] for row in rows]


def corpus(
    name: str, split: str = "test", count: int | None = None, column: str | None = None
) -> Sequence[str]:
    """The texts on which perplexity is measured: the first `count` of a source or of a file.

    A plain text file is one text. WikiText's own files (`.raw`) are split into the rows of the hub's data
    set, so that both give the same perplexity when joined by blank lines, as in SparseGPT's and Wanda's code.
    """
    require_source(name)
    if name == "wikitext2":
        return _wikitext_lines(split)[:count]
    if plain_name(name).endswith(".raw"):
        lines = list(io.StringIO(read_whole(name)))  # other line separators occur inside rows
        return [line if line.strip() else "" for line in lines][:count]
    if name == "c4":
        rows = stream(None, path="allenai/c4", name="en", split="validation" if split == "test" else "train")
        return [row["text"] for row in islice(rows, count or 1100)]
    if name in _SOURCES:
        samples = gather(Request(name, count or 300, split=split)).samples
        return [(sample.text or "") + (sample.completion or "") for sample in samples]
    if _is_one_text(name, column):
        return [read_whole(name)]
    return [_read_text(row, name) for row in Rows(name, column)[:count]]


def _cut_each_seed(
    request: Request, tokenizer: MaybeTokenizer, documents: Callable[[int], Iterable[str]]
) -> list[Sample]:
    if tokenizer is None:
        raise UserError(f"source '{request.source}' with seq_len needs a tokenizer")
    return [cut for seed in request.seeds for cut in _cuts(documents(seed), tokenizer, request, seed)]


def _cuts(documents: Iterable[str], tokenizer: Tokenizer, request: Request, seed: int) -> Iterator[Sample]:
    """`count` cuts of exactly `seq_len` tokens, including `window_opening`: one from each document that is
    long enough, or many from a long text."""
    generator, remaining, opening = (
        random.Random(f"sparc3/cut/{seed}"),
        request.count,
        window_opening(tokenizer),
    )
    seq_len = (request.seq_len or 0) - len(opening)
    for text in documents:
        if remaining == 0:
            return
        # A token is hardly ever less than one character, so texts with fewer characters need no tokenizing.
        ids = tokenize(text, tokenizer) if len(text) >= seq_len else ()
        ids = ids[len(opening) :] if ids[: len(opening)] == opening else ids
        if len(ids) < seq_len:
            continue
        last, capacity = len(ids) - seq_len, len(ids) // seq_len
        count = min(remaining, capacity) if capacity > 8 else 1
        starts = (
            sorted(generator.sample(range(last + 1), count)) if count > 1 else [generator.randint(0, last)]
        )
        yield from (Sample(input_ids=opening + ids[start : start + seq_len]) for start in starts)
        remaining -= len(starts)


def fits(request: Request, value: float | None) -> bool:
    """Whether a prompt with this toxicity, or with a response of this RUR, meets the request's conditions."""
    if value is None:
        return False
    if request.choose_by == "repetition":
        return value <= request.max_rur
    highest = 1.0 if request.max_toxicity is None else request.max_toxicity
    return (request.min_toxicity or 0.0) <= value <= highest


def toxic_prompts(
    rows: Iterable[tuple[str, dict[str, Any]]],
    request: Request,
    tokenizer: MaybeTokenizer,
    score: Score | None,
) -> list[Sample]:
    """Samples from rows of RealToxicityPrompts, given as (name for messages, row), with a toxicity between
    min_toxicity and max_toxicity.

    choose_by: `prompt` or `continuation` use the data set's own scores; `completion` uses the score of this
    model's own completion, which the sample then contains (the paper's protocol). Stops reading when there
    are enough.
    """
    ways = ("prompt", "continuation", "completion")
    choose_by = request.choose_by or "prompt"
    if choose_by not in ways:
        raise unknown("choose_by", choose_by, ways)
    fresh = _fresh_prompts(rows, request, tokenizer)
    if choose_by != "completion":
        matching = (
            sample for label, row, sample in fresh if fits(request, read_toxicity(row, choose_by, label))
        )
        return list(islice(matching, request.count))
    if score is None:
        raise UserError("choose_by: completion needs a model to complete the prompts; use it in a recipe")
    chosen: list[Sample] = []
    while len(chosen) < request.count and (batch := [sample for *_, sample in islice(fresh, AT_ONCE)]):
        scored = score([prompt.text or "" for prompt in batch])
        chosen += [
            replace(prompt, completion=completion)
            for prompt, (completion, value) in zip(batch, scored, strict=True)
            if completion and fits(request, value)
        ]
    return chosen[: request.count]


def _fresh_prompts(
    rows: Iterable[tuple[str, dict[str, Any]]], request: Request, tokenizer: MaybeTokenizer
) -> Iterator[tuple[str, dict[str, Any], Sample]]:
    """Rows of the request's split that no other set uses; the prompt's words determine its split."""
    seen = set(map(plain, request.taken))
    for label, row in rows:
        sample = parse_sample(row, label, request.answer)
        if sample.words is None:
            raise UserError(
                f"{label} has token ids, but choose_by needs a text; give one, or leave choose_by out"
            )
        key = plain(sample.words)
        if key not in seen and (prompt_split(key) == "test") == (request.split == "test"):
            seen.add(key)
            yield label, row, _render_prompt(sample, request, tokenizer, label)


def plain(text: str) -> str:
    """The form by which prompts are compared: without differences of case, white space and Unicode
    variants."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_split(text: str) -> str:
    """The split of a prompt from a source without splits: 70 % are for reference, 30 % for the test."""
    return "test" if random.Random(f"sparc3/split/{plain(text)}").random() < 0.3 else "reference"


def overlap(first: Iterable[Sample], second: Iterable[Sample]) -> list[str]:
    """Prompts that occur in both, ignoring case and white space."""
    keys = {plain(sample.words) for sample in first if sample.words}
    return [sample.words for sample in second if sample.words and plain(sample.words) in keys]
