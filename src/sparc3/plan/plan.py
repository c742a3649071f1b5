"""`plan`: estimate the memory, time and disk space that a recipe needs."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..experiment.check_recipe import Limits, check_lengths, check_samples, check_sizes
from ..models.families import require_family
from ..models.load import MAP, load_config, require_loadable, vocabulary_size
from ..models.sites import DTYPES
from ..recipe.schema import Recipe, load_recipe
from ..recipe.sections import SEQUENTIAL
from . import acceptance
from .costs import RUNTIME, Hardware, Shaped, find_hardware, this_machine
from .lengths import samples_at_hand, tokenizer_at_hand
from .rehearsal import Rehearsal
from .stages import Stage, Stages

REMEDY = "give its config.json with --config FILE, or a folder with --set model.id=FOLDER"


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        dtype: dtype of the weights.
        weights: size of the model in bytes.
        scores, disk: size in bytes of one file of scores, and of all files that the run leaves.
        work: the list of work in one line.
        stages: the stages with their costs on one device.
        peak: the largest number of bytes on a device at once, including weights.
        peak_at: the stage with that peak.
        host: with a GPU, the largest number of bytes in the process's own memory.
        memory: the device's memory in bytes.
        notes: assumptions and omissions.
    """

    recipe: str
    model: str
    dtype: str
    parameters: int
    weights: int
    unit: str
    units: int
    sites: int
    scores: int
    disk: int
    work: str
    stages: tuple[Stage, ...]
    peak: int
    peak_at: str
    host: int
    hardware: str
    gpus: int
    memory: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the tensors and the overhead of the process or GPU fit into the device's memory."""
        return self.peak + RUNTIME <= self.memory

    @property
    def seconds(self) -> float:
        """Time of all stages, divided among the devices; the minimum, if the model decides how many
        prompts are read."""
        return sum(stage.seconds for stage in self.stages) / self.gpus

    @property
    def most_seconds(self) -> float:
        """The same if every prompt of the sources has to be read."""
        return self.seconds + sum(stage.more for stage in self.stages) / self.gpus

    def text(self) -> str:
        """The plan for the console; its first line says whether the run fits and how long it takes."""
        devices = self.hardware if self.gpus == 1 else f"{self.gpus} × {self.hardware}"
        host = f", and {_size(self.host)} beside the GPU" if self.host > 2**30 else ""
        width = max(len(stage.name) for stage in self.stages)
        files = f"{_size(self.scores)} a set and method, {_size(self.disk)} on disk in all"
        notes = [*self.notes, "loading, downloads and the scoring of texts are not counted"]
        lines = [
            f"{self.recipe} on {devices}: {self._verdict()}",
            "",
            f"model   {self.model}: {_count(self.parameters)} parameters in {self.dtype}, "
            f"{_size(self.weights)}",
            f"scores  {self.units:,} {self.unit}s in {self.sites} sites; {files}",
            f"work    {self.work}",
            f"memory  {_size(self.peak)} of {_size(self.memory)} at most{host}; the most while doing: "
            f"{self.peak_at}",
            "",
            *(
                f"{s.name:{width}}  {s.tokens:>15,} tokens  {s.operations:8.1e} FLOP  "
                f"{_span(s.seconds / self.gpus):>7}"
                for s in self.stages
            ),
            "",
            *(f"- {note}" for note in notes),
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.fits:
            shortest, longest = _span(self.seconds), _span(self.most_seconds)
            return f"fits, about {shortest}" + (f" to {longest}" if longest != shortest else "")
        if self.weights + RUNTIME > self.memory:
            return "does not fit: use a device with more memory"
        return (
            "does not fit: give fewer batch_tokens, gradient_checkpointing true, or a device with more "
            "memory; a run halves its batches, and computes layers twice, where it meets the end of memory"
        )


def plan(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe",
    *,
    hardware: str | None = None,
    gpus: int = 1,
    config: str | None = None,
    try_prompts: int | None = None,
) -> Plan:
    """What a recipe needs, estimated without reading a weight: the model's own code runs on tensors that have
    shapes but no content.

    Args:
        recipe: as for `run`.
        hardware: a name in `SHEETS`, such as h100; None for this machine, which is measured for half a
            second.
        gpus: number of devices that share the samples, each with a whole model.
        config: a config.json, if the recipe's model cannot be reached.
        try_prompts: number of prompts, of each set that the model chooses, that the model itself completes
            here, to narrow the range of how many are needed.

    Raises:
        UserError: an unavailable configuration, sites that the model does not have, or unknown hardware.
        UnsupportedModel: an architecture or module without a rule.
    """
    loaded_recipe = load_recipe(recipe)
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; give at least 1")
    if try_prompts is not None:
        acceptance.require_tryable(loaded_recipe, try_prompts)
    if config and not Path(config).is_file():
        raise UserError(f"no such file: {config}; --config takes the config.json of the recipe's model")
    source = config or loaded_recipe.model.id
    device, dtype, settings = _machine(loaded_recipe, source, hardware)
    shaped = Shaped(settings, dtype)
    tried = None if try_prompts is None else acceptance.try_prompts(loaded_recipe, try_prompts)
    tokenizer = tokenizer_at_hand(loaded_recipe.model.id)
    stages = Stages(loaded_recipe, Rehearsal(shaped, device), tokenizer, tried)
    check_sizes(loaded_recipe, stages.sites)
    check_lengths(loaded_recipe, stages.context)
    if stages.tokenizer is not None:
        shaped_model = stages.rehearsal.shaped.model
        limits = Limits(stages.tokenizer, stages.context, vocabulary_size(shaped_model))
        check_samples(loaded_recipe, *samples_at_hand(loaded_recipe, stages.tokenizer), limits)
    stage_list = stages.all()
    peak, peak_at, host = _memory(stages, stage_list, shaped.weights, device)
    return Plan(
        recipe=loaded_recipe.name,
        model=loaded_recipe.model.id,
        dtype=str(dtype).removeprefix("torch."),
        parameters=shaped.model.num_parameters(),
        weights=shaped.weights,
        unit=loaded_recipe.attribution.unit,
        units=stages.units,
        sites=len(stages.sites),
        scores=4 * stages.units,
        disk=4 * stages.units * stages.work.score_files,
        work=stages.work.summary,
        stages=tuple(stage_list),
        peak=peak,
        peak_at=peak_at,
        host=host,
        hardware=device.name,
        gpus=gpus,
        memory=device.memory,
        notes=(*stages.notes, *_approximations(loaded_recipe, settings, source)),
    )


def _approximations(recipe: Recipe, settings: Any, source: str) -> Iterator[str]:
    if require_family(settings, source).experts:
        yield "every expert taken to get as many tokens as any other; where it is not so, more memory at once"
    if recipe.attribution.gradient_checkpointing == "offload":
        yield "gradient_checkpointing offload: the inputs of layers counted as if they stayed on the GPU"
    if recipe.model.device == MAP:
        yield (
            "device map: all weights counted on one GPU; what does not fit there goes to others, and to the "
            "CPU"
        )
    if getattr(settings, "quantization_config", None):
        yield "the weights are quantised, and counted as if they were not"


def _machine(recipe: Recipe, source: str, hardware: str | None) -> tuple[Hardware, torch.dtype, Any]:
    """The device, the model's dtype on it, and the model's configuration."""
    sheet = find_hardware(hardware) if hardware else None
    settings = load_config(source, REMEDY)
    require_family(settings, source)
    device = torch.device("cpu")
    if not sheet:
        require_loadable(source, dtype=recipe.model.dtype, device=recipe.model.device)
        device_name = recipe.model.device
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device_name in ("auto", MAP) else device_name
        )
    dtype = settings.dtype or torch.float32
    if recipe.model.dtype != "auto":
        dtype = DTYPES[recipe.model.dtype]
    elif dtype == torch.float16 and not sheet and device.type == "cpu":
        dtype = torch.float32
    return sheet or this_machine(device, dtype), dtype, settings


def _memory(stages: Stages, done: list[Stage], weights: int, device: Hardware) -> tuple[int, str, int]:
    """(peak bytes on the device, the stage with that peak, with a GPU also the peak bytes in the process)."""
    recipe, scores = stages.recipe, 4 * stages.units
    score_bytes = stages.count_scores_in_memory() * scores
    sums = 0
    if recipe.attribution.unit == "weight" and recipe.attribution.sums_device != "cpu":
        sums = stages.units * DTYPES[recipe.attribution.sums_dtype].itemsize
    # An ablated unit's values are kept until they are put back, and a weight's mask takes a byte.
    width = weights // max(1, stages.rehearsal.shaped.model.num_parameters())
    matrices = sum(site.out * site.inp for site in stages.sites)
    saved_values = round(stages.largest_removed_share() * matrices * width) + (
        stages.units if recipe.attribution.unit == "weight" else 0
    )
    peaks = {}
    for stage in done:
        # On a CPU, scores share the memory with the model; with a GPU only sums kept there do. While scoring,
        # the file being made is already part of the stage.
        if device.kind == "cpu":
            extra = max(0, score_bytes - scores) if stage.scoring else score_bytes
        else:
            extra = sums if stage.scoring else 0
        is_unpruned = stage.scoring and SEQUENTIAL not in stage.name
        peaks[stage.name] = (
            weights + device.held_bytes(stage.live) + extra + (0 if is_unpruned else saved_values)
        )
    worst = max(peaks, key=lambda name: peaks[name])
    return peaks[worst], worst, max(score_bytes, scores) if device.kind == "cuda" else 0


def _size(size: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def _count(number: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
