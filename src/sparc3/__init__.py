"""sparc3: find the parts of a language model that produce a behaviour, remove them, and prove what that did.

The public names below are loaded on first use; importing sparc3 itself loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attribution.attribute import attribute
    from .checkpoints.export import export
    from .checkpoints.push import push
    from .circuits.ablate import ablate_, ablated
    from .circuits.circuit import Circuit
    from .circuits.select import contrast, select
    from .errors import Sparc3Error, UserError
    from .evaluation.evaluate import evaluate
    from .experiment.prune_sequentially import prune_sequentially
    from .experiment.run import run
    from .models.load import load_model
    from .recipe.schema import load_recipe
    from .results import Results
    from .samples.reference_set import ReferenceSet, Sample
    from .scores import Scores

_MODULES = {
    "Circuit": "circuits.circuit",
    "ReferenceSet": "samples.reference_set",
    "Results": "results",
    "Sample": "samples.reference_set",
    "Scores": "scores",
    "Sparc3Error": "errors",
    "UserError": "errors",
    "ablate_": "circuits.ablate",
    "ablated": "circuits.ablate",
    "attribute": "attribution.attribute",
    "contrast": "circuits.select",
    "evaluate": "evaluation.evaluate",
    "export": "checkpoints.export",
    "load_model": "models.load",
    "load_recipe": "recipe.schema",
    "prune_sequentially": "experiment.prune_sequentially",
    "push": "checkpoints.push",
    "run": "experiment.run",
    "select": "circuits.select",
}
"""Public name → the module that defines it."""

# fmt: off
__all__ = [
    "Circuit", "ReferenceSet", "Results", "Sample", "Scores", "Sparc3Error", "UserError", "__version__",
    "ablate_", "ablated", "attribute", "contrast", "evaluate", "export", "load_model", "load_recipe",
    "prune_sequentially", "push", "run", "select",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sparc3' has no attribute '{name}'")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
