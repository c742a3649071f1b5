"""Circuit: a set of units of one model. The third noun on disk (`sparc3.circuit/1`: circuit.json, or
circuit.safetensors for weights)."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedFile, UserError
from ..models.hub import fetch, place_of
from ..safe_text import html_table
from ..scores import UNITS, is_model
from ..storage import digest, fingerprint, load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..models.sites import Site

FORMAT = "sparc3.circuit/1"
NAMES = ("circuit.json", "circuit.safetensors")
"""What a circuit's file is called in a folder or a repository."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of units; removing it, wholly or by a share, is an ablation. Raises UserError for a strength out
    of its range, and for strengths that do not fit the members.

    Attributes:
        unit: "neuron", "head" or "weight".
        members: module name → which of its units: indices, ascending, of neurons (the module is their
            `mlp.up`) and heads (their `attn.o`); of weights a bool tensor [out, in] on the CPU, true at the
            members.
        strength: the share of each unit's output, or of each weight, that its removal takes away: above 0, up
            to 1, which is all of it.
        model: id, architecture and fingerprint of the model it was found on.
        provenance: the selection and the scores it came from.
        strengths: of neurons, where each has a strength of its own: module name → one for each of its
            members, in their order, from −1, which doubles what the neuron writes, to 1, which removes it.
    """

    unit: str
    members: Mapping[str, Any]
    model: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, but it is {self.strength}")
        if self.strengths and (self.unit != "neuron" or self.strength != 1):
            raise UserError(
                f"strengths are of neurons, in the place of one strength, but this circuit is of "
                f"{self.unit}s at strength {self.strength:g}; leave one of them out"
            )
        if self.strengths and (odd := _unfit_strengths(self.strengths, self.members)):
            raise UserError(f"{odd}; give one strength a neuron, from -1 to 1 and not 0")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __eq__(self, other: object) -> bool:
        """The same units of the same model, found in the same way."""
        if not isinstance(other, Circuit):
            return NotImplemented
        one, two = ((c.fingerprint, c.model, c.provenance) for c in (self, other))
        return one == two

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Module name → how many of its units are members."""
        return {
            name: int(units.sum()) if self.unit == "weight" else len(units)
            for name, units in self.members.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """Names the set of units and, where it is not 1, the strength; whatever way it was found."""
        there = {name: units for name, units in self.members.items() if self.counts[name]}
        if self.unit == "weight":
            shapes = {name: list(mask.shape) for name, mask in there.items()}
            bits = {name: digest({"": packed_bits(mask)}) for name, mask in there.items()}
            return fingerprint({"unit": self.unit, "shapes": shapes, "bits": bits, **self._strength})
        members = {name: list(units) for name, units in there.items()}
        return fingerprint({"unit": self.unit, "members": members, **self._strength})

    @property
    def _strength(self) -> dict[str, Any]:
        """What a file and the fingerprint say of the strength: nothing where it is 1."""
        if self.strengths:
            own = {name: list(map(float, self.strengths[name])) for name, n in self.counts.items() if n}
            return {"strengths": own}
        return {"strength": float(self.strength)} if self.strength != 1 else {}

    @property
    def at_strength(self) -> str:
        """A phrase for messages: " at strength 0.5", " at strengths -0.2 to 1", or nothing if the units are
        set to zero."""
        if own := [strength for some in self.strengths.values() for strength in some]:
            return f" at strengths {min(own):.3g} to {max(own):.3g}"
        return f" at strength {self.strength:g}" if self.strength != 1 else ""

    @property
    def zeroes(self) -> bool:
        """Whether removing it sets every unit to zero."""
        return self.strength == 1 and not self.strengths

    @property
    def at_full_strength(self) -> "Circuit":
        """The same units, set to zero."""
        return self if self.zeroes else replace(self, strength=1.0, strengths={})

    def by_strength(self, name: str) -> Iterator[tuple[float, Any]]:
        """(strength, which units of the module have it), as `members` has units; the strongest first."""
        if not self.strengths:
            yield self.strength, self.members[name]
            return
        own = dict(zip(self.members[name], self.strengths.get(name, ()), strict=True))
        for strength in sorted(set(own.values()), reverse=True):
            yield strength, tuple(unit for unit, theirs in own.items() if theirs == strength)

    def with_units(self, members: Mapping[str, Any]) -> "Circuit":
        """A circuit of some of its units, or as many others, each at its own strength."""
        if not self.strengths:
            return replace(self, members=members)
        strengths = {}
        for name, units in members.items():
            own = dict(zip(self.members[name], self.strengths.get(name, ()), strict=True))
            strengths[name] = tuple(own[unit] for unit in units)
        return replace(self, members=members, strengths={n: s for n, s in strengths.items() if s})

    @property
    def suffix(self) -> str:
        """What the name of its file ends in: ".json", or ".safetensors" for weights."""
        return ".safetensors" if self.unit == "weight" else ".json"

    def _repr_html_(self) -> str:
        """In a notebook: the circuit, and a row a site with its number of units and the first of them."""
        rows = [
            (name, f"{count:,}", "" if self.unit == "weight" else _list_first(self.members[name]))
            for name, count in self.counts.items()
        ]
        title = (
            f"Circuit of {len(self):,} {self.unit}s{self.at_strength} of {self.model.get('id', 'a model')}"
        )
        return html_table(title, ("site", "units", "which"), rows)

    def require_model(self, model: "PreTrainedModel") -> None:
        """Raise UserError unless this circuit was found on exactly these weights."""
        from ..models.fingerprint import describe

        here = describe(model)
        if self.model.get("fingerprint") != here["fingerprint"]:
            raise UserError(
                f"the circuit was made on {self.model.get('id')} ({self.model.get('fingerprint')}), not on "
                f"{here['id']} ({here['fingerprint']}); use that model, or pass --force to apply it anyway"
            )

    def require_exportable(self) -> None:
        """Raise UserError where the circuit was measured by mean ablation, which no weights hold."""
        if self.provenance.get("ablation") == "mean":
            raise UserError(
                "the circuit was measured with removed units at their means (discover.ablation mean), which "
                "no checkpoint can hold; find it with discover.ablation zero to export it"
            )

    def sites(self, model: "PreTrainedModel") -> "dict[str, Site]":
        """Module name → where its members are in the model. Raises UserError for a unit that this model does
        not have."""
        from ..models.families import ROLES
        from ..models.fingerprint import model_id
        from ..models.sites import family_of, sites_of

        roles = [role for role in ROLES if role in family_of(model).roles]
        known = {site.name: site for site in sites_of(model, roles)}
        for name, units in self.members.items():
            if name not in known:
                raise UserError(
                    f"the circuit names {name}, which '{model_id(model)}' does not have; use the model it "
                    "was made on"
                )
            shape = (known[name].out, known[name].inp)
            there = known[name].heads if self.unit == "head" else known[name].out
            if self.unit == "weight" and tuple(units.shape) != shape:
                raise UserError(
                    f"the circuit has shape {tuple(units.shape)} at {name}, which has {shape}; use the model "
                    "it was made on"
                )
            if self.unit != "weight" and units and max(units) >= there:
                raise UserError(
                    f"the circuit names {self.unit} {max(units)} of {name}, which has {there}; use the model "
                    "it was made on"
                )
        return {name: known[name] for name in self.members}

    def masks(self, model: "PreTrainedModel") -> dict[str, "Tensor"]:
        """Module name → bool tensor, true at the units, whatever their strength: [out] of neurons, [heads] of
        heads, [out, in] of weights; on the CPU. Raises UserError as `sites` does."""
        import torch

        masks = {}
        for name, site in self.sites(model).items():
            masks[name] = self.members[name]
            if self.unit != "weight":
                masks[name] = torch.zeros(site.heads if self.unit == "head" else site.out, dtype=torch.bool)
                masks[name][list(self.members[name])] = True
        return masks

    def hooks(self, model: "PreTrainedModel") -> "list[tuple[str, Callable[..., Tensor]]]":
        """Module path and a forward hook for it, `hook(module, args, output) → output`: with all of them the
        model computes what `ablated` makes of it, and its weights stay as they are.

        Raises:
            UserError: as `sites` does; or units of an expert, whose modules are computed in one call.
        """
        from .hooks import hooks_of

        return hooks_of(model, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON, or packed masks as safetensors for weights. Raises UserError where the name
        does not end as `suffix` says."""
        if Path(path).suffix != self.suffix:
            raise UserError(
                f"a circuit of {self.unit}s is saved as a {self.suffix} file, but the path is {path}; use a "
                f"name that ends in {self.suffix}"
            )
        if self.unit == "weight":
            packed = {name: packed_bits(mask) for name, mask in self.members.items()}
            shapes = {name: list(mask.shape) for name, mask in self.members.items()}
            header = {"unit": self.unit, **self._strength, "shapes": shapes, "model": self.model}
            save_tensors(path, FORMAT, packed, {**header, "provenance": self.provenance})
            return
        members = {name: list(indices) for name, indices in self.members.items()}
        header = {"format": FORMAT, "unit": self.unit, **self._strength, "model": self.model}
        write_json(path, {**header, "members": members, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read what `save` wrote.

        Args:
            path: the file; a folder that holds circuit.json or circuit.safetensors; or a place on the hub,
                written as its client writes it: "USER/REPO", "hf://USER/REPO@REVISION/PATH".

        Raises:
            UserError: nothing there, another kind of file, or the hub is out of reach.
            DamagedFile: its content makes no sense, or was changed.
        """
        path = _file_of(path)
        members: Mapping[str, Any] | None = None
        if path.suffix == ".safetensors":
            packed, header = load_tensors(path, FORMAT)
            if header.get("unit") == "weight":
                members = _masks(packed, header.get("shapes"))
        else:
            keys = ("format", "unit", "strength", "strengths", "model", "members", "provenance")
            header = read_json(path, FORMAT, by_hand=keys)
            if header.get("unit") in UNITS[:2]:
                members = _indices(header.get("members"))
        model, about, strength = header.get("model"), header.get("provenance"), header.get("strength", 1.0)
        strengths = _strengths(header) if members is not None else None
        good = is_model(model) and _is_provenance(about) and _is_strength(strength)
        if members is None or strengths is None or not good:
            raise DamagedFile(
                f"{path}: the unit, strength, members, model or provenance does not follow {FORMAT}; create "
                "the file again"
            )
        return cls(header["unit"], members, header["model"], header["provenance"], strength, strengths)


def _indices(members: object) -> dict[str, tuple[int, ...]] | None:
    """Members as a file has them, in order; None where they make no sense."""
    if not isinstance(members, dict):
        return None
    for indices in members.values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            return None
        if len(set(indices)) != len(indices):
            return None
    return {name: tuple(sorted(indices)) for name, indices in members.items()}


def _strengths(header: Mapping[str, Any]) -> dict[str, tuple[float, ...]] | None:
    """Strengths as a file has them, in the order of the sorted members; None where they make no sense."""
    given, members = header.get("strengths", {}), dict(header.get("members") or {})
    if given == {}:
        return {}
    if header["unit"] != "neuron" or "strength" in header or not isinstance(given, dict):
        return None
    if not all(isinstance(own, list) and all(map(_is_number, own)) for own in given.values()):
        return None
    if _unfit_strengths(given, members):
        return None
    order = {name: sorted(range(len(units)), key=units.__getitem__) for name, units in members.items()}
    return {
        name: tuple(float(given[name][place]) for place in order[name]) for name in members if order[name]
    }


def _unfit_strengths(strengths: Mapping[str, Sequence[float]], members: Mapping[str, Any]) -> str | None:
    """What is wrong with the strengths of these members; None where nothing is."""
    for name in {**members, **strengths}:
        own, count = strengths.get(name, ()), len(members.get(name, ()))
        if len(own) != count:
            return f"{name} has {count} neurons and {len(own)} strengths"
        for strength in own:
            if not (-1 <= strength <= 1 and strength != 0):
                return f"{name} has the strength {strength}"
    return None


def _masks(packed: Mapping[str, "Tensor"], shapes: object) -> dict[str, "Tensor"] | None:
    """Masks as a file has them; None where their shapes make no sense."""
    if not isinstance(shapes, dict) or shapes.keys() != packed.keys():
        return None
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            return None
        size = (-(-shape[0] * shape[1] // 8),)
        if str(packed[name].dtype) != "torch.uint8" or tuple(packed[name].shape) != size:
            return None
    return {name: mask_of(packed[name], shape) for name, shape in shapes.items()}


def _is_provenance(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(part) or {}, dict) for part in ("selection", "scores", "sizes")
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_strength(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1  # type: ignore[operator]


def _file_of(path: str | os.PathLike[str]) -> Path:
    """The local file that `Circuit.load` reads."""
    if place := place_of(os.fspath(path)):
        return fetch(place, NAMES)
    if not Path(path).is_dir():
        return Path(path)
    there = [Path(path) / name for name in NAMES if (Path(path) / name).is_file()]
    if len(there) != 1:
        found = " and ".join(file.name for file in there) or "no circuit"
        raise UserError(f"{path} is a folder with {found} in it; name the circuit's file")
    return there[0]


def packed_bits(mask: "Tensor") -> "Tensor":
    """The bool mask [out, in] as bytes of eight weights each, row after row, the first weight in the highest
    bit."""
    import numpy
    import torch

    return torch.from_numpy(numpy.packbits(mask.contiguous().view(torch.uint8).numpy().reshape(-1)))


def mask_of(packed: "Tensor", shape: list[int]) -> "Tensor":
    """The bool mask that `packed_bits` packed."""
    import numpy
    import torch

    count = shape[0] * shape[1]
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count)).view(torch.bool).view(*shape)


def _list_first(indices: Sequence[int], most: int = 12) -> str:
    """The first indices, and how many more there are."""
    more = len(indices) - most
    return ", ".join(map(str, indices[:most])) + (f" and {more:,} more" if more > 0 else "")
