"""Where the prunable matrices of a model are."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..errors import UnsupportedModel, UserError, unknown
from .experts import MATRICES, matrices, one_by_one
from .families import PARTS, ROLES, Family, require_family
from .offloading import forward_within, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}

Rows = slice | torch.Tensor | None
"""Which output rows of a module belong to a site; None for all of them."""


@dataclass(frozen=True)
class Site:
    """One prunable matrix of a model.

    Attributes:
        name: the key in Scores and Circuits: the module's path ("model.layers.0.mlp.up_proj"), with "#up"
            after it where the module holds several matrices in one; of experts, that of the fused parameter
            ("model.layers.0.mlp.experts.gate_up_proj#3.up").
        role: canonical role ("mlp.up").
        layer: index of the decoder layer.
        module: the linear module; its weight is [out, in], or [in, out] where `transposed`. Of an expert, the
            module of all experts.
        out, inp: numbers of output and input features of the site.
        heads: number of attention heads that read or write it (query heads for attn.q and attn.o).
        transposed: whether the weight is stored [in, out], as GPT-2's Conv1D does.
        rows: the site's share of the module's output features.
        parameter: name of the module's weight.
        expert: which matrix of a parameter [experts, out, in] it is; None where the parameter is one matrix.
    """

    name: str
    role: str
    layer: int
    module: nn.Module
    out: int
    inp: int
    heads: int
    transposed: bool = False
    rows: Rows = None
    parameter: str = "weight"
    expert: int | None = None

    @property
    def hooked(self) -> nn.Module:
        """The module to hook, whose input and output are the site's. Of an expert there is one only inside
        `open_experts`."""
        if self.expert is None:
            return self.module
        return cast(nn.Module, self.module.__dict__[MATRICES][self.parameter, self.expert])

    @property
    def mlp(self) -> tuple[int, int | None]:
        """Layer and expert: what the mlp sites of one MLP have in common."""
        return self.layer, self.expert

    @property
    def stored(self) -> torch.Tensor:
        """The module's whole weight as a [module's out, in] view."""
        return self.matrix_of(value_of(self.module, self.parameter))

    def matrix_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Of the module's parameter, or another of its shape, the view `stored`."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix

    @property
    def weight(self) -> torch.Tensor:
        """The site's weight [out, in]: a view, or a copy where its rows are scattered in the module. Raises
        UserError where it is quantised."""
        self.require_values()
        return self.stored if self.rows is None else self.stored[self._on(self.stored)]

    @property
    def quantised(self) -> bool:
        """Whether the module holds its weight in some other form than a matrix of floating-point numbers."""
        weight: object = getattr(self.module, self.parameter, None)
        return (
            not isinstance(weight, torch.Tensor)
            or type(weight) not in (torch.Tensor, nn.Parameter)
            or weight.dtype not in DTYPES.values()
        )

    def require_values(self) -> None:
        """Raise UserError where the weight's values cannot be had."""
        if self.quantised:
            weight = getattr(self.module, self.parameter, None)
            kind = type(weight).__name__ if weight is not None else type(self.module).__name__
            raise UserError(
                f"{self.name} has a quantised weight ({kind}), but its values are needed; use neuron signed, "
                "unit head or method activation, which need none, or load the model unquantised"
            )

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The site's features [..., out] of an output of the module [..., module's out]."""
        return output if self.rows is None else output[..., self._on(output)]

    def stored_rows(self, units: torch.Tensor) -> torch.Tensor:
        """Which rows of `stored` hold these output features of the site."""
        if self.rows is None:
            return units
        return torch.arange(self.stored.shape[0], device=units.device)[self._on(units)][units]

    def _on(self, tensor: torch.Tensor) -> slice | torch.Tensor:
        assert self.rows is not None
        return self.rows.to(tensor.device) if isinstance(self.rows, torch.Tensor) else self.rows


def _gate_up(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    return {"gate": slice(0, out // 2), "up": slice(out // 2, out)}


def _qkv(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    width = out // (heads + 2 * key_value_heads)
    ends = (heads * width, (heads + key_value_heads) * width, out)
    return {"q": slice(0, ends[0]), "k": slice(ends[0], ends[1]), "v": slice(ends[1], ends[2])}


def _qkv_by_head(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    """For each key head: the queries that share it, the key, the value."""
    width = out // (heads + 2 * key_value_heads)
    rows = torch.arange(out).view(key_value_heads, heads // key_value_heads + 2, width)
    return {"q": rows[:, :-2].reshape(-1), "k": rows[:, -2].reshape(-1), "v": rows[:, -1].reshape(-1)}


LAYOUTS: dict[str, Callable[[int, int, int], dict[str, Rows]]] = {
    "gate, up": _gate_up,
    "q, k, v": _qkv,
    "q, k, v by head": _qkv_by_head,
}
"""Layout of a module that holds several matrices: (out, heads, key and value heads) → part → its rows."""


def family_of(model: "PreTrainedModel") -> Family:
    """The model's row of the table. Raises UnsupportedModel where there is none."""
    return require_family(model.config, type(model).__name__)


def layers_of(model: "PreTrainedModel") -> Iterable[nn.Module]:
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sites_of(model: "PreTrainedModel", roles: Iterable[str]) -> list[Site]:
    """The sites of the given roles, in the order of the layers, then of ROLES.

    Raises:
        UserError: an unknown role, one that this architecture does not have, or a compiled model.
        UnsupportedModel: the architecture, or a module at a site, is not one the rules know.
    """
    _require_uncompiled(model)
    family = family_of(model)
    wanted = set(roles)
    for role in wanted:
        if role not in ROLES:
            raise unknown("site", role, ROLES)
        if role not in family.roles:
            raise UserError(
                f"{model.config.model_type} has no site '{role}' (its MLP has no gate); it has: "
                f"{', '.join(sorted(family.roles))}"
            )
    if not wanted:
        raise UserError("no site given; name at least one, such as mlp.up")
    ordered = [role for role in ROLES if role in wanted]
    return [
        site
        for index, layer in enumerate(layers_of(model))
        for role in ordered
        for site in _sites_in(model, family, index, layer, role)
    ]


def _require_uncompiled(model: nn.Module) -> None:
    """Raise UserError for what torch.compile made: it passes by hooks and rules that come later."""
    for name, module in model.named_modules():
        what = f"{name} of the model" if name else "the model"
        if "_orig_mod" in module._modules:
            raise UserError(f"{what} is compiled by torch.compile; give the module inside, its _orig_mod")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{what} was compiled in place by its compile(); set its _compiled_call_impl to None, which "
                "undoes that"
            )


def experts_in(layer: nn.Module, family: Family) -> nn.Module | None:
    """The layer's experts; None where it has none."""
    found: nn.Module | None = layer if family.experts else None
    for name in (family.experts or "").split("."):
        found = found and found._modules.get(name)
    return found


def dense_path(layer: nn.Module, family: Family, path: str) -> str | None:
    """Where in this layer the part of the MLP at `path` is: beside experts in the shared MLP, or nowhere."""
    if experts_in(layer, family) is None or family.gated is None:
        return path
    return path.replace(family.gated, family.shared, 1) if family.shared else None


def non_linearities(layer: nn.Module, family: Family) -> list[nn.Module]:
    """The non-linearities of the layer's MLPs."""
    experts, path = experts_in(layer, family), dense_path(layer, family, family.activation)
    return [
        *([] if experts is None else [experts.get_submodule("act_fn")]),
        *([] if path is None else [layer.get_submodule(path)]),
    ]


def down_sites(model: "PreTrainedModel") -> dict[tuple[int, int | None], Site]:
    """The mlp.down of each MLP, by `Site.mlp`."""
    return {site.mlp: site for site in sites_of(model, ("mlp.down",))}


def readers_of(model: "PreTrainedModel", sites: Iterable[Site]) -> dict[str, Site]:
    """Name of each mlp.up or attn.o → the matrix whose inputs are the outputs of its neurons or heads.

    Raises:
        UserError: another site, or an expert's, whose matrices are computed in one call.
    """
    downs, found = down_sites(model), dict[str, Site]()
    for site in sites:
        if site.role not in ("mlp.up", "attn.o"):
            raise UserError(
                f"{site.name} is {site.role}, and only units of mlp.up and attn.o have an output of "
                "their own; use those"
            )
        if site.expert is not None:
            raise UserError(
                f"{site.name} is an expert's, and experts are computed in one call in which no output can be "
                "replaced; use ablated(model, circuit), which sets it to zero"
            )
        found[site.name] = downs[site.mlp] if site.role == "mlp.up" else site
    return found


def _sites_in(
    model: "PreTrainedModel", family: Family, index: int, layer: nn.Module, role: str
) -> list[Site]:
    """The sites of a role in one layer: one, or one of each expert and of the MLP beside them."""
    experts = experts_in(layer, family) if role in PARTS else None
    if experts is None:
        return [_site(model, family, index, layer, role, family.roles[role])]
    path = dense_path(layer, family, family.roles[role])
    shared = [] if path is None else [_site(model, family, index, layer, role, path)]
    parameter, part = PARTS[role]
    count, out, inp = getattr(experts, parameter).shape
    rows = _gate_up(out, 0, 0)[part] if part else None
    where = f"{family.layers}.{index}.{family.experts}.{parameter}"
    out, heads = out // 2 if part else out, model.config.num_attention_heads
    names = [f"{where}#{expert}.{part}".rstrip(".") for expert in range(count)]
    return [
        Site(name, role, index, experts, out, inp, heads, rows=rows, parameter=parameter, expert=expert)
        for expert, name in enumerate(names)
    ] + shared


def _site(
    model: "PreTrainedModel", family: Family, index: int, layer: nn.Module, role: str, where: str
) -> Site:
    heads, key_value_heads = model.config.num_attention_heads, family.key_value_heads(model.config)
    name = f"{family.layers}.{index}.{where}"
    path, _, part = where.partition("#")
    module = layer.get_submodule(path)
    out, inp, transposed = _linear_shape(module, name)
    rows = LAYOUTS[family.fused[path]](out, heads, key_value_heads)[part] if part else None
    if rows is not None:
        out = len(range(out)[rows]) if isinstance(rows, slice) else len(rows)
    heads = key_value_heads if role in ("attn.k", "attn.v") else heads
    return Site(name, role, index, module, out, inp, heads, transposed, rows)


def _linear_shape(module: nn.Module, name: str) -> tuple[int, int, bool]:
    if type(module).__name__ == "Conv1D":
        inp, out = cast(torch.Tensor, module.weight).shape
        return out, inp, True
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features), False  # type: ignore[arg-type]
    raise UnsupportedModel(f"{name} is a {type(module).__name__}, not a linear map that sparc3 knows")


@contextmanager
def shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An instance attribute for a while; the earlier one, or its absence, comes back."""
    had = name in module.__dict__
    earlier = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = earlier
        else:
            del module.__dict__[name]


@contextmanager
def open_experts(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, each expert's matrices are modules that can be hooked (`Site.hooked`)."""
    family = family_of(model)
    with ExitStack() as stack:
        for experts in (found for layer in layers_of(model) if (found := experts_in(layer, family))):
            stack.enter_context(shadowed(experts, MATRICES, matrices(experts)))
            stack.enter_context(shadowed(experts, forward_within(experts), one_by_one(experts)))
        yield
