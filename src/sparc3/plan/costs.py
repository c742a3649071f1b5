"""The cost of work. A device's speed comes from its data sheet, or from half a second of measurements on this
machine. A model's cost comes from running its code on tensors that have shapes but no content, and counting
bytes, operations and time. plan.py adds up the run's total."""

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
"""The shares of a data sheet's arithmetic and memory traffic that large models reach in practice, and the
seconds that PyTorch needs to start an operation."""

RUNTIME = 0.7e9
"""Bytes that the process or the GPU uses before any tensor: Python with its libraries, or CUDA's context."""


HOLES = 1.3
"""The memory of a process on a CPU divided by that of its live tensors: malloc keeps freed pieces between
them (docs/planning.md)."""


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        kind: "cuda" or "cpu".
        speed: size of a floating-point number in bytes → operations per second on such numbers.
        traffic: bytes per second between memory and arithmetic.
        launch: seconds that the smallest operation takes.
        memory: bytes.
    """

    name: str
    kind: str
    speed: dict[int, float]
    traffic: float
    launch: float
    memory: float

    def seconds(self, operations: float, bytes_moved: float, width: int) -> float:
        """Time of one operation: its arithmetic, its memory traffic or its launch, whichever is longest."""
        return max(operations / self.speed[min(width, 8)], bytes_moved / self.traffic, self.launch)

    def held_bytes(self, live: int) -> int:
        """Bytes of memory needed for temporary tensors of which at most `live` bytes exist at once."""
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
"""Device → TFLOP/s in 16 and in 32 bits (dense, without structured sparsity), GB/s, GB."""


def _hardware(name: str, half_speed: float, single_speed: float, traffic: float, memory: float) -> Hardware:
    speed = {
        2: half_speed * 1e12 * ARITHMETIC,
        4: single_speed * 1e12 * ARITHMETIC,
        8: single_speed * 1e12 * ARITHMETIC / 2,
    }
    return Hardware(name, "cuda", speed, traffic * 1e9 * TRAFFIC, LAUNCH, memory * 1e9)


SHEETS = {name: _hardware(name, *figures) for name, figures in _SHEETS.items()}


def find_hardware(name: str) -> Hardware:
    """Hardware by its name. Raises UserError for an unknown name."""
    if name.lower() not in SHEETS:
        raise unknown("hardware", name, SHEETS)
    return SHEETS[name.lower()]


def this_machine(device: torch.device, dtype: torch.dtype) -> Hardware:
    """This machine's device, measured with matrix products and copies, with the current number of threads."""
    cuda = device.type == "cuda"
    side = 4096 if cuda else 768
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    speed = 2.0 * side**3 / _shortest_time(lambda: left @ right, device)
    large, small = torch.ones(2**26 if cuda else 2**23, device=device), torch.ones(8, device=device)
    traffic = 2.0 * large.nbytes / _shortest_time(lambda: large + 1, device)
    launch = _shortest_time(lambda: [small + 1 for _ in range(100)], device) / 100
    name = torch.cuda.get_device_name(device) if cuda else f"this CPU, {torch.get_num_threads()} threads"
    memory = float(torch.cuda.mem_get_info(device)[1]) if cuda else _ram()
    return Hardware(name, device.type, dict.fromkeys((2, 4, 8), speed), traffic, 2 * launch, memory)


def _shortest_time(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few repetitions, so that other processes on the machine do not matter."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first repetition includes warming up


def _ram() -> float:
    """This machine's memory in bytes, or the limit of its control group if that is smaller."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


aten = torch.ops.aten
LOOKUPS = {aten.embedding, aten.index, aten.gather, aten.index_select}
"""Operations that read only as much as they return, not their whole input."""


class TensorCosts(TorchDispatchMode):
    """Inside, every operation is counted. Reading an element of a tensor without content gives True or 1.

    Only two kinds of tensors have content, and both are small: those made from Python's numbers, and a
    router's choice of experts, which is assumed to be even.

    Attributes:
        now, peak: bytes of live tensors, and the largest number at any moment, without tensors that existed
            before.
        operations: floating-point operations of matrix products and attention.
        seconds: estimated from the hardware's limits, operation by operation.
    """

    def __init__(self, hardware: Hardware, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hardware = hardware
        self.now = self.peak = 0
        self.operations = self.seconds = 0.0
        self._known: dict[int, Any] = {
            id(storage): storage for storage in (tensor.untyped_storage() for tensor in before)
        }
        # Storages from before are held themselves, so that no new one can get the id of one that was freed.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _have_content((args, list(kwargs.values()))):
            with no_dispatch():
                return func(*args, **kwargs)
        # item(): a tensor without content must still answer, or the model's own code could not go on.
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        # Outside inference mode, autograd has already decomposed composite operations.
        if func.namespace == "aten" and torch.is_inference_mode_enabled():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = (
            _multiply_groups(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        )
        if func is aten.topk.default:
            result = result[0], _spread_evenly(result[1], args[0].shape[-1])
        outputs = list(_tensors(result))
        self._time(func, args, kwargs, result, outputs)
        for tensor in outputs:
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size

    def _time(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        if func.is_view or not outputs:
            return
        operations = _operations(func, args, kwargs, result)
        inputs = outputs if func.overloadpacket in LOOKUPS else _tensors((args, list(kwargs.values())))
        bytes_moved = sum(
            tensor.numel() * tensor.element_size() for part in (inputs, outputs) for tensor in part
        )
        self.operations += operations
        self.seconds += self.hardware.seconds(operations, bytes_moved, max(2, outputs[0].element_size()))


def _have_content(args: Any) -> bool:
    """Whether all tensors among the arguments have content: Python's numbers, or a router's choices."""
    tensors = list(_tensors(args))
    return bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)


def _spread_evenly(choice: Tensor, experts: int) -> Tensor:
    """Content for a router's choice [tokens, k], in which every expert is chosen equally often."""
    with no_dispatch():
        return torch.arange(choice.numel()).remainder_(experts).view(choice.shape)


def _multiply_groups(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The shape of `_grouped_mm`: [tokens, out] from [tokens, in] and [experts, in, out]. PyTorch's own shape
    rule supports only bfloat16."""
    return x.new_empty(len(x), weight.shape[-1])


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the indices of all its elements, as if it were true everywhere."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _operations(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if packet is aten._grouped_mm:  # each row of [tokens, in] times one matrix of [experts, in, out]
        return float(2 * args[0].numel() * args[1].shape[-1])
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


class ShapedSite(Site):
    """A site whose weight has a shape but no values."""

    is_quantised = False


class Shaped:
    """A model built from a configuration, whose tensors have shapes but no content, so that it needs
    seconds and almost no memory.

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
        self.model.tie_weights()  # transformers 5.0 does not tie them on "meta"
        self.held = self._strip_content()
        self.weights = sum({id(tensor): tensor.nbytes for tensor in self.held}.values())

    def _strip_content(self) -> list[Tensor]:
        """Replace all parameters and buffers by tensors without content that claim to be on the CPU; tied
        ones stay tied."""
        replacements: dict[int, Tensor] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in replacements:
                        shaped = FakeTensor(self._mode, tensor.detach().to("meta"), torch.device("cpu"))
                        is_parameter = isinstance(tensor, nn.Parameter)
                        replacements[id(tensor)] = (
                            nn.Parameter(shaped, requires_grad=False) if is_parameter else shaped
                        )
                    table[name] = replacements[id(tensor)]
        return list(replacements.values())

    @contextmanager
    def active(self) -> Iterator["PreTrainedModel"]:
        """Inside, new tensors have shapes but no content."""
        with self._mode:
            yield self.model

    def sites(self, roles: Iterable[str]) -> list[Site]:
        return [ShapedSite(**vars(site)) for site in sites_of(self.model, roles)]
