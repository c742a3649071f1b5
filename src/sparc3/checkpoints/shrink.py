"""Taking removed neurons out of the matrices, where zeroing would leave their rows and columns in place."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..circuits.circuit import Circuit
from ..errors import UnsupportedModel, UserError
from ..models.offloading import device_of
from ..models.sites import Site, family_of, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configurations call the number of neurons of an MLP."""


@dataclass(frozen=True, eq=False)
class Shrinking:
    """What of each parameter stays, and what the configuration then says.

    Attributes:
        kept: name of the model's tensor → (dimension, indices that stay), of those that change.
        key: the configuration's name of the width.
        before, after: the width of every MLP.
    """

    kept: Mapping[str, tuple[int, Tensor]]
    key: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"Removed neurons are deleted: `{self.key}` is {self.after:,} instead of {self.before:,}."

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor that is called `name` in the model."""
        if name not in self.kept:
            return tensor
        dim, indices = self.kept[name]
        return tensor.index_select(dim, indices.to(tensor.device)).contiguous()

    def configure_(self, path: Path) -> None:
        """Write the new width into a config.json; its other lines stay as they are."""
        content = {**json.loads(path.read_text(encoding="utf-8")), self.key: self.after}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_shrinking(model: "PreTrainedModel", circuit: Circuit) -> Shrinking:
    """How to take the circuit's neurons out of the model's MLPs.

    Raises:
        UserError: the circuit is not of neurons of mlp.up, or does not take the same number from every layer.
        UnsupportedModel: an MLP that is not two or three linear maps, or whose width the configuration does
            not say.
    """
    if not circuit.zeroes:
        raise UserError(
            f"--shrink removes whole neurons, but this circuit is{circuit.at_strength}; omit --shrink, or "
            "use strength 1"
        )
    kind = model.config.model_type
    ups, downs = sites_of(model, ["mlp.up"]), {site.layer: site for site in sites_of(model, ["mlp.down"])}
    gated = "mlp.gate" in family_of(model).roles
    gates = {site.layer: site for site in sites_of(model, ["mlp.gate"])} if gated else {}
    modules = [site.module for site in (*ups, *downs.values(), *gates.values())]
    plain = all(isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D" for m in modules)
    if not plain or len({site.layer for site in ups}) < len(ups) or len(downs) < len(ups):
        raise UnsupportedModel(
            f"--shrink supports MLPs of two or three linear maps only, and those of {kind} are not; omit "
            "--shrink"
        )
    key, width = _width(model, ups)
    gone = _same_number(circuit, ups)
    kept: dict[str, tuple[int, Tensor]] = {}
    for up in ups:
        units = torch.tensor(gone[up.name], dtype=torch.long)
        for part in [up, *([gates[up.layer]] if gates else [])]:
            _drop_outputs(kept, part, units)
        down, inputs = downs[up.layer], torch.arange(up.out)
        kept[f"{_path(down)}.weight"] = (0 if down.transposed else 1, inputs[~torch.isin(inputs, units)])
    return Shrinking(kept, key, width, width - len(gone[ups[0].name]))


def _width(model: "PreTrainedModel", ups: list[Site]) -> tuple[str, int]:
    """The configuration's name of the MLPs' width, and the width."""
    widths = {site.out for site in ups}
    for key in WIDTHS:
        if hasattr(model.config, key) and len(widths) == 1 and getattr(model.config, key) in (None, *widths):
            return key, widths.pop()
    raise UnsupportedModel(
        f"the configuration of {model.config.model_type} does not say how wide its MLPs are, so --shrink "
        "cannot change the width; omit --shrink"
    )


def _same_number(circuit: Circuit, ups: list[Site]) -> dict[str, tuple[int, ...]]:
    """mlp.up's name → its members, as many in each layer."""
    own = {site.name for site in ups}
    others = [name for name, count in circuit.counts.items() if count and name not in own]
    if circuit.unit != "neuron" or others:
        what = f"neurons of {others[0]}" if circuit.unit == "neuron" else f"{circuit.unit}s"
        raise UserError(
            f"--shrink removes neurons of mlp.up only, but this circuit has {what}; omit --shrink"
        )
    gone = {site.name: tuple(circuit.members.get(site.name, ())) for site in ups}
    counts = sorted({len(units) for units in gone.values()})
    if len(counts) > 1:
        raise UserError(
            "--shrink must remove the same number of neurons from every layer, but this circuit takes "
            f"{counts[0]} from one and {counts[-1]} from another; select with --scope site (selection.scope: "
            "site in a recipe), or omit --shrink"
        )
    if counts[0] in (0, ups[0].out):
        raise UserError(
            "--shrink must remove at least one neuron of each layer and leave one, but this circuit takes "
            f"{counts[0]} of {ups[0].out}"
        )
    return gone


def _drop_outputs(kept: dict[str, tuple[int, Tensor]], site: Site, units: Tensor) -> None:
    """Take these outputs of the site out of its module, from what another site of the same module left."""
    name = _path(site)
    rows = site.stored_rows(units.to(site.stored.device)).cpu()
    dim = 1 if site.transposed else 0
    _, left = kept.get(f"{name}.weight", (dim, torch.arange(site.stored.shape[0])))
    left = left[~torch.isin(left, rows)]
    kept[f"{name}.weight"] = (dim, left)
    if getattr(site.module, "bias", None) is not None:
        kept[f"{name}.bias"] = (0, left)


def _path(site: Site) -> str:
    return site.name.partition("#")[0]


@torch.no_grad()
def furthest(one: Any, other: Any, *, tokens: int = 64) -> float:
    """‖difference‖ / ‖logits‖ of two models on random tokens."""
    length = min(tokens, int(getattr(one.config, "max_position_embeddings", None) or tokens))
    ids = torch.randint(one.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    a, b = (model(ids.to(device_of(model))).logits.double().cpu() for model in (one, other))
    return float((a - b).norm() / a.norm())
