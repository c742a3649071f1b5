"""`plan`: a recipe in, what it needs out."""

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
        dtype: of the weights.
        weights: bytes of the model.
        scores, disk: bytes of one file of scores, and of all that the run leaves.
        work: the list of work in one line.
        stages: what it costs, on one device.
        peak: most bytes on a device at once, weights included.
        peak_at: the stage with the most.
        host: most bytes beside a GPU, in the process's own memory.
        memory: bytes that the device has.
        notes: what was assumed or is left out.
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
        """Of all stages, shared by the devices: the least, where the model decides how many prompts are
        read."""
        return sum(stage.seconds for stage in self.stages) / self.gpus

    @property
    def most_seconds(self) -> float:
        """The same where every prompt of their sources has to be read."""
        return self.seconds + sum(stage.more for stage in self.stages) / self.gpus

    def text(self) -> str:
        """A page for the console, whose first line says whether it fits and how long it takes."""
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
            least, most = _span(self.seconds), _span(self.most_seconds)
            return f"fits, about {least}" + (f" to {most}" if most != least else "")
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
    """What a recipe needs, without a weight being read: the model's own code runs on tensors that have shapes
    and no content.

    Args:
        recipe: as `run` takes it.
        hardware: a name of `SHEETS`, such as h100; None for this machine, which is measured for half a
            second.
        gpus: how many devices share the samples, each with a whole model.
        config: a config.json, where the recipe's model cannot be reached.
        try_prompts: so many prompts of each set that the model chooses are completed here, by the model
            itself, so that the range of how many it takes is narrower.

    Raises:
        UserError: a configuration that cannot be had, sites that it does not have, hardware that nobody
            knows.
        UnsupportedModel: an architecture or module without a rule.
    """
    loaded = load_recipe(recipe)
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; give at least 1")
    if try_prompts is not None:
        acceptance.require_tryable(loaded, try_prompts)
    if config and not Path(config).is_file():
        raise UserError(f"no such file: {config}; --config takes the config.json of the recipe's model")
    source = config or loaded.model.id
    device, dtype, settings = _machine(loaded, source, hardware)
    shaped = Shaped(settings, dtype)
    tried = None if try_prompts is None else acceptance.try_prompts(loaded, try_prompts)
    stages = Stages(loaded, Rehearsal(shaped, device), tokenizer_at_hand(loaded.model.id), tried)
    check_sizes(loaded, stages.sites)
    check_lengths(loaded, stages.context)
    if stages.tokenizer is not None:
        shaped_model = stages.rehearsal.shaped.model
        limits = Limits(stages.tokenizer, stages.context, vocabulary_size(shaped_model))
        check_samples(loaded, *samples_at_hand(loaded, stages.tokenizer), limits)
    done = stages.all()
    peak, peak_at, host = _memory(stages, done, shaped.weights, device)
    return Plan(
        recipe=loaded.name,
        model=loaded.model.id,
        dtype=str(dtype).removeprefix("torch."),
        parameters=shaped.model.num_parameters(),
        weights=shaped.weights,
        unit=loaded.attribution.unit,
        units=stages.units,
        sites=len(stages.sites),
        scores=4 * stages.units,
        disk=4 * stages.units * stages.work.score_files,
        work=stages.work.summary,
        stages=tuple(done),
        peak=peak,
        peak_at=peak_at,
        host=host,
        hardware=device.name,
        gpus=gpus,
        memory=device.memory,
        notes=(*stages.notes, *_approximations(loaded, settings, source)),
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
    """The device, the dtype that the model has on it, its configuration."""
    sheet = find_hardware(hardware) if hardware else None
    settings = load_config(source, REMEDY)
    require_family(settings, source)
    device = torch.device("cpu")
    if not sheet:
        require_loadable(source, dtype=recipe.model.dtype, device=recipe.model.device)
        wanted = recipe.model.device
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if wanted in ("auto", MAP) else wanted
        )
    dtype = settings.dtype or torch.float32
    if recipe.model.dtype != "auto":
        dtype = DTYPES[recipe.model.dtype]
    elif dtype == torch.float16 and not sheet and device.type == "cpu":
        dtype = torch.float32
    return sheet or this_machine(device, dtype), dtype, settings


def _memory(stages: Stages, done: list[Stage], weights: int, device: Hardware) -> tuple[int, str, int]:
    """(most bytes on the device, the stage that has them, most bytes in the process beside a GPU)."""
    recipe, scores = stages.recipe, 4 * stages.units
    held = stages.held() * scores
    sums = 0
    if recipe.attribution.unit == "weight" and recipe.attribution.sums_device != "cpu":
        sums = stages.units * DTYPES[recipe.attribution.sums_dtype].itemsize
    width = weights // max(1, stages.rehearsal.shaped.model.num_parameters())
    matrices = sum(site.out * site.inp for site in stages.sites)
    removed = round(stages.removed() * matrices * width) + (
        stages.units if recipe.attribution.unit == "weight" else 0
    )
    peaks = {}
    for stage in done:
        if device.kind == "cpu":
            beside = max(0, held - scores) if stage.scoring else held
        else:
            beside = sums if stage.scoring else 0
        whole = stage.scoring and SEQUENTIAL not in stage.name
        peaks[stage.name] = weights + device.holding(stage.live) + beside + (0 if whole else removed)
    worst = max(peaks, key=lambda name: peaks[name])
    return peaks[worst], worst, max(held, scores) if device.kind == "cuda" else 0


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
