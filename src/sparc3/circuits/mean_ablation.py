"""Mean ablation: units whose outputs are replaced by their means over reference samples, for a trial.

The literature on circuits does so (Wang et al. 2022, arXiv 2211.00593). The model's weights cannot represent
it, so it serves only to measure: a circuit that was measured with it is never exported.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.sites import readers_of
from ..storage import digest, fingerprint
from .circuit import Circuit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class MeanAblation:
    """Heads, or neurons of `mlp.up`, whose outputs are replaced by their means.

    Attributes:
        circuit: the units.
        means: name of each mlp.up or attn.o → [2, inputs of the matrix that reads its units]: the mean at the
            first token of a text, and that at all others. The first token's outputs are unlike the others',
            because attention rests on it where it has nothing to do (Xiao et al. 2024, arXiv 2309.17453).
    """

    circuit: Circuit
    means: Mapping[str, Tensor]

    def __len__(self) -> int:
        """How many units it changes."""
        return len(self.circuit)

    @property
    def fingerprint(self) -> str:
        return fingerprint({"units": self.circuit.fingerprint, "means": digest(dict(self.means))})


@contextmanager
def replace_by_means(model: "PreTrainedModel", change: MeanAblation) -> Iterator["PreTrainedModel"]:
    """Inside, the outputs of the units are their means at every token; afterwards no hook is left, even after
    an exception. Every text must begin at the first column of the model's input, as in `evaluate` for
    indirect objects; a continuation written token by token does not.

    Raises:
        UserError: weights as units, units that this model does not have or that have no mean, or an expert's
            neurons, which are computed in one call.
    """
    circuit = change.circuit
    if circuit.unit == "weight":
        raise UserError("a weight has no output to replace by its mean; use neurons of mlp.up or heads")
    masks = circuit.masks(model)
    shape: list[int] = []
    with ExitStack() as hooks:
        embeddings = model.get_input_embeddings()
        hooks.callback(embeddings.register_forward_pre_hook(partial(_note_shape, shape)).remove)
        for name, reader in readers_of(model, circuit.sites(model).values()).items():
            mean, mask = change.means.get(name), masks[name]
            if mean is None or mean.shape != (2, reader.inp):
                raise UserError(
                    f"the circuit names units of {name}, and their means are missing; compute means there too"
                )
            if circuit.unit == "head":
                mask = mask.repeat_interleave(reader.inp // reader.heads)
            replace = partial(_replace, shape, mask, mean)
            hooks.callback(reader.module.register_forward_pre_hook(replace).remove)
        yield model


def _note_shape(shape: list[int], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    shape[:] = args[0].shape[:2]


def _replace(
    shape: list[int], mask: Tensor, mean: Tensor, _: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The input with its masked features at their means, however the module flattens its tokens."""
    x = args[0].reshape(*shape, -1)
    first, others = mean.to(x)
    means = torch.cat([first.expand(1, -1), others.expand(shape[1] - 1, -1)])  # [T, width]
    return torch.where(mask.to(x.device), means, x).view(args[0].shape), *args[1:]
