"""What a device can do: by its data sheet, or as this machine does it in half a second."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import unknown

ARITHMETIC, TRAFFIC, LAUNCH = 0.6, 0.8, 12e-6
"""Of a data sheet's arithmetic and memory traffic what large models get in practice, and the seconds that
PyTorch takes to start an operation."""

RUNTIME = 0.7e9
"""Bytes that the process or the GPU holds before any tensor: Python with its libraries, or CUDA's context."""


HOLES = 1.3
"""How much more than the tensors that live a process holds on a CPU: C's malloc keeps pieces of what was
freed between them (docs/planning.md)."""


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        kind: "cuda" or "cpu".
        speed: number of bytes of a floating-point number → operations a second on such numbers.
        traffic: bytes a second between memory and arithmetic.
        launch: seconds that the smallest operation takes.
        memory: bytes.
    """

    name: str
    kind: str
    speed: dict[int, float]
    traffic: float
    launch: float
    memory: float

    def seconds(self, operations: float, touched: float, width: int) -> float:
        """Time of one operation: its arithmetic, its memory traffic or its launch, whichever is longest."""
        return max(operations / self.speed[min(width, 8)], touched / self.traffic, self.launch)

    def holding(self, live: int) -> int:
        """Bytes that tensors that come and go take up, of which `live` bytes live at once at most."""
        return round(live * HOLES) if self.kind == "cpu" else live


def _sheet(name: str, half: float, single: float, traffic: float, memory: float) -> Hardware:
    """TFLOP/s in 16 and in 32 bits, GB/s, GB."""
    speed = {2: half * 1e12 * ARITHMETIC, 4: single * 1e12 * ARITHMETIC, 8: single * 1e12 * ARITHMETIC / 2}
    return Hardware(name, "cuda", speed, traffic * 1e9 * TRAFFIC, LAUNCH, memory * 1e9)


SHEETS = {
    sheet.name: sheet
    for sheet in (
        _sheet("b200", 2250, 75, 8000, 180),
        _sheet("h200", 989, 67, 4800, 141),
        _sheet("h100", 989, 67, 3350, 80),
        _sheet("a100-80", 312, 19.5, 2039, 80),
        _sheet("a100-40", 312, 19.5, 1555, 40),
        _sheet("a100", 312, 19.5, 1555, 40),
        _sheet("l40s", 362, 91.6, 864, 48),
        _sheet("rtx4090", 165, 82.6, 1008, 24),
        _sheet("a10", 125, 31.2, 600, 24),
        _sheet("v100", 125, 15.7, 900, 32),
        _sheet("t4", 65, 8.1, 320, 16),
    )
}
"""Dense arithmetic, no sparsity counted."""


def find_hardware(name: str) -> Hardware:
    """Hardware by its name. Raises UserError where nobody knows it."""
    if name.lower() not in SHEETS:
        raise unknown("hardware", name, SHEETS)
    return SHEETS[name.lower()]


def this_machine(device: torch.device, dtype: torch.dtype) -> Hardware:
    """This machine's device, measured on matrices and copies, as many threads working as there are now."""
    cuda = device.type == "cuda"
    side = 4096 if cuda else 768
    one, two = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    speed = 2.0 * side**3 / _shortest_time(lambda: one @ two, device)
    large, small = torch.ones(2**26 if cuda else 2**23, device=device), torch.ones(8, device=device)
    traffic = 2.0 * large.nbytes / _shortest_time(lambda: large + 1, device)
    launch = _shortest_time(lambda: [small + 1 for _ in range(100)], device) / 100
    name = torch.cuda.get_device_name(device) if cuda else f"this CPU, {torch.get_num_threads()} threads"
    memory = float(torch.cuda.mem_get_info(device)[1]) if cuda else _ram()
    return Hardware(name, device.type, dict.fromkeys((2, 4, 8), speed), traffic, 2 * launch, memory)


def _shortest_time(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the quickest of a few goes: what others do on the machine meanwhile is not its speed."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _ram() -> float:
    """This machine's memory, or what its control group leaves of it."""
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(whole, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return whole
