"""Sites: the prunable matrices of a model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..errors import UnsupportedModel, UserError, unknown
from .experts import MATRICES, compute_one_by_one, matrices
from .families import PARTS, ROLES, Family, require_family
from .offloading import forward_name, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}

Rows = slice | torch.Tensor | None
"""The output rows of a module that belong to a site; None for all."""


@dataclass(frozen=True)
class Site:
    """One prunable matrix of a model.

    Attributes:
        name: the key in Scores and Circuits: the module's path ("model.layers.0.mlp.up_proj"), followed by
            "#up" if the module fuses several matrices; for experts, the path of the fused parameter
            ("model.layers.0.mlp.experts.gate_up_proj#3.up").
        role: canonical role ("mlp.up").
        layer: index of the decoder layer.
        module: the linear module; its weight is [out, in], or [in, out] if `transposed`. For an expert, the
            module of all experts.
        out, inp: numbers of output and input features of the site.
        heads: number of attention heads that read or write it (query heads for attn.q and attn.o).
        transposed: whether the weight is stored as [in, out], as in GPT-2's Conv1D.
        rows: the module's output features that belong to the site.
        parameter: name of the module's weight.
        expert: index of the matrix in a parameter [experts, out, in]; None if the parameter is one matrix.
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
    def hook_module(self) -> nn.Module:
        """The module to hook, whose input and output are the site's. For an expert, it exists only inside
        `open_experts`."""
        if self.expert is None:
            return self.module
        return cast(nn.Module, self.module.__dict__[MATRICES][self.parameter, self.expert])

    @property
    def mlp(self) -> tuple[int, int | None]:
        """(layer, expert), which is the same for all mlp sites of one MLP."""
        return self.layer, self.expert

    @property
    def stored_weight(self) -> torch.Tensor:
        """The module's whole weight as a [module's out, in] view."""
        return self.matrix_of(value_of(self.module, self.parameter))

    def matrix_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Of the module's parameter, or another of its shape, the view `stored`."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix

    @property
    def weight(self) -> torch.Tensor:
        """The site's weight [out, in]: a view, or a copy if its rows are scattered in the module. Raises
        UserError if it is quantised."""
        self.require_values()
        return (
            self.stored_weight if self.rows is None else self.stored_weight[self._rows_on(self.stored_weight)]
        )

    @property
    def is_quantised(self) -> bool:
        """Whether the module's weight is anything other than a matrix of floating-point numbers."""
        weight: object = getattr(self.module, self.parameter, None)
        return (
            not isinstance(weight, torch.Tensor)
            or type(weight) not in (torch.Tensor, nn.Parameter)
            or weight.dtype not in DTYPES.values()
        )

    def require_values(self) -> None:
        """Raise UserError if the weight's values are unavailable, because it is quantised."""
        if self.is_quantised:
            weight = getattr(self.module, self.parameter, None)
            kind = type(weight).__name__ if weight is not None else type(self.module).__name__
            raise UserError(
                f"{self.name} has a quantised weight ({kind}), but its values are needed; use neuron signed, "
                "unit head or method activation, which do not need them, or load the model unquantised"
            )

    def select_features(self, output: torch.Tensor) -> torch.Tensor:
        """The site's features [..., out] in an output of the module [..., module's out]."""
        return output if self.rows is None else output[..., self._rows_on(output)]

    def stored_rows(self, units: torch.Tensor) -> torch.Tensor:
        """The rows of `stored_weight` for these output features of the site."""
        if self.rows is None:
            return units
        return torch.arange(self.stored_weight.shape[0], device=units.device)[self._rows_on(units)][units]

    def _rows_on(self, tensor: torch.Tensor) -> slice | torch.Tensor:
        assert self.rows is not None
        return self.rows.to(tensor.device) if isinstance(self.rows, torch.Tensor) else self.rows


def _gate_up(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    return {"gate": slice(0, out // 2), "up": slice(out // 2, out)}


def _qkv(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    width = out // (heads + 2 * key_value_heads)
    ends = (heads * width, (heads + key_value_heads) * width, out)
    return {"q": slice(0, ends[0]), "k": slice(ends[0], ends[1]), "v": slice(ends[1], ends[2])}


def _qkv_by_head(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    """Rows in the order: for each key head, the queries that share it, the key, the value."""
    width = out // (heads + 2 * key_value_heads)
    rows = torch.arange(out).view(key_value_heads, heads // key_value_heads + 2, width)
    return {"q": rows[:, :-2].reshape(-1), "k": rows[:, -2].reshape(-1), "v": rows[:, -1].reshape(-1)}


LAYOUTS: dict[str, Callable[[int, int, int], dict[str, Rows]]] = {
    "gate, up": _gate_up,
    "q, k, v": _qkv,
    "q, k, v by head": _qkv_by_head,
}
"""Layout of a fused module: (out, heads, key and value heads) → part → its rows."""


def family_of(model: "PreTrainedModel") -> Family:
    """The model's row in the table of families. Raises UnsupportedModel if there is none."""
    return require_family(model.config, type(model).__name__)


def layers_of(model: "PreTrainedModel") -> Iterable[nn.Module]:
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sites_of(model: "PreTrainedModel", roles: Iterable[str]) -> list[Site]:
    """The sites with the given roles, in the order of the layers, then of ROLES.

    Raises:
        UserError: an unknown role, one that this architecture does not have, or a compiled model.
        UnsupportedModel: an architecture, or a module at a site, that is not supported.
    """
    _require_uncompiled(model)
    family = family_of(model)
    requested = set(roles)  # roles may be an iterator, which can be read only once
    for role in requested:
        if role not in ROLES:
            raise unknown("site", role, ROLES)
        if role not in family.roles:
            raise UserError(
                f"{model.config.model_type} has no site '{role}' (its MLP has no gate); it has: "
                f"{', '.join(sorted(family.roles))}"
            )
    if not requested:
        raise UserError("no site given; name at least one, such as mlp.up")
    ordered = [role for role in ROLES if role in requested]
    return [
        site
        for index, layer in enumerate(layers_of(model))
        for role in ordered
        for site in _sites_in(model, family, index, layer, role)
    ]


def _require_uncompiled(model: nn.Module) -> None:
    """Raise UserError for modules from torch.compile, which ignore hooks and rules added later."""
    for name, module in model.named_modules():
        # torch.compile(model) wraps the model in a module with `_orig_mod`; model.compile() leaves the class
        # as it is and sets `_compiled_call_impl`, which is then called past all hooks.
        description = f"{name} of the model" if name else "the model"
        if "_orig_mod" in module._modules:
            raise UserError(
                f"{description} is compiled by torch.compile; give the module inside, its _orig_mod"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{description} was compiled in place by its compile(); set its _compiled_call_impl to None "
                "to undo that"
            )


def experts_in(layer: nn.Module, family: Family) -> nn.Module | None:
    """The layer's experts; None without experts."""
    module: nn.Module | None = layer if family.experts else None
    for name in (family.experts or "").split("."):
        module = module and module._modules.get(name)
    return module


def dense_path(layer: nn.Module, family: Family, path: str) -> str | None:
    """The path of a part of the MLP in this layer. In a layer with experts it is in the shared MLP; None
    if there is none."""
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
    """`Site.mlp` of each MLP → its mlp.down."""
    return {site.mlp: site for site in sites_of(model, ("mlp.down",))}


def readers_of(model: "PreTrainedModel", sites: Iterable[Site]) -> dict[str, Site]:
    """Name of each mlp.up or attn.o → the matrix whose inputs are the outputs of its neurons or heads.

    Raises:
        UserError: another site, or an expert's, whose matrices are computed in one call.
    """
    downs, readers = down_sites(model), dict[str, Site]()
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
        readers[site.name] = downs[site.mlp] if site.role == "mlp.up" else site
    return readers


def _sites_in(
    model: "PreTrainedModel", family: Family, index: int, layer: nn.Module, role: str
) -> list[Site]:
    """The sites with a role in one layer: a single one, or one for each expert and one for the shared MLP."""
    experts = experts_in(layer, family) if role in PARTS else None
    if experts is None:
        return [_site(model, family, index, layer, role, family.roles[role])]
    path = dense_path(layer, family, family.roles[role])
    shared = [] if path is None else [_site(model, family, index, layer, role, path)]
    parameter, part = PARTS[role]
    count, out, inp = getattr(experts, parameter).shape
    rows = _gate_up(out, 0, 0)[part] if part else None
    prefix = f"{family.layers}.{index}.{family.experts}.{parameter}"
    out, heads = out // 2 if part else out, model.config.num_attention_heads
    names = [f"{prefix}#{expert}.{part}".rstrip(".") for expert in range(count)]
    return [
        Site(name, role, index, experts, out, inp, heads, rows=rows, parameter=parameter, expert=expert)
        for expert, name in enumerate(names)
    ] + shared


def _site(
    model: "PreTrainedModel", family: Family, index: int, layer: nn.Module, role: str, location: str
) -> Site:
    heads, key_value_heads = model.config.num_attention_heads, family.key_value_heads(model.config)
    name = f"{family.layers}.{index}.{location}"
    path, _, part = location.partition("#")
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
    raise UnsupportedModel(
        f"{name} is a {type(module).__name__}, which is not a linear map that sparc3 supports"
    )


@contextmanager
def shadow(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, the module has this instance attribute; afterwards the previous one is restored, or it is
    removed."""
    existed = name in module.__dict__
    previous = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if existed:
            module.__dict__[name] = previous
        else:
            del module.__dict__[name]


@contextmanager
def open_experts(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, each expert's matrices are modules, which can be hooked (`Site.hook_module`)."""
    family = family_of(model)
    with ExitStack() as stack:
        for experts in (module for layer in layers_of(model) if (module := experts_in(layer, family))):
            stack.enter_context(shadow(experts, MATRICES, matrices(experts)))
            stack.enter_context(shadow(experts, forward_name(experts), compute_one_by_one(experts)))
        yield
