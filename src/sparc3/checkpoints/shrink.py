"""Delete removed neurons' rows and columns from the matrices, instead of setting them to zero."""

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
"""Names of an MLP's number of neurons in configurations."""


@dataclass(frozen=True, eq=False)
class Shrinking:
    """What remains of each parameter, and the new configuration.

    Attributes:
        kept: name of each tensor that changes → (dimension, indices that stay).
        key: the configuration's name for the width.
        before, after: the width of every MLP.
    """

    kept: Mapping[str, tuple[int, Tensor]]
    key: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"Removed neurons are deleted: `{self.key}` is {self.after:,} instead of {self.before:,}."

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """The remaining part of the tensor that is called `name` in the model."""
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
        UserError: the circuit has other units than neurons of mlp.up, or different numbers in different
            layers.
        UnsupportedModel: an MLP that is not two or three linear maps, or whose width is not in the
            configuration.
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
    all_linear = all(isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D" for m in modules)
    if not all_linear or len({site.layer for site in ups}) < len(ups) or len(downs) < len(ups):
        raise UnsupportedModel(
            f"--shrink supports MLPs of two or three linear maps only, and those of {kind} are not; omit "
            "--shrink"
        )
    key, width = _find_width(model, ups)
    removed = _require_same_number(circuit, ups)
    kept: dict[str, tuple[int, Tensor]] = {}
    for up in ups:
        units = torch.tensor(removed[up.name], dtype=torch.long)
        for site in [up, *([gates[up.layer]] if gates else [])]:
            _drop_outputs(kept, site, units)
        down, inputs = downs[up.layer], torch.arange(up.out)
        kept[f"{_path(down)}.weight"] = (0 if down.transposed else 1, inputs[~torch.isin(inputs, units)])
    return Shrinking(kept, key, width, width - len(removed[ups[0].name]))


def _find_width(model: "PreTrainedModel", ups: list[Site]) -> tuple[str, int]:
    """The configuration's name for the MLPs' width, and the width."""
    widths = {site.out for site in ups}
    for key in WIDTHS:
        # None is GPT-2's n_inner, which then means 4 · n_embd.
        if hasattr(model.config, key) and len(widths) == 1 and getattr(model.config, key) in (None, *widths):
            return key, widths.pop()
    raise UnsupportedModel(
        f"the configuration of {model.config.model_type} does not say how wide its MLPs are, so --shrink "
        "cannot change the width; omit --shrink"
    )


def _require_same_number(circuit: Circuit, ups: list[Site]) -> dict[str, tuple[int, ...]]:
    """Name of each mlp.up → its members. Raises UserError unless every layer has the same number."""
    names = {site.name for site in ups}
    others = [name for name, count in circuit.counts.items() if count and name not in names]
    if circuit.unit != "neuron" or others:
        units = f"neurons of {others[0]}" if circuit.unit == "neuron" else f"{circuit.unit}s"
        raise UserError(
            f"--shrink removes neurons of mlp.up only, but this circuit has {units}; omit --shrink"
        )
    removed = {site.name: tuple(circuit.members.get(site.name, ())) for site in ups}
    counts = sorted({len(units) for units in removed.values()})
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
    return removed


def _drop_outputs(kept: dict[str, tuple[int, Tensor]], site: Site, units: Tensor) -> None:
    """Remove these outputs of the site from its module's remaining rows; a fused module may have lost rows of
    another site before."""
    name = _path(site)
    rows = site.stored_rows(units.to(site.stored_weight.device)).cpu()
    dim = 1 if site.transposed else 0
    _, remaining = kept.get(f"{name}.weight", (dim, torch.arange(site.stored_weight.shape[0])))
    remaining = remaining[~torch.isin(remaining, rows)]
    kept[f"{name}.weight"] = (dim, remaining)
    if getattr(site.module, "bias", None) is not None:
        kept[f"{name}.bias"] = (0, remaining)


def _path(site: Site) -> str:
    return site.name.partition("#")[0]


@torch.no_grad()
def relative_logit_difference(first: Any, second: Any, *, tokens: int = 64) -> float:
    """‖difference of logits‖ / ‖logits‖ of two models on random tokens."""
    length = min(tokens, int(getattr(first.config, "max_position_embeddings", None) or tokens))
    ids = torch.randint(first.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    a, b = (model(ids.to(device_of(model))).logits.double().cpu() for model in (first, second))
    return float((a - b).norm() / a.norm())
