"""Units that the whole model stands on are left out of every selection: those whose removal alone multiplies perplexity."""

import logging
import math

import torch

from .. import distributed
from ..ablation import ablated
from ..attribution.extremes import largest_writes
from ..batches import joined
from ..circuit import Circuit
from ..errors import NonFinite
from ..evaluation.observations import finite
from ..evaluation.perplexity import Window, negative_log_likelihoods
from ..samples import ReferenceSet
from .steps import protects
from .work import Work

log = logging.getLogger("sparc3")
SUSPECTS, TEXTS, TOKENS = 12, 6, 256
"""How many neurons are tried alone, on how many general samples, of how many tokens each."""
RATIO = 1.5
"""A neuron without which perplexity is so many times as large is protected."""


def protect(work: Work) -> None:
    """Fill work.protected, and list it in the results' provenance; does nothing for heads, weights and quantised models.

    A screen, not a search: only the neurons that write hardest into the residual stream are tried, each alone, on a few general samples.
    """
    if not protects(work.recipe):
        return
    samples = ReferenceSet(work.references["general"].samples[:TEXTS])
    windows = [(ids[:TOKENS], min(len(ids), TOKENS) - 1) for s in joined(samples, work.tokenizer) if len(ids := s.input_ids or ()) > 1]
    if not windows:
        return
    before = _perplexity(work, windows)
    if not math.isfinite(before):
        raise NonFinite("the model's perplexity on general samples is not finite; load it in bfloat16 or float32")
    found = {}
    for name, index in _suspects(work, samples):
        with ablated(work.model, Circuit("neuron", {name: (index,)})):
            found[name, index] = _perplexity(work, windows) / before
    kept = {unit: ratio for unit, ratio in found.items() if ratio >= RATIO}
    members = {name: tuple(sorted(index for other, index in kept if other == name)) for name in dict.fromkeys(name for name, _ in kept)}
    work.protected = Circuit("neuron", members, work.described) if members else None
    work.noted["protected"] = [{"module": name, "index": index, "perplexity_ratio": finite(ratio)} for (name, index), ratio in kept.items()]
    log.info("protected: %d of %d suspects multiply perplexity by %.3g or more (at most %.3g)", len(kept), len(found), RATIO, max(found.values()))


def _suspects(work: Work, samples: ReferenceSet) -> list[tuple[str, int]]:
    writes = distributed.first(largest_writes(work.model, samples, work.tokenizer))
    flat = torch.cat(list(writes.values()))
    places = [(name, index) for name, values in writes.items() for index in range(len(values))]
    return [places[i] for i in flat.argsort(descending=True, stable=True)[:SUSPECTS].tolist()]


def _perplexity(work: Work, windows: list[Window]) -> float:
    """Infinite where the model gave a NaN or Inf: then it is broken indeed."""
    nll = [math.inf if value is None else value for value in negative_log_likelihoods(work.model, windows, progress=False)]
    return float(torch.tensor(sum(nll) / sum(predicted for _, predicted in windows)).exp())
