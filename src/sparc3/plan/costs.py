"""What work costs: of a device by its data sheet, or as this machine does it in half a second; of a model by
running its code on tensors that have shapes and no content, and counting bytes, operations and time; the
run's total is in plan.py."""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..errors import unknown
from ..models.load import build_model
from ..models.sites import Site, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


_SHEETS = {
    "b200": (2250, 75, 8000, 180),
    "h200": (989, 67, 4800, 141),
    "h100": (989, 67, 3350, 80),
    "a100-80": (312, 19.5, 2039, 80),
    "a100-40": (312, 19.5, 1555, 40),
    "a100": (312, 19.5, 1555, 40),
    "l40s": (362, 91.6, 864, 48),
    "rtx4090": (165, 82.6, 1008, 24),
    "a10": (125, 31.2, 600, 24),
    "v100": (125, 15.7, 900, 32),
    "t4": (65, 8.1, 320, 16),
}
"""TFLOP/s in 16 and in 32 bits (dense arithmetic, no sparsity counted), GB/s, GB."""


def _hardware(name: str, half: float, single: float, traffic: float, memory: float) -> Hardware:
    speed = {2: half * 1e12 * ARITHMETIC, 4: single * 1e12 * ARITHMETIC, 8: single * 1e12 * ARITHMETIC / 2}
    return Hardware(name, "cuda", speed, traffic * 1e9 * TRAFFIC, LAUNCH, memory * 1e9)


SHEETS = {name: _hardware(name, *figures) for name, figures in _SHEETS.items()}


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


aten = torch.ops.aten
LOOKUPS = {aten.embedding, aten.index, aten.gather, aten.index_select}
"""Operations that read as much as they give, and not the whole of what they look into."""


class TensorCosts(TorchDispatchMode):
    """Inside, every operation is counted; what an element of a tensor is asked for that has no content is
    answered with "true" or one.

    Content have tensors that are made of Python's numbers, and a router's choice of experts, which is taken
    to be even: both are small.

    Attributes:
        now, peak: bytes of the tensors that live, and the most at any moment, without those that were there
            before.
        operations: floating-point operations of matrix products and attention.
        seconds: by the hardware's limits, operation by operation.
    """

    def __init__(self, hardware: Hardware, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hardware = hardware
        self.now = self.peak = 0
        self.operations = self.seconds = 0.0
        self._known: dict[int, Any] = {
            id(storage): storage for storage in (tensor.untyped_storage() for tensor in before)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _have_content((args, list(kwargs.values()))):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        # Outside of inference mode autograd has taken composite operations apart already.
        if func.namespace == "aten" and torch.is_inference_mode_enabled():
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = (
            _multiply_groups(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        )
        if func is aten.topk.default:
            made = made[0], _spread_evenly(made[1], args[0].shape[-1])
        given = list(_tensors(made))
        self._time(func, args, kwargs, made, given)
        for tensor in given:
            self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size

    def _time(self, func: Any, args: Any, kwargs: Any, made: Any, given: list[Tensor]) -> None:
        if func.is_view or not given:
            return
        operations = _operations(func, args, kwargs, made)
        read = given if func.overloadpacket in LOOKUPS else _tensors((args, list(kwargs.values())))
        touched = sum(tensor.numel() * tensor.element_size() for part in (read, given) for tensor in part)
        self.operations += operations
        self.seconds += self.hardware.seconds(operations, touched, max(2, given[0].element_size()))


def _have_content(args: Any) -> bool:
    """Whether all tensors among the arguments are real ones: made of numbers that Python knew, or of where
    tokens are routed."""
    given = list(_tensors(args))
    return bool(given) and not any(isinstance(tensor, FakeTensor) for tensor in given)


def _spread_evenly(chosen: Tensor, experts: int) -> Tensor:
    """A router's choice [tokens, k], as content: every expert is chosen equally often."""
    with no_dispatch():
        return torch.arange(chosen.numel()).remainder_(experts).view(chosen.shape)


def _multiply_groups(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What `_grouped_mm` gives, [tokens, out] of [tokens, in] and [experts, in, out], whose own shape rule
    knows bfloat16 alone."""
    return x.new_empty(len(x), weight.shape[-1])


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places it would name were it true everywhere."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for part in found:
            yield from _tensors(part)


def _operations(func: Any, args: Any, kwargs: Any, made: Any) -> float:
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if packet is aten._grouped_mm:  # every row of [tokens, in] with one of [experts, in, out]
        return float(2 * args[0].numel() * args[1].shape[-1])
    return float(flop_registry[packet](*args, **kwargs, out_val=made)) if packet in flop_registry else 0.0


class ShapedSite(Site):
    """A site whose weight has a shape and no values."""

    quantised = False


class Shaped:
    """A model of a configuration, whose tensors have shapes and no content, so that it takes seconds and no
    memory.

    Attributes:
        model: in eval mode; use it inside `active`.
        weights: bytes of its parameters and buffers.

    Raises:
        UserError: transformers cannot build this configuration.
        UnsupportedModel: an architecture without a row in the family table.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = build_model(config, dtype=dtype)
        self.model.tie_weights()  # which transformers 5.0 leaves out on "meta"
        self.held = self._without_content()
        self.weights = sum({id(tensor): tensor.nbytes for tensor in self.held}.values())

    def _without_content(self) -> list[Tensor]:
        """Put tensors on the "cpu", which has none of their content, in the place of all parameters and
        buffers; tied ones stay tied."""
        made: dict[int, Tensor] = {}
        for module in self.model.modules():
            for places in (module._parameters, module._buffers):
                for name, tensor in places.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        shaped = FakeTensor(self._mode, tensor.detach().to("meta"), torch.device("cpu"))
                        kept = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(shaped, requires_grad=False) if kept else shaped
                    places[name] = made[id(tensor)]
        return list(made.values())

    @contextmanager
    def active(self) -> Iterator["PreTrainedModel"]:
        """Inside, tensors that are made have shapes and no content."""
        with self._mode:
            yield self.model

    def sites(self, roles: Iterable[str]) -> list[Site]:
        return [ShapedSite(**vars(site)) for site in sites_of(self.model, roles)]
