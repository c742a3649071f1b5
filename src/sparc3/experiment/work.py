"""What every stage of a run needs: the recipe, the folder, the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..circuit import Circuit
from ..damping import Damping
from ..evaluation.metrics import Prepared
from ..recipe import Recipe
from ..samples import ReferenceSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Change = Circuit | Damping
"""What makes a variant: units that are removed, or damped."""


@dataclass
class Work:
    """One run under way.

    Attributes:
        described: id, architecture and fingerprint of the model as it was loaded.
        references: name → reference set, filled by the samples stage.
        prepared: the metrics with their test samples, filled by the samples stage.
        warnings: what the reader of the results should know.
        noted: what stages add to the results' provenance.
        protected: units that no selection takes, because the model breaks without one of them.
        rivals: variant → the best that another method does under the same budget, found by the search.
    """

    recipe: Recipe
    folder: Path
    progress: bool
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    described: dict[str, str]
    references: dict[str, ReferenceSet] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    noted: dict[str, Any] = field(default_factory=dict)
    protected: Circuit | None = None
    rivals: dict[str, Change] = field(default_factory=dict)

    def held(self, samples: Mapping[str, ReferenceSet], source: str) -> frozenset[str]:
        """Prompts that those of these reference sets which come from `source` hold."""
        found = [some for name, some in samples.items() if self.recipe.references[name.partition(".")[0]].source == source]
        return frozenset(sample.text for some in found for sample in some if sample.text)
