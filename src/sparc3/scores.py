"""Scores: one number per unit, with where they came from. The second noun on disk (safetensors, `sparc3.scores/1`)."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile, UserError
from .files import fingerprint, whole_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sparc3.scores/1"


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, "Tensor"]):
    """A mapping from module name to a tensor of scores on the CPU: [out] for neurons, [heads] for heads, [out, in] for weights.

    Attributes:
        values_: the tensors, in the order of the sites, which breaks ties in `select`.
        provenance: method, unit, target, neuron, reduce, samples and tokens (counts), model (id, architecture, fingerprint),
            samples_fingerprint, version, and what the method noted on its way.
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
        return str(self.provenance.get("unit", "neuron"))

    @property
    def units(self) -> int:
        """How many units were scored."""
        return sum(tensor.numel() for tensor in self.values_.values())

    @property
    def fingerprint(self) -> str:
        """Names the content: values and provenance."""
        return fingerprint({"provenance": self.provenance, "tensors": digest(self.values_)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the header holds the format, the order of the sites, the provenance and a checksum."""
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.values_.items()}
        header = {"format": FORMAT, "sites": list(tensors), **self.provenance, "sha256": digest(tensors)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote. Raises UserError for another kind of file, DamagedFile where the content does not fit."""
        tensors, header = load_tensors(path, FORMAT)
        checksum, names = header.pop("sha256", None), header.pop("sites", None)
        if not isinstance(names, list) or set(names) != set(tensors):
            raise DamagedFile(f"{path}: its list of sites does not fit its tensors; make it again")
        ordered = {name: tensors[name] for name in names}
        if checksum != digest(ordered):
            raise DamagedFile(f"{path} was changed after it was written: its checksum does not fit; make it again")
        return cls(ordered, header)


def load_tensors(path: str | os.PathLike[str], format: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Tensors and header of one of our safetensors files, the header's JSON values parsed, its `format` checked and taken off."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; check the path")
    try:
        with safe_open(path, "pt") as opened:
            header: dict[str, Any] = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} is not a readable safetensors file ({str(error).splitlines()[0]}); make it again") from None
    if header.pop("format", None) != format:
        raise UserError(f"{path} is a safetensors file, but not a {format} file")
    return tensors, {key: _parsed(value) for key, value in header.items()}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value) if value[:1] in '{["-0123456789tfn' else value
    except (json.JSONDecodeError, RecursionError):
        return value


def digest(tensors: Mapping[str, "Tensor"]) -> str:
    """The SHA-256 of names, shapes, types and values, in their order."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
