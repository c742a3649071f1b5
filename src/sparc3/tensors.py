"""Files of tensors (safetensors): a header that says what they are, and a checksum of all of it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile, UserError
from .files import canonical, whole_file
from .visible import shareable

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: str | os.PathLike[str], format: str, tensors: Mapping[str, "Tensor"], header: Mapping[str, Any]) -> None:
    """Write tensors (on the CPU) under a header of JSON-able values, to which the format and a checksum of everything are added."""
    from safetensors.torch import save_file

    plain = shareable(json.loads(json.dumps({"format": format, **header})))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    plain["sha256"] = _checksum(plain, whole)
    with whole_file(path) as temporary:
        save_file(whole, temporary, {key: _written(value) for key, value in plain.items()})


def load_tensors(path: str | os.PathLike[str], format: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """What `save_tensors` wrote: tensors, and the header without its format and checksum.

    Raises:
        UserError: no such file, or it is another kind of file.
        DamagedFile: not safetensors, or its checksum does not fit its content.
    """
    header, tensors = read_header(path), {}
    if header.get("format") != format:
        raise UserError(f"{path} is a safetensors file, but not a {format} file; name one, or make it again")
    with _opened(path) as opened:
        # Copies: the library maps the file, so that who overwrites it in place would change numbers already checked.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    checksum = header.pop("sha256", None)
    if checksum != _checksum(header, tensors):
        raise DamagedFile(f"{path} was changed after it was written: its checksum does not fit; make it again")
    del header["format"]
    return tensors, header


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file, its JSON values parsed; nothing in it is checked."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; check the path")
    with _opened(path) as opened:
        return {key: _parsed(value) for key, value in (opened.metadata() or {}).items()}


class _opened:  # noqa: N801  a context manager, used like a function
    """safe_open, with whatever it and its tensors raise as one line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> Any:
        from safetensors import safe_open

        try:
            self.file: Any = safe_open(self.path, "pt")
            return self.file.__enter__()  # type: ignore[no-untyped-call]
        except Exception as error:  # the library raises its own errors, Python's and torch's
            raise self._damaged(error) from None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.file.__exit__(kind, error, trace)
        if isinstance(error, Exception):
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DamagedFile:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return DamagedFile(f"{self.path} is not a readable safetensors file ({first}); make it again")


def _written(value: Any) -> str:
    """A header's value as text: a string as it is, unless it would be read back as something else."""
    return value if isinstance(value, str) and _parsed(value) is value else json.dumps(value)


def _parsed(value: str) -> Any:
    try:
        return json.loads(value) if value[:1] in '{["-0123456789tfnNI' else value
    except (ValueError, RecursionError):
        return value


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, "Tensor"]) -> str:
    content = canonical(header) + digest({name: tensors[name] for name in sorted(tensors)})
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def digest(tensors: Mapping[str, "Tensor"]) -> str:
    """The SHA-256 of names, shapes, types and values, in their order."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
