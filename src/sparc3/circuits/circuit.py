"""Circuit: a set of units of one model, saved as circuit.json, or circuit.safetensors for weights
(`sparc3.circuit/1`)."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedFile, UserError
from ..models.hub import fetch, parse_place
from ..safe_text import html_table
from ..scores import UNITS, is_model
from ..storage import digest, fingerprint, load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..models.sites import Site

FORMAT = "sparc3.circuit/1"
NAMES = ("circuit.json", "circuit.safetensors")
"""Names of a circuit's file in a folder or a repository."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of units. Removing it, wholly or by a share, is an ablation. Raises UserError for a strength
    out of range, and for strengths that do not fit the members.

    Attributes:
        unit: "neuron", "head" or "weight".
        members: module name → its units that are members. For neurons (the module is their `mlp.up`) and
            heads (their `attn.o`), ascending indices; for weights, a bool tensor [out, in] on the CPU.
        strength: the share of each unit's output, or of each weight, that ablation removes: above 0 and at
            most 1, which removes all of it.
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
        if self.strengths and (misfit := _describe_misfit(self.strengths, self.members)):
            raise UserError(f"{misfit}; give one strength per neuron, from -1 to 1 and not 0")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same units of the same model, found in the same way."""
        if not isinstance(other, Circuit):
            return NotImplemented
        mine, theirs = ((c.fingerprint, c.model, c.provenance) for c in (self, other))
        return mine == theirs

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
        """Identifies the set of units and the strength, but not how they were found."""
        # A site without members is left out: it may or may not be listed, and the set is the same.
        nonempty = {name: units for name, units in self.members.items() if self.counts[name]}
        if self.unit == "weight":
            shapes = {name: list(mask.shape) for name, mask in nonempty.items()}
            bits = {name: digest({"": pack_bits(mask)}) for name, mask in nonempty.items()}
            return fingerprint({"unit": self.unit, "shapes": shapes, "bits": bits, **self._strength})
        members = {name: list(units) for name, units in nonempty.items()}
        return fingerprint({"unit": self.unit, "members": members, **self._strength})

    @property
    def _strength(self) -> dict[str, Any]:
        """The entry of the strength, or strengths, in files and fingerprints; left out at 1 as before there
        was a strength."""
        if self.strengths:
            strengths = {name: list(map(float, self.strengths[name])) for name, n in self.counts.items() if n}
            return {"strengths": strengths}
        return {"strength": float(self.strength)} if self.strength != 1 else {}

    @property
    def at_strength(self) -> str:
        """For messages: " at strength 0.5", " at strengths -0.2 to 1", or nothing if the units are set to
        zero."""
        if strengths := [strength for values in self.strengths.values() for strength in values]:
            return f" at strengths {min(strengths):.3g} to {max(strengths):.3g}"
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
        """(strength, the units of the module that have it) for each strength, the strongest first; units
        are as in `members`."""
        if not self.strengths:
            yield self.strength, self.members[name]
            return
        strength_of = dict(zip(self.members[name], self.strengths.get(name, ()), strict=True))
        for strength in sorted(set(strength_of.values()), reverse=True):
            yield strength, tuple(unit for unit, value in strength_of.items() if value == strength)

    def with_units(self, members: Mapping[str, Any]) -> "Circuit":
        """A circuit of some of its units, or as many others, each at its own strength."""
        if not self.strengths:
            return replace(self, members=members)
        strengths = {}
        for name, units in members.items():
            strength_of = dict(zip(self.members[name], self.strengths.get(name, ()), strict=True))
            strengths[name] = tuple(strength_of[unit] for unit in units)
        return replace(self, members=members, strengths={n: s for n, s in strengths.items() if s})

    @property
    def suffix(self) -> str:
        """The suffix of its file: ".json", or ".safetensors" for weights."""
        return ".safetensors" if self.unit == "weight" else ".json"

    def _repr_html_(self) -> str:
        """A notebook's table: one row per site, with its number of units and the first of them."""
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

        actual = describe(model)
        if self.model.get("fingerprint") != actual["fingerprint"]:
            raise UserError(
                f"the circuit was made on {self.model.get('id')} ({self.model.get('fingerprint')}), not on "
                f"{actual['id']} ({actual['fingerprint']}); use that model, or pass --force to apply it "
                "anyway"
            )

    def require_exportable(self) -> None:
        """Raise UserError if the circuit was measured by mean ablation, which weights cannot represent."""
        if self.provenance.get("ablation") == "mean":
            raise UserError(
                "the circuit was measured with removed units at their means (discover.ablation mean), which "
                "no checkpoint can hold; find it with discover.ablation zero to export it"
            )

    def sites(self, model: "PreTrainedModel") -> "dict[str, Site]":
        """Module name → its site in the model. Raises UserError for a unit that this model does not have."""
        from ..models.families import ROLES
        from ..models.fingerprint import model_id
        from ..models.sites import family_of, sites_of

        roles = [role for role in ROLES if role in family_of(model).roles]
        sites = {site.name: site for site in sites_of(model, roles)}
        for name, units in self.members.items():
            if name not in sites:
                raise UserError(
                    f"the circuit names {name}, which '{model_id(model)}' does not have; use the model it "
                    "was made on"
                )
            shape = (sites[name].out, sites[name].inp)
            count = sites[name].heads if self.unit == "head" else sites[name].out
            if self.unit == "weight" and tuple(units.shape) != shape:
                raise UserError(
                    f"the circuit has shape {tuple(units.shape)} at {name}, which has {shape}; use the model "
                    "it was made on"
                )
            if self.unit != "weight" and units and max(units) >= count:
                raise UserError(
                    f"the circuit names {self.unit} {max(units)} of {name}, which has {count}; use the model "
                    "it was made on"
                )
        return {name: sites[name] for name in self.members}

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
        """(module path, forward hook) pairs, with `hook(module, args, output) → output`. With all of them the
        model computes what it would inside `ablated`, and its weights stay as they are.

        Raises:
            UserError: as `sites` does, or for units of an expert, whose module a hook cannot reach.
        """
        from .hooks import make_hooks

        return make_hooks(model, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON, or packed masks as safetensors for weights. Raises UserError for a name that
        does not end in `suffix`."""
        if Path(path).suffix != self.suffix:
            raise UserError(
                f"a circuit of {self.unit}s is saved as a {self.suffix} file, but the path is {path}; use a "
                f"name that ends in {self.suffix}"
            )
        if self.unit == "weight":
            packed = {name: pack_bits(mask) for name, mask in self.members.items()}
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
            path: the file; a folder with circuit.json or circuit.safetensors; or a place on the hub, such as
                "USER/REPO" or "hf://USER/REPO@REVISION/PATH".

        Raises:
            UserError: the file is missing or of another kind, or the hub is out of reach.
            DamagedFile: the content is invalid or was changed.
        """
        path = _find_file(path)
        members: Mapping[str, Any] | None = None
        if path.suffix == ".safetensors":
            packed, header = load_tensors(path, FORMAT)
            if header.get("unit") == "weight":
                members = _parse_masks(packed, header.get("shapes"))
        else:
            keys = ("format", "unit", "strength", "strengths", "model", "members", "provenance")
            header = read_json(path, FORMAT, by_hand=keys)
            if header.get("unit") in UNITS[:2]:
                members = _parse_indices(header.get("members"))
        model, provenance = header.get("model"), header.get("provenance")
        strength = header.get("strength", 1.0)
        strengths = _parse_strengths(header) if members is not None else None
        is_valid = is_model(model) and _is_provenance(provenance) and _is_strength(strength)
        if members is None or strengths is None or not is_valid:
            raise DamagedFile(
                f"{path}: the unit, strength, members, model or provenance does not follow {FORMAT}; create "
                "the file again"
            )
        return cls(header["unit"], members, header["model"], header["provenance"], strength, strengths)


def _parse_indices(members: object) -> dict[str, tuple[int, ...]] | None:
    """The members in a JSON file, sorted; None if they are invalid."""
    if not isinstance(members, dict):
        return None
    for indices in members.values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            return None
        if len(set(indices)) != len(indices):
            return None
    return {name: tuple(sorted(indices)) for name, indices in members.items()}


def _parse_strengths(header: Mapping[str, Any]) -> dict[str, tuple[float, ...]] | None:
    """The strengths in a file, in the order of the sorted members; None if they are invalid."""
    given, members = header.get("strengths", {}), dict(header.get("members") or {})
    if given == {}:
        return {}
    if header["unit"] != "neuron" or "strength" in header or not isinstance(given, dict):
        return None
    if not all(isinstance(values, list) and all(map(_is_number, values)) for values in given.values()):
        return None
    if _describe_misfit(given, members):
        return None
    order = {name: sorted(range(len(units)), key=units.__getitem__) for name, units in members.items()}
    return {
        name: tuple(float(given[name][index]) for index in order[name]) for name in members if order[name]
    }


def _describe_misfit(strengths: Mapping[str, Sequence[float]], members: Mapping[str, Any]) -> str | None:
    """What is wrong with the strengths of these members; None if they fit."""
    for name in {**members, **strengths}:
        values, count = strengths.get(name, ()), len(members.get(name, ()))
        if len(values) != count:
            return f"{name} has {count} neurons and {len(values)} strengths"
        for strength in values:
            if not (-1 <= strength <= 1 and strength != 0):
                return f"{name} has the strength {strength}"
    return None


def _parse_masks(packed: Mapping[str, "Tensor"], shapes: object) -> dict[str, "Tensor"] | None:
    """The masks in a safetensors file; None if they do not fit their shapes."""
    if not isinstance(shapes, dict) or shapes.keys() != packed.keys():
        return None
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            return None
        size = (-(-shape[0] * shape[1] // 8),)  # eight weights a byte, rounded up
        if str(packed[name].dtype) != "torch.uint8" or tuple(packed[name].shape) != size:
            return None
    return {name: unpack_bits(packed[name], shape) for name, shape in shapes.items()}


def _is_provenance(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(part) or {}, dict) for part in ("selection", "scores", "sizes")
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_strength(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1  # type: ignore[operator]


def _find_file(path: str | os.PathLike[str]) -> Path:
    """The local file that `Circuit.load` reads."""
    if place := parse_place(os.fspath(path)):
        return fetch(place, NAMES)
    if not Path(path).is_dir():
        return Path(path)
    files = [Path(path) / name for name in NAMES if (Path(path) / name).is_file()]
    if len(files) != 1:
        names = " and ".join(file.name for file in files) or "no circuit"
        raise UserError(f"{path} is a folder with {names} in it; name the circuit's file")
    return files[0]


def pack_bits(mask: "Tensor") -> "Tensor":
    """The bool mask [out, in] as bytes of eight weights each, row by row, with the first weight in the
    highest bit (numpy's "big" order)."""
    import numpy
    import torch

    return torch.from_numpy(numpy.packbits(mask.contiguous().view(torch.uint8).numpy().reshape(-1)))


def unpack_bits(packed: "Tensor", shape: list[int]) -> "Tensor":
    """The bool mask that `pack_bits` packed."""
    import numpy
    import torch

    count = shape[0] * shape[1]
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count)).view(torch.bool).view(*shape)


def _list_first(indices: Sequence[int], limit: int = 12) -> str:
    """The first indices, then the number of those left out."""
    rest = len(indices) - limit
    return ", ".join(map(str, indices[:limit])) + (f" and {rest:,} more" if rest > 0 else "")
