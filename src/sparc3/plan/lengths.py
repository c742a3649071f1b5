"""How long the samples are: read where they are at hand, assumed, and said so, where they are on the hub or the model would choose them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batches import Encoded, parse_target
from ..errors import UserError
from ..models import load_tokenizer
from ..sources import Request, corpus, gather, is_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = {"realtoxicityprompts": 16, "ioi": 20}
"""Source → tokens of a prompt, about; of any other, 32."""

TEXTS = {"wikitext2": 310_000, "c4": 530_000}
"""Source → tokens of its test text, about."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample's text and of its completion, and whether they were read or assumed."""

    pairs: tuple[tuple[int, int], ...]
    assumed: bool = False

    def encoded(self, target: str, context: int) -> list[Encoded]:
        """Samples of these lengths, of which every token is the first one; longest first."""
        name, first = parse_target(target)
        made = [_encoded(place, text, min(completion, first or completion), name) for place, (text, completion) in enumerate(self.pairs)]
        return sorted((_cut(one, context) for one in made), key=lambda one: (-len(one.ids), one.index))

    @property
    def completed(self) -> bool:
        """Whether the samples have completions."""
        return any(completion > 1 for _, completion in self.pairs)

    @property
    def longest(self) -> int:
        return max(text for text, _ in self.pairs)


def _encoded(place: int, text: int, completion: int, target: str) -> Encoded:
    last = text - 1
    if target == "next":
        return Encoded(place, (0,) * text, tuple(range(last)), (0,) * last)
    if target == "completion":
        return Encoded(place, (0,) * (text + completion - 1), tuple(range(last, last + completion)), (0,) * completion)
    one = None if target == "predicted" else (0,)
    return Encoded(place, (0,) * text, (last,), one, one if target == "contrast" else None)


def _cut(one: Encoded, context: int) -> Encoded:
    if len(one.ids) <= context:
        return one
    positions = tuple(position for position in one.positions if position < context) or (context - 1,)
    return Encoded(one.index, one.ids[:context], positions, one.tokens and one.tokens[: len(positions)], one.against)


def tokenizer_at_hand(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of the demo or of a folder; of the hub's models none, which would have to be fetched."""
    if name != "demo" and not Path(name).is_dir():
        return None
    try:
        return load_tokenizer(name)
    except UserError:
        return None


def _at_hand(source: str) -> bool:
    return source.startswith("demo-") or is_path(source)


def of_samples(spec: Any, tokenizer: "PreTrainedTokenizerBase | None", default_count: int = 100) -> Lengths:
    """Of a reference set, or of a metric's prompts: anything with a source, a count, and maybe seeds, seq_len, choose_by."""
    count, seeds, seq_len = spec.count or default_count, getattr(spec, "seeds", (0,)), getattr(spec, "seq_len", None)
    if seq_len or spec.source in ("c4", "wikitext2"):
        return Lengths(((seq_len or 2048, 1),) * (count * len(seeds)))
    chosen = getattr(spec, "choose_by", None)
    if tokenizer is not None and _at_hand(spec.source) and chosen is None:
        found = gather(Request(spec.source, count, spec.split, seeds=seeds), tokenizer)
        return Lengths(tuple((_tokens(s.input_ids, s.text, tokenizer), _tokens(None, s.completion, tokenizer)) for s in found))
    text = PROMPTS.get(spec.source, 32)
    completion = getattr(spec, "max_new_tokens", 50) if chosen in ("completion", "repetition") else text
    return Lengths(((text, completion),) * count, assumed=True)


def _tokens(ids: Sequence[int] | None, text: str | None, tokenizer: "PreTrainedTokenizerBase") -> int:
    return max(1, len(ids) if ids is not None else len(tokenizer(text, verbose=False)["input_ids"]) if text else 1)


def of_text(spec: Any, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, bool]:
    """Tokens of a perplexity text, and whether they were assumed."""
    if tokenizer is None or not _at_hand(spec.source):
        whole = TEXTS.get(spec.source, 100_000)
        return (min(whole, 500 * spec.count) if spec.count else whole), True
    return _joined(corpus(spec.source, spec.split, spec.count), tokenizer), False


def _joined(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
