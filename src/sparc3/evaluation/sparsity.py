"""Sparsity: which share of the weights is exactly zero, counted in the matrices themselves, row by row."""

from typing import TYPE_CHECKING

import torch

from ..models import ROLES, family_of, sites_of
from ..samples import ReferenceSet
from .metrics import Measured, Metric, SparsitySettings, register
from .observations import Observations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sparsity(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", samples: ReferenceSet, settings: SparsitySettings, progress: bool = False
) -> Measured:
    """Share of exact zeros, one unit a site, and the least and the most of any output row: equal where every row is pruned alike."""
    roles = settings.sites or [role for role in ROLES if role in family_of(model).roles]
    rows = {site: (site.weight == 0).sum(1).cpu() for site in sites_of(model, roles)}
    zeros = tuple(float(counts.sum()) for counts in rows.values())
    weights = tuple(float(site.out * site.inp) for site in rows)
    least = min(float(counts.min()) / site.inp for site, counts in rows.items())
    most = max(float(counts.max()) / site.inp for site, counts in rows.items())
    return Measured(
        (
            Observations("sparsity", "all", "share of weights", "higher", zeros, weights),
            Observations("sparsity.row_min", "all", "share of the row", "higher", (least,), (1.0,)),
            Observations("sparsity.row_max", "all", "share of the row", "higher", (most,), (1.0,)),
        )
    )


register(Metric("sparsity", SparsitySettings, sparsity, prompts=False, gives=("sparsity", "sparsity.row_min", "sparsity.row_max")))
