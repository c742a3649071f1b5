"""Weights that accelerate keeps on the CPU, away from their modules, and copies to the GPU for the time of a
forward pass.

Its hook stands before a module's forward: ahead of it the parameters are filled from the hook's map, and
after it they are empty again, on the meta device. So the values of such a parameter, to read and to change,
are those of the map.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def value_of(module: nn.Module, name: str) -> Tensor:
    """What holds a parameter's values: accelerate's tensor on the CPU where it keeps one, else itself."""
    held, kept = getattr(module, name), _weights_map(module)
    assert isinstance(held, Tensor)
    return held if kept is None or not (name in module._parameters or held.is_meta) else kept[name]


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, each with its values (`value_of`); what is tied comes once."""
    seen: set[tuple[bool, int]] = set()
    for key, module, name in _parameters(model):
        value = value_of(module, name)
        away = value is not module._parameters[name]
        place = (away, value.data_ptr() if away and value.numel() else id(module._parameters[name]))
        if place not in seen:
            seen.add(place)
            yield key, value


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` with the values of its parameters."""
    state = model.state_dict()
    return state | {
        key: value_of(module, name)
        for key, module, name in _parameters(model)
        if key in state and _weights_map(module) is not None
    }


def copy_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the model. The copy of an offloaded model is on the CPU, without accelerate's hooks."""
    away = is_offloaded(model)
    twin = copy.deepcopy(model, _map_to_cpu(model) if away else {})
    for name in MOVES:  # accelerate's stand-ins, functions that move the original
        twin.__dict__.pop(name, None)
    if not away:
        return twin
    from accelerate.hooks import remove_hook_from_submodules

    values = [(module, name, value_of(module, name)) for _, module, name in _parameters(twin)]
    remove_hook_from_submodules(twin)
    made: dict[tuple[torch.device, int], nn.Parameter] = {}  # what is tied stays so
    for module, name, value in values:
        asked = module._parameters[name].requires_grad  # type: ignore[union-attr]
        module._parameters[name] = made.setdefault(
            (value.device, value.data_ptr()), nn.Parameter(value, requires_grad=asked)
        )
    twin.__dict__.pop("hf_device_map", None)
    return twin.to("cpu")


MOVES = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate shadows on a model which it spreads."""


def _map_to_cpu(model: nn.Module) -> dict[int, Any]:
    """For deepcopy: what lies on a GPU is copied to the CPU, since the GPU has no room for it twice."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type not in ("cpu", "meta"):
                there = tensor.detach().to("cpu")
                if isinstance(tensor, nn.Parameter):
                    there = nn.Parameter(there, requires_grad=tensor.requires_grad)
                made[id(tensor)] = there
    return made


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight is kept on the CPU and copied whenever it is used."""
    return any(_weights_map(module) is not None for module in model.modules())


def offloaded_layers(layers: Iterable[nn.Module]) -> int:
    """How many of the layers have such weights."""
    return sum(map(is_offloaded, layers))


def renew_(model: nn.Module) -> None:
    """Make accelerate's empty parameters anew, which of inference mode can never ask for a gradient."""
    for _, module, name in _parameters(model):
        empty = module._parameters[name]
        if empty is not None and empty.is_inference() and _weights_map(module) is not None:
            module._parameters[name] = nn.Parameter(
                torch.empty_like(empty, device="meta"), requires_grad=empty.requires_grad
            )


def device_of(model: "PreTrainedModel") -> torch.device:
    """The device that the model's input belongs on."""
    first: torch.device = model.device
    if first.type != "meta":
        return first
    device: Any = next(hook.execution_device for hook in _hooks(model.get_input_embeddings()) if hook.offload)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def forward_within(module: nn.Module) -> str:
    """The name of the forward that has the module's weights at hand: behind accelerate's hook, if any."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def first_out_of_reach(model: nn.Module) -> str | None:
    """The first parameter whose values are not in memory, where they could be changed; None where all are."""
    for key, module, name in _parameters(model):
        value = value_of(module, name)
        # A map that reads the disk gives another tensor each time.
        if value.is_meta or (
            _weights_map(module) is not None and value.data_ptr() != value_of(module, name).data_ptr()
        ):
            return key
    return None


def gpu_room(free: Mapping[Any, int], needed: int, name: str) -> dict[Any, int]:
    """How many bytes of weights each device takes: a GPU all but `RESERVE` of what it has free, and the CPU
    nine tenths.

    Args:
        free: bytes by device, as accelerate's get_max_memory has it: numbers for GPUs, "cpu".
        needed: bytes of all weights.

    Raises:
        UserError: all of them together take less than is needed, or there are GPUs and none has room.
    """
    gpus = [size for device, size in free.items() if device != "cpu"]
    if gpus and max(gpus) <= RESERVE:
        raise UserError(
            f"no GPU has more than the {RESERVE / 2**30:.0f} GiB free that are left to activations; free "
            "one, or use device cpu"
        )
    room = {where: int(0.9 * n) if where == "cpu" else max(0, n - RESERVE) for where, n in free.items()}
    if needed > sum(room.values()):
        raise UserError(
            f"the weights of '{name}' take {needed / 2**30:.3g} GiB, and the GPUs and the CPU together have "
            f"room for {sum(room.values()) / 2**30:.3g} GiB; use a machine with more"
        )
    return room


RESERVE = 2 * 2**30
"""Bytes of a GPU that are left to activations: 2,048 tokens of an 8B model take about one GiB where layers
are computed twice."""


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(key, module, name) of every parameter in order; a tied one comes at each of its places."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, module, name


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "weights_map", None) is not None]


def _weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    """accelerate's map of the module's weights; None where it keeps none away."""
    return next((hook.weights_map for hook in _hooks(module) if hook.offload), None)
