"""Offloaded weights, which accelerate keeps on the CPU and copies to the GPU for each forward pass.

Its hook wraps a module's forward: before it, the hook fills the parameters from its weights map, and after
it they are empty again, on the meta device. So to read or change the values of such a parameter, use those
in the map.
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
    """The tensor with a parameter's values: accelerate's tensor on the CPU if offloaded, else the
    parameter."""
    parameter, weights_map = getattr(module, name), _weights_map(module)
    assert isinstance(parameter, Tensor)
    return (
        parameter
        if weights_map is None or not (name in module._parameters or parameter.is_meta)
        else weights_map[name]
    )


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` with their values (`value_of`); tied parameters occur once."""
    seen: set[tuple[bool, int]] = set()
    for key, module, name in _parameters(model):
        value = value_of(module, name)
        is_offloaded = value is not module._parameters[name]
        # Tied parameters are one object; in accelerate's map they are several, which share their memory.
        address = value.data_ptr() if is_offloaded and value.numel() else id(module._parameters[name])
        if (is_offloaded, address) not in seen:
            seen.add((is_offloaded, address))
            yield key, value


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` with the values of offloaded parameters."""
    state = model.state_dict()
    return state | {
        key: value_of(module, name)
        for key, module, name in _parameters(model)
        if key in state and _weights_map(module) is not None
    }


def copy_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the model. The copy of an offloaded model is on the CPU, without accelerate's hooks."""
    offloaded = is_offloaded(model)
    copied = copy.deepcopy(model, _map_to_cpu(model) if offloaded else {})
    for name in MOVES:  # accelerate's replacements, which would move the original
        copied.__dict__.pop(name, None)
    if not offloaded:
        return copied
    from accelerate.hooks import remove_hook_from_submodules

    values = [(module, name, value_of(module, name)) for _, module, name in _parameters(copied)]
    remove_hook_from_submodules(copied)
    parameters: dict[tuple[torch.device, int], nn.Parameter] = {}  # keeps tied parameters tied
    for module, name, value in values:
        requires_grad = module._parameters[name].requires_grad  # type: ignore[union-attr]
        module._parameters[name] = parameters.setdefault(
            (value.device, value.data_ptr()), nn.Parameter(value, requires_grad=requires_grad)
        )
    copied.__dict__.pop("hf_device_map", None)
    return copied.to("cpu")


MOVES = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate replaces on a model that it distributes over devices."""


def _map_to_cpu(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy with copies of GPU tensors on the CPU, since the GPU has no room for them twice."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type not in ("cpu", "meta"):
                copied = tensor.detach().to("cpu")
                if isinstance(tensor, nn.Parameter):
                    copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = copied
    return memo


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight is on the CPU and copied for each use."""
    return any(_weights_map(module) is not None for module in model.modules())


def count_offloaded_layers(layers: Iterable[nn.Module]) -> int:
    """The number of layers with offloaded weights."""
    return sum(map(is_offloaded, layers))


def renew_(model: nn.Module) -> None:
    """Recreate accelerate's empty parameters if they come from inference mode, since such tensors can never
    require a gradient."""
    for _, module, name in _parameters(model):
        empty = module._parameters[name]
        if empty is not None and empty.is_inference() and _weights_map(module) is not None:
            module._parameters[name] = nn.Parameter(
                torch.empty_like(empty, device="meta"), requires_grad=empty.requires_grad
            )


def device_of(model: "PreTrainedModel") -> torch.device:
    """The device for the model's input."""
    first: torch.device = model.device
    if first.type != "meta":
        return first
    device: Any = next(hook.execution_device for hook in _hooks(model.get_input_embeddings()) if hook.offload)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def forward_name(module: nn.Module) -> str:
    """The attribute with the forward that has access to the module's weights: the one inside accelerate's
    hook, if there is one."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def first_out_of_reach(model: nn.Module) -> str | None:
    """The first parameter whose values are not in memory, so that they cannot be changed; None if all are."""
    for key, module, name in _parameters(model):
        value = value_of(module, name)
        # A map that reads from the disk returns a new tensor each time.
        if value.is_meta or (
            _weights_map(module) is not None and value.data_ptr() != value_of(module, name).data_ptr()
        ):
            return key
    return None


def gpu_room(free: Mapping[Any, int], needed: int, name: str) -> dict[Any, int]:
    """Device → bytes for weights: all free memory of a GPU except `RESERVE`, and nine tenths of the CPU's.

    Args:
        free: free bytes by device, from accelerate's get_max_memory: numbers for GPUs, and "cpu".
        needed: bytes of all weights.

    Raises:
        UserError: there is too little room on all devices together, or there are GPUs, but none has room.
    """
    gpus = [size for device, size in free.items() if device != "cpu"]
    if gpus and max(gpus) <= RESERVE:
        raise UserError(
            f"no GPU has more than {RESERVE / 2**30:.0f} GiB free, which are reserved for activations; free "
            "memory on one, or use device cpu"
        )
    room = {device: int(0.9 * n) if device == "cpu" else max(0, n - RESERVE) for device, n in free.items()}
    if needed > sum(room.values()):
        raise UserError(
            f"the weights of '{name}' take {needed / 2**30:.3g} GiB, but the GPUs and the CPU together have "
            f"room for {sum(room.values()) / 2**30:.3g} GiB; use a machine with more memory"
        )
    return room


RESERVE = 2 * 2**30
"""Bytes of a GPU reserved for activations: 2,048 tokens of an 8B model take about one GiB with gradient
checkpointing."""


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(key, module, name) of every parameter in order; a tied one occurs at each of its places."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, module, name


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [
        single_hook
        for single_hook in getattr(hook, "hooks", (hook,))  # of accelerate's SequentialHook
        if getattr(single_hook, "weights_map", None) is not None
    ]


def _weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    """accelerate's map of the module's offloaded weights; None without any."""
    return next((hook.weights_map for hook in _hooks(module) if hook.offload), None)
