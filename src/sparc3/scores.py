"""Scores: one number per unit, with its provenance, saved as safetensors (`sparc3.scores/1`)."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile
from .safe_text import html_table
from .storage import digest, fingerprint, load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor


FORMAT = "sparc3.scores/1"
UNITS = ("neuron", "head", "weight")


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, "Tensor"]):
    """A mapping from module name to a tensor of scores on the CPU: [out] for neurons, [heads] for heads,
    [out, in] for weights.

    Attributes:
        values_: the tensors, in the order of the sites, which breaks ties in `select`.
        provenance: method, unit, target, neuron, reduce, samples and tokens (counts), model (id,
            architecture, fingerprint), samples_fingerprint, tokenizer (its fingerprint, where samples are
            texts), version, and notes of the method.
    """

    values_: dict[str, "Tensor"]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> "Tensor":
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    @property
    def unit(self) -> str:
        """What was scored: "neuron", "head" or "weight"."""
        return str(self.provenance.get("unit", "neuron"))

    @property
    def units(self) -> int:
        """How many units were scored."""
        return sum(tensor.numel() for tensor in self.values_.values())

    @property
    def fingerprint(self) -> str:
        """Identifies the content: values and provenance, except the time it took."""
        provenance = {key: value for key, value in self.provenance.items() if key != "seconds"}
        return fingerprint({"provenance": provenance, "tensors": digest(self.values_)})

    def _repr_html_(self) -> str:
        """A notebook's table: one row per site, with its largest |score| and their sum."""
        details = (
            str(self.provenance[key]) for key in ("method", "target", "samples") if key in self.provenance
        )
        rows = [
            (name, f"{tensor.numel():,}", f"{tensor.abs().max():.4g}", f"{tensor.abs().sum():.4g}")
            for name, tensor in self.items()
        ]
        title = f"Scores of {self.units:,} {self.unit}s ({', '.join(details)})"
        return html_table(title, ("site", "units", "largest |score|", "Σ |score|"), rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; its header has format, order of sites, provenance and a checksum."""
        save_tensors(path, FORMAT, self.values_, {"sites": list(self.values_), **self.provenance})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote. Raises UserError for another kind of file, DamagedFile for invalid
        content."""
        tensors, header = load_tensors(path, FORMAT)
        names, unit, model = (
            header.pop("sites", None),
            header.get("unit", "neuron"),
            header.get("model") or {},
        )
        if not isinstance(names, list) or set(map(str, names)) != set(tensors) or len(names) != len(tensors):
            raise DamagedFile(f"{path}: the list of sites does not match the tensors; create the file again")
        dim = 2 if unit == "weight" else 1
        shaped = all(tensor.is_floating_point() and tensor.dim() == dim for tensor in tensors.values())
        if unit not in UNITS or not shaped or not is_model(model):
            raise DamagedFile(f"{path}: unit, model or tensors do not follow {FORMAT}; create the file again")
        return cls({name: tensors[name] for name in names}, header)


def is_model(value: object) -> bool:
    """Whether a value can be the `model` of a provenance: a dict of strings."""
    return isinstance(value, dict) and all(isinstance(part, str) for part in value.values())
