"""Token relevance: which tokens of a sample made its target likely."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import NonFinite, unknown
from ..models.load import context_length, vocabulary_size
from ..models.memory import logits_at
from ..models.offloading import device_of
from ..samples.batches import Encoded, encode
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.tokens import join_characters, texts_of
from ..settings import parse
from . import rules
from .options import AttributionOptions
from .patching import freeze, lrp_rules
from .relevance import checkpoint_layers, sum_targets, watch_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("lrp", "cp-lrp", "gradient")
COLOURS = ("47, 95, 179", "200, 71, 27")
"""Red, green and blue of tokens with negative and with positive relevance."""


@dataclass(frozen=True, eq=False)
class TokenRelevance:
    """How much each token of a sample contributes to its target y. A notebook shows it as a heat map.

    Attributes:
        tokens: the text of each token that the model reads. If several tokens make up a character, the first
            has it, and the others are "".
        relevance: Σ_d x_td ∂̂y/∂x_td at the input embeddings x, [T], float32 on the CPU, in y's unit. CP-LRP
            conserves it: without biases and learned positions the sum is y (for logits). AttnLRP loses some
            in the softmax, and the plain gradient conserves nothing.
        targets: the tokens whose logits y sums; for the targets words and logwords, the number of words.
        positions: the positions whose logits are read; each target token comes one position later.
        against: the tokens whose logits y subtracts.
        y: the target, in logits; for the targets logprob and logwords in nats, for words a sum of
            probabilities.
        method: lrp, cp-lrp or gradient.
    """

    tokens: tuple[str, ...]
    relevance: Tensor
    targets: tuple[str, ...]
    positions: tuple[int, ...]
    against: tuple[str, ...]
    y: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": list(self.tokens),
            "relevance": self.relevance.tolist(),
            "positions": list(self.positions),
            "targets": list(self.targets),
            "against": list(self.against),
            "y": self.y,
        }

    def _repr_html_(self) -> str:
        joined = join_characters(self.tokens, self.relevance.tolist())
        largest = max(abs(value) for *_, value in joined) or 1.0
        spans = []
        for _, token, value in joined:
            # At most three quarters opaque, so that the text stays legible.
            colour = f"rgba({COLOURS[value > 0]}, {abs(value) / largest * 0.75:.2f})"
            text = escape(token).replace("\n", "↵<br>")
            spans.append(f'<span title="{value:+.3g}" style="background: {colour}">{text}</span>')
        target = f"<b>{escape('·'.join(self.targets))}</b>"
        if self.against:
            target += f" minus <b>{escape('·'.join(self.against))}</b>, logit difference"
        head = f"{escape(self.method)}: {target}, y = {self.y:.3g}"
        text = "".join(spans)
        return f'<div>{head}<div style="white-space: pre-wrap; line-height: 1.7">{text}</div></div>'


def attribute_tokens(
    model: "PreTrainedModel",
    samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: str = "lrp",
    target: str = "predicted",
    truncate: bool = False,
    epsilon: float = 0.0,
    words: str | Sequence[str | int] = (),
) -> list[TokenRelevance]:
    """The relevance of every token to its sample's target, taken at the input embeddings (Achtibat et al.
    2024), with one forward and one backward pass per sample.

    Args:
        samples: a ReferenceSet, texts, or token-id lists.
        tokenizer: the model's own; not needed for token ids, which are then shown as numbers.
        method: lrp, cp-lrp or gradient (gradient × input, no rules).
        target: predicted, label, contrast, completion (completion:N), next, logprob, words, logwords; see
            docs/targets.md.
        truncate: cut samples that are longer than the model's context instead of refusing them.
        epsilon, words: as in `attribute`.

    Returns:
        One TokenRelevance per sample, in order.

    Raises:
        UserError: an unknown name, or samples that do not fit the model or the target.
        UnsupportedModel: a module without a rule.
        NonFinite: a NaN or Inf, named by sample.
    """
    if method not in METHODS:
        raise unknown("method of token relevance", method, METHODS)
    references = ReferenceSet.of(samples)
    encoded = encode(
        references,
        tokenizer,
        target,
        context=context_length(model),
        vocabulary=vocabulary_size(model),
        truncate=truncate,
        words=parse(AttributionOptions, {"words": words}, "").word_list,
    )
    rule_set = replace(rules.CP_LRP if method == "cp-lrp" else rules.ATTN_LRP, epsilon=epsilon)
    rules_context = nullcontext() if method == "gradient" else lrp_rules(model, rule_set=rule_set)
    with freeze(model), rules_context, checkpoint_layers(model):
        results = [_attribute_one(model, item, method, tokenizer) for item in encoded]
    for index, item in enumerate(results):
        if not item.relevance.isfinite().all():
            raise NonFinite(
                f"{references.where(index)}: the relevance of its tokens is not finite; load the model in "
                "bfloat16 or float32"
            )
    return results


def _attribute_one(
    model: "PreTrainedModel", sample: Encoded, method: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> TokenRelevance:
    relevance = torch.zeros(len(sample.ids))

    def receive(grad: Tensor, x: Tensor) -> None:
        relevance.copy_((grad.double() * x.double()).sum(-1)[0])

    def watch(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return watch_gradient(output, (output,), receive)

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        ids = torch.tensor([sample.ids], device=device_of(model))
        logits = logits_at(model, ids, [0] * len(sample.positions), list(sample.positions))
        tokens = sample.tokens or (() if sample.among else tuple(logits.argmax(-1).tolist()))
        y = sum_targets(logits, [sample])
        y.backward()
    finally:
        hook.remove()

    def token_texts(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(texts_of(tokenizer, ids) if tokenizer else (f"[{token}]" for token in ids))

    return TokenRelevance(
        tokens=token_texts(sample.ids),
        relevance=relevance,
        targets=(f"any of {len(sample.among)} words",) if sample.among else token_texts(tokens),
        positions=sample.positions,
        against=token_texts(sample.against or ()),
        y=float(y.detach()),
        method=method,
    )
