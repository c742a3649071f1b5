"""Circuit: a set of units of one model. The third noun on disk (`circuit.json`, `sparc3.circuit/1`)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile, UserError
from .files import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "sparc3.circuit/1"
UNITS = ("neuron", "head", "weight")


@dataclass(frozen=True)
class Circuit:
    """A set of units; removing it is an ablation.

    Attributes:
        unit: "neuron" or "head".
        members: module name → indices, ascending. The module of a neuron is its `mlp.up`, that of a head its `attn.o`.
        model: id, architecture and fingerprint of the model it was found on.
        provenance: the selection and the scores it came from.
    """

    unit: str
    members: Mapping[str, tuple[int, ...]]
    model: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.members.values())

    @property
    def fingerprint(self) -> str:
        """Names the set of units, whatever way it was found."""
        return fingerprint({"unit": self.unit, "members": {k: list(v) for k, v in self.members.items() if v}})

    def require_model(self, model: "PreTrainedModel") -> None:
        """Raise UserError unless this circuit was found on exactly these weights."""
        from .models import describe

        here = describe(model)
        if self.model.get("fingerprint") != here["fingerprint"]:
            raise UserError(
                f"the circuit was made on {self.model.get('id')} ({self.model.get('fingerprint')}), "
                f"not on {here['id']} ({here['fingerprint']}); use that model, or --force to apply it all the same"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        members = {name: list(indices) for name, indices in self.members.items()}
        content = {"format": FORMAT, "unit": self.unit, "model": self.model, "members": members, "provenance": self.provenance}
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read circuit.json. Raises UserError for another kind of file, DamagedFile where its content makes no sense."""
        content = read_json(path, FORMAT)
        members, unit = content.get("members"), content.get("unit")
        good = unit in UNITS[:2] and isinstance(members, dict) and all(
            isinstance(v, list) and all(type(i) is int and i >= 0 for i in v) and len(set(v)) == len(v) for v in members.values()
        )
        if not good or not isinstance(content.get("model"), dict) or not isinstance(content.get("provenance"), dict):
            raise DamagedFile(f"{path}: unit, members, model and provenance are not as {FORMAT} has them; make it again")
        assert isinstance(members, dict)
        return cls(str(unit), {k: tuple(sorted(v)) for k, v in members.items()}, content["model"], content["provenance"])
