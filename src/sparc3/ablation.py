"""Removing a circuit: for a trial, for good, or into a checkpoint that others can load."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .circuit import Circuit
from .errors import Sparc3Error, UserError
from .models import ROLES, Site, describe, family_of, model_id, sites_of
from .results import Results
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def ablated(model: "PreTrainedModel", circuit: Circuit) -> Iterator["PreTrainedModel"]:
    """Inside, the circuit's units are zero; after it every touched value is back, bit for bit, whatever happened inside.

    Raises:
        UserError: a unit that this model does not have; nothing has been touched then.
    """
    targets = _targets(model, circuit)
    kept: list[tuple[Tensor, Any, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, index in targets:
                kept.append((tensor, index, _values(tensor, index)))
                _zero_(tensor, index)
        yield model
    finally:
        with torch.no_grad():
            for tensor, index, values in reversed(kept):
                if _is_mask(index):
                    tensor.masked_scatter_(index, values)
                else:
                    tensor[index] = values


def ablate_(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Set the circuit's units to zero for good (design, 2.9). Raises UserError as `ablated` does."""
    with torch.no_grad():
        for tensor, index in _targets(model, circuit):
            _zero_(tensor, index)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _values(tensor: Tensor, index: Any) -> Tensor:
    """A copy of the values at the index, and of no other. A mask needs no list of places, which would be larger than the matrix."""
    return tensor.masked_select(index) if _is_mask(index) else tensor[index].clone()


def _zero_(tensor: Tensor, index: Any) -> None:
    if _is_mask(index):
        tensor.masked_fill_(index, 0)
    else:
        tensor[index] = 0


def _targets(model: "PreTrainedModel", circuit: Circuit) -> list[tuple[Tensor, Any]]:
    """The (tensor, index) pairs to be zero: rows of mlp.up and its bias, columns of attn.o that read a head, or a mask of weights."""
    known = {site.name: site for site in sites_of(model, [role for role in ROLES if role in family_of(model).roles])}
    targets: list[tuple[Tensor, Any]] = []
    for name, units in circuit.members.items():
        if name not in known:
            raise UserError(f"the circuit names {name}, which '{model_id(model)}' does not have; use the model it was made on")
        site = known[name]
        _require_fit(site, circuit.unit, units)
        if site.quantised:
            raise UserError(f"{name} holds quantised weights, which cannot be set to zero in place; ablate the unquantised model")
        targets += [(site.stored, _stored_mask(site, units))] if circuit.unit == "weight" else _of_site(site, circuit.unit, list(units))
    return targets


def _require_fit(site: Site, unit: str, units: Any) -> None:
    if unit == "weight":
        if tuple(units.shape) != (site.out, site.inp):
            raise UserError(
                f"the circuit has shape {tuple(units.shape)} at {site.name}, which has {(site.out, site.inp)}; use the model it was made on"
            )
        return
    there = site.out if unit == "neuron" else site.heads
    if units and max(units) >= there:
        raise UserError(f"the circuit names {unit} {max(units)} of {site.name}, which has {there}; use the model it was made on")


def _stored_mask(site: Site, mask: Tensor) -> Tensor:
    """The site's mask [out, in] as one of everything that its module stores."""
    mask = mask.to(site.stored.device)
    if site.rows is None:
        return mask
    whole = torch.zeros(site.stored.shape, dtype=torch.bool, device=mask.device)
    whole[site.stored_rows(torch.arange(site.out, device=mask.device))] = mask
    return whole


def _of_site(site: Site, unit: str, indices: list[int]) -> list[tuple[Tensor, Any]]:
    weight = site.stored
    rows = torch.tensor(indices, device=weight.device)
    if unit == "head":
        width = site.inp // site.heads
        columns = (rows[:, None] * width + torch.arange(width, device=rows.device)).reshape(-1)
        return [(weight, (slice(None), columns))]
    rows, bias = site.stored_rows(rows), getattr(site.module, "bias", None)
    return [(weight, rows), *([(bias, rows)] if bias is not None else [])]


def export(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", circuit: Circuit, out: str | os.PathLike[str], *, results: Results | None = None
) -> Path:
    """Write the model without the circuit as an ordinary Hugging Face checkpoint, with its circuit's file and a model card.

    The folder appears whole or not at all. Raises UserError where `out` exists and is not an empty folder.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; choose a new folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        source = describe(model)
        with ablated(model, circuit):
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        circuit.save(temporary / f"circuit{circuit.suffix}")
        (temporary / "README.md").write_text(_model_card(source, circuit, results), encoding="utf-8")
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror or error}; nothing of it was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _listed(circuit: Circuit, site: str) -> str:
    """The site's members by index, or, of weights, how many they are."""
    units, count = circuit.members[site], circuit.counts[site]
    return f"{count:,} of {units.numel():,} ({count / units.numel():.1%})" if circuit.unit == "weight" else ", ".join(map(str, units))


def _model_card(source: dict[str, str], circuit: Circuit, results: Results | None) -> str:
    selection = circuit.provenance.get("selection", {})
    scores = circuit.provenance.get("scores", {})
    lines = [
        "---",
        f"base_model: {source['id']}",
        "library_name: transformers",
        "tags: [sparc3, pruned]",
        "---",
        "",
        f"# {source['id']}, without {len(circuit)} {circuit.unit}s",
        "",
        f"[{source['id']}] (weights fingerprint {source['fingerprint']}) with {len(circuit)} {circuit.unit}s set to zero, "
        f"chosen by sparc3 {__version__}. Nothing was trained; every other weight is as it was.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {scores.get('method', 'not recorded')}, target {scores.get('target', '-')}, neuron {scores.get('neuron', '-')} |",
        f"| contrast | {scores.get('contrast', '-')} |",
        f"| selection | {', '.join(f'{k} {v}' for k, v in selection.items() if v is not None) or '-'} |",
        f"| circuit | `circuit{circuit.suffix}`, fingerprint {circuit.fingerprint} |",
        "",
        "## What was removed",
        "",
        f"| module | {circuit.unit}s |",
        "|---|---|",
        *(f"| {site} | {_listed(circuit, site)} |" for site, count in circuit.counts.items() if count),
        "",
        "## What it measured",
        "",
    ]
    if results is None:
        lines.append("Nothing was measured on this checkpoint; `sparc3 evaluate` does that.")
    else:
        lines += ["| metric | variant | value | 95 % interval | n |", "|---|---|---|---|---|"]
        for m in results.measurements:
            if m.variant in ("original", "ablated"):
                interval = f"{m.ci95[0]:.4g} to {m.ci95[1]:.4g}" if m.ci95 else "-"
                lines.append(f"| {m.metric} | {m.variant} | {'-' if m.value is None else f'{m.value:.4g}'} | {interval} | {m.n} |")
    return "\n".join(lines) + "\n"
