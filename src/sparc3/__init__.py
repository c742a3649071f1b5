"""sparc3: find the parts of a language model that produce a behaviour, remove them, and prove what that did.

The public names below are loaded on first use; importing sparc3 itself loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .ablation import ablate_, ablated
    from .attribution import attribute
    from .checkpoint import export
    from .circuit import Circuit
    from .compression import prune_sequentially
    from .errors import Sparc3Error, UserError
    from .evaluation.evaluate import evaluate
    from .experiment import run
    from .models import load_model
    from .publishing import push
    from .recipe import load_recipe
    from .results import Results
    from .samples import ReferenceSet, Sample
    from .scores import Scores
    from .selection import contrast, select

_HOMES = {
    "ablate_": "ablation", "ablated": "ablation", "export": "checkpoint", "attribute": "attribution", "Circuit": "circuit",
    "Sparc3Error": "errors", "UserError": "errors", "evaluate": "evaluation", "run": "experiment", "load_model": "models",
    "load_recipe": "recipe", "prune_sequentially": "compression", "push": "publishing", "Results": "results", "ReferenceSet": "samples",
    "Sample": "samples", "Scores": "scores", "contrast": "selection", "select": "selection",
}  # fmt: skip

__all__ = [
    "Circuit", "ReferenceSet", "Results", "Sample", "Scores", "Sparc3Error", "UserError", "__version__", "ablate_", "ablated",
    "attribute", "contrast", "evaluate", "export", "load_model", "load_recipe", "prune_sequentially", "push", "run", "select",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparc3' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
