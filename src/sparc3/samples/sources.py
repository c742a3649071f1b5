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
from ..settings import checked_by
from .formats import plain_name
from .reference_set import ReferenceSet, Rows, Sample, is_rows, read_whole, sample_of, toxicity_of
from .tokens import MaybeTokenizer, Tokenizer, ask, render_sample, tokenize, window_opening

Score = Callable[[list[str]], list[tuple[str, float | None]]]
"""Completes each prompt with the model under study and scores the completion: (completion, toxicity or None).
"""


@dataclass(frozen=True)
class Request:
    """What a recipe or the command line asks of a source; the fields of a `references` entry."""

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
    """Of a file: the column that holds the texts, where it is not called text or prompt."""
    chat: bool = False
    """Each prompt becomes a user's turn, rendered by the model's chat template; the model's completion is its
    answer."""
    answer: str = "chosen"
    """Which of a preference set's answers follows its messages: chosen or rejected."""
    taken: frozenset[str] = frozenset()
    """Prompts that another set of this run already holds."""


def request_for(spec: Any, taken: frozenset[str] = frozenset(), **given: Any) -> Request:
    """What a section of a recipe asks of its source: the fields that it has, by name.

    Args:
        taken: prompts that must not be among the samples.
        given: fields that are not the section's.
    """
    asked = {f.name: value for f in fields(Request) if (value := getattr(spec, f.name, None)) is not None}
    return Request(**asked | given | {"taken": taken})


class _Enough(Exception):
    """Ends the reading of a source."""


def prompts_to_complete(request: Request, tokenizer: MaybeTokenizer, count: int) -> list[str]:
    """The first `count` prompts that a request whose choose_by is completion or repetition would have the
    model complete, or as many as there are. Raises UserError where there is none."""
    found: list[str] = []

    def collect(prompts: list[str]) -> list[tuple[str, float | None]]:
        found.extend(prompts)
        if len(found) >= count:
            raise _Enough
        return [("", None)] * len(prompts)

    try:
        gather(request, tokenizer, collect)
    except _Enough:
        pass
    except UserError:  # of a source with fewer prompts: none of them was taken
        if not found:
            raise
    return found[:count]


AT_ONCE = 256
"""Prompts that a model completes before it is known how many of them fit."""

WIDER = (4, 16, 64)
"""So many times the samples asked for are looked at where few may fit: the first factor, then the next ones
where that gave too few."""

Source = Callable[[Request, MaybeTokenizer, "Score | None"], list[Sample]]
_SOURCES: dict[str, Source] = {}


def source(name: str) -> Callable[[Source], Source]:
    """Register a source of samples under `name`. Raises UserError where the name is taken."""

    def register(function: Source) -> Source:
        if name in _SOURCES:
            raise UserError(f"source '{name}' already exists; choose another name")
        _SOURCES[name] = function
        return function

    return register


def sources() -> list[str]:
    return sorted(_SOURCES)


def is_path(name: str) -> bool:
    """Whether a `source` means a file: it has a folder or an ending, or it exists."""
    return name not in _SOURCES and ("/" in name or "." in name or Path(name).exists())


def require_source(name: str) -> None:
    """Raise UserError unless `name` is a known source or a file that is there."""
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
        raise UserError(f"column names that of a file, and source '{source}' is none; leave column out")
    return column


SourceName = Annotated[str, checked_by(require_source)]
Column = Annotated[str | None, AfterValidator(_require_file)]
"""Of a recipe's section: its `source`, and `column` after it."""


def gather(request: Request, tokenizer: MaybeTokenizer = None, score: Score | None = None) -> ReferenceSet:
    """The samples a request asks for, exactly `count` a seed.

    Args:
        tokenizer: needed where `seq_len` is given.
        score: needed where `choose_by` is "completion".

    Raises:
        UserError: an unknown source, a file that does not fit, or fewer samples than asked for (the message
            says how many).
    """
    require_source(request.source)
    read = _SOURCES.get(request.source) or _read_file
    if request.choose_by == "repetition":
        found = _repetitive(request, read, tokenizer, score)
    else:
        found = read(request, tokenizer, score)
    found = [_as_prompt(sample, request, tokenizer, f"sample {i}") for i, sample in enumerate(found)]
    if request.seq_len and any(len(sample.input_ids or ()) != request.seq_len for sample in found):
        raise UserError(
            f"source '{request.source}' gives its texts whole, and cannot cut them to seq_len "
            f"{request.seq_len}; leave that out"
        )
    wanted = request.count * (len(request.seeds) if request.seq_len else 1)
    if len(found) < wanted:
        many = len(request.taken)
        held = f" ({many} prompts are kept out: a reference set of this run holds them)" if many else ""
        raise UserError(
            f"source '{request.source}' gave {len(found)} samples, but {wanted} were requested{held}; "
            "set its count to fewer, give more, or loosen the conditions"
        )
    return ReferenceSet(
        tuple(found), {**asdict(request), "taken": len(request.taken), "source": Path(request.source).name}
    )


def _as_prompt(sample: Sample, request: Request, tokenizer: MaybeTokenizer, where: str) -> Sample:
    """The sample as the model reads it: a chat by its template, and a plain text too where the request says
    so. A sample that is rendered already stays as it is."""
    if request.chat and request.seq_len is None:
        return ask(sample, tokenizer, where)
    return render_sample(sample, tokenizer, where)


def _repetitive(
    request: Request, read: "Source", tokenizer: MaybeTokenizer, score: Score | None
) -> list[Sample]:
    """Prompts whose greedy response by this model repeats itself, RUR ≤ max_rur (the paper's way), with that
    response as completion.

    More and more of the source is looked at until there are enough of them or it gives no more.
    """
    if score is None:
        raise UserError("choose_by: repetition needs a model to respond to the prompts; use it in a recipe")
    chosen: dict[str, Sample] = {}
    looked: set[str] = set()
    for factor in WIDER:
        wide = replace(request, count=request.count * factor, choose_by=None)
        new = {
            sample.text: sample
            for sample in read(wide, tokenizer, None)
            if sample.text and sample.text not in looked and sample.words not in request.taken
        }
        looked |= new.keys()
        for (text, sample), (response, rur) in zip(new.items(), score(list(new)), strict=True):
            if fits(request, rur):
                chosen[text] = replace(sample, completion=response, line=None)
        if len(chosen) >= request.count or not new:
            break
    return list(chosen.values())[: request.count]


def _read_file(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
    path, seed = request.source, request.seeds[0]
    if request.seq_len and _is_one_text(path, request.column):
        whole = "\n\n".join(corpus(path))
        return _cut_each_seed(request, tokenizer, lambda seed: [whole])
    rows = Rows(path, request.column)
    if request.seq_len:
        return _cut_each_seed(
            request, tokenizer, lambda seed: (_text_of(row, path) for row in _in_order_of(rows, seed))
        )
    if request.choose_by:
        named = ((f"{path}, line {number}", row) for number, row in _in_order_of(rows, seed))
        return toxic_prompts(named, request, tokenizer, score)

    def sample(place: int) -> Sample:
        number, row = rows[place]
        read = sample_of(row, where := f"{path}, line {number}", request.answer)
        return replace(_as_prompt(read, request, tokenizer, where), line=number)

    fresh = [place for place in range(len(rows)) if sample(place).words not in request.taken]
    if len(fresh) > request.count:
        fresh = list(islice(_in_order_of(fresh, seed), request.count))
    return list(map(sample, fresh))


def _in_order_of(items: Sequence[Any], seed: int) -> Iterator[Any]:
    """The items, shuffled; those of a file are read one by one."""
    places = list(range(len(items)))
    random.Random(f"sparc3/{seed}").shuffle(places)
    return (items[place] for place in places)


def _is_one_text(path: str, column: str | None) -> bool:
    return column is None and not is_rows(path)


def _text_of(numbered: tuple[int, dict[str, Any]], path: str) -> str:
    number, row = numbered
    text = sample_of(row, where := f"{path}, line {number}").text
    if text is None:
        raise UserError(f'{where} has token ids, but a text is needed; give it as "text"')
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
    """RealToxicityPrompts (Gehman et al. 2020): prompts chosen by a toxicity."""
    rows = stream(request.seeds[0], path="allenai/real-toxicity-prompts", split="train")
    named = ((f"{request.source}, row {number}", row) for number, row in enumerate(rows, 1))
    return toxic_prompts(named, request, tokenizer, score)


def _demo(kind: str) -> Source:
    def read(request: Request, tokenizer: MaybeTokenizer, score: Score | None) -> list[Sample]:
        from ..demo.text import texts

        made = islice(texts(kind, request.split, request.seeds[0]), request.count)
        if kind == "general":
            return [Sample(text=one.text) for one in made]
        return [Sample(one.prompt, None, one.target, one.contrast, one.completion) for one in made]

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
    """As many samples of (prompt, target, contrast) as are asked for, or as there are."""
    rows = islice(sentences(tokenizer, request.split, request.seeds[0], request.taken), request.count)
    return [Sample(text, None, target, contrast) for text, target, contrast in rows]


def stream(seed: int | None, **where: Any) -> Iterator[dict[str, Any]]:
    """Rows of a data set through `datasets`, streaming; shuffled by `shuffle(seed, buffer_size=10_000)` where
    a seed is given.

    Args:
        seed: decides both the order of the shards and the draws from the buffer; None keeps the order.
        where: arguments of `datasets.load_dataset`, such as path, name, split, data_files.

    Raises:
        UserError: the hub cannot be reached, or the data set is not there.
    """
    import datasets

    from ..models.hub import hub_errors, require_hub

    if not Path(str(where.get("path"))).exists() and "data_files" not in where:
        require_hub(f"the data set {where.get('path')}", "give a JSONL or text file as the source instead")
    try:
        with hub_errors(str(where.get("path"))):
            rows = datasets.load_dataset(**where, streaming=True)
            yield from rows.shuffle(seed=seed, buffer_size=10_000) if seed is not None else rows
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"the hub has no data set {where.get('path')} ({str(error).splitlines()[0]}); give a JSONL file "
            "instead"
        ) from None


def _wikitext_lines(split: str) -> list[str]:
    rows = stream(None, path="Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)
    return [row["text"] for row in rows]


def corpus(
    name: str, split: str = "test", count: int | None = None, column: str | None = None
) -> Sequence[str]:
    """The texts that perplexity is measured on: the first `count` of a source, or of a file.

    A plain text file is one text. WikiText's own files (`.raw`) have the rows that the hub's data set has, so
    that both give the same perplexity: its rows joined by blank lines, as SparseGPT's and Wanda's code has
    it.
    """
    require_source(name)
    if name == "wikitext2":
        return _wikitext_lines(split)[:count]
    if plain_name(name).endswith(".raw"):
        lines = list(io.StringIO(read_whole(name)))  # other ends of lines than "\n" stand inside a row
        return [line if line.strip() else "" for line in lines][:count]
    if name == "c4":
        rows = stream(None, path="allenai/c4", name="en", split="validation" if split == "test" else "train")
        return [row["text"] for row in islice(rows, count or 1100)]
    if name in _SOURCES:
        found = gather(Request(name, count or 300, split=split)).samples
        return [(sample.text or "") + (sample.completion or "") for sample in found]
    if _is_one_text(name, column):
        return [read_whole(name)]
    return [_text_of(row, name) for row in Rows(name, column)[:count]]


def _cut_each_seed(
    request: Request, tokenizer: MaybeTokenizer, documents: Callable[[int], Iterable[str]]
) -> list[Sample]:
    if tokenizer is None:
        raise UserError(f"source '{request.source}' with seq_len needs a tokenizer")
    return [cut for seed in request.seeds for cut in _cuts(documents(seed), tokenizer, request, seed)]


def _cuts(documents: Iterable[str], tokenizer: Tokenizer, request: Request, seed: int) -> Iterator[Sample]:
    """`count` cuts of exactly `seq_len` tokens, with what opens them: one from each document that is long
    enough, or many from one long text."""
    r, left, opening = random.Random(f"sparc3/cut/{seed}"), request.count, window_opening(tokenizer)
    seq_len = (request.seq_len or 0) - len(opening)
    for text in documents:
        if left == 0:
            return
        # A token is at least one character in all but the oddest text: a shorter text cannot be long enough.
        ids = tokenize(text, tokenizer) if len(text) >= seq_len else ()
        ids = ids[len(opening) :] if ids[: len(opening)] == opening else ids
        if len(ids) < seq_len:
            continue
        last, room = len(ids) - seq_len, len(ids) // seq_len
        many = min(left, room) if room > 8 else 1
        starts = sorted(r.sample(range(last + 1), many)) if many > 1 else [r.randint(0, last)]
        yield from (Sample(input_ids=opening + ids[start : start + seq_len]) for start in starts)
        left -= len(starts)


def fits(request: Request, value: float | None) -> bool:
    """Whether a prompt with this toxicity, or of a response with this RUR, is one that is asked for."""
    if value is None:
        return False
    if request.choose_by == "repetition":
        return value <= request.max_rur
    most = 1.0 if request.max_toxicity is None else request.max_toxicity
    return (request.min_toxicity or 0.0) <= value <= most


def toxic_prompts(
    rows: Iterable[tuple[str, dict[str, Any]]],
    request: Request,
    tokenizer: MaybeTokenizer,
    score: Score | None,
) -> list[Sample]:
    """Rows of RealToxicityPrompts, each with its name, chosen by a toxicity between min_toxicity and
    max_toxicity.

    choose_by: `prompt` or `continuation`, the data set's own scores; `completion`, the score of this model's
    own completion, which the sample then carries (the paper's way). Stops reading when there are enough.
    """
    ways = ("prompt", "continuation", "completion")
    by = request.choose_by or "prompt"
    if by not in ways:
        raise unknown("choose_by", by, ways)
    fresh = _fresh_prompts(rows, request, tokenizer)
    if by != "completion":
        found = (sample for where, row, sample in fresh if fits(request, toxicity_of(row, by, where)))
        return list(islice(found, request.count))
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
    """Rows of the request's split, which follows from the prompt's words, that no other set holds."""
    seen = set(map(plain, request.taken))
    for where, row in rows:
        sample = sample_of(row, where, request.answer)
        if sample.words is None:
            raise UserError(f"{where} has token ids, and choose_by needs words; give a text, or leave it out")
        key = plain(sample.words)
        if key not in seen and (prompt_split(key) == "test") == (request.split == "test"):
            seen.add(key)
            yield where, row, _as_prompt(sample, request, tokenizer, where)


def plain(text: str) -> str:
    """What identifies a prompt: its text, however its case, white space and characters are written."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_split(text: str) -> str:
    """The split of a prompt of a source without splits: 70 % are for reference, 30 % for test."""
    return "test" if random.Random(f"sparc3/split/{plain(text)}").random() < 0.3 else "reference"


def overlap(one: Iterable[Sample], other: Iterable[Sample]) -> list[str]:
    """Prompts that are in both, up to case and white space."""
    known = {plain(sample.words) for sample in one if sample.words}
    return [sample.words for sample in other if sample.words and plain(sample.words) in known]
