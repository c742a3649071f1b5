"""A copy of a model that computes in float64 throughout, so that what is left of a gap is a mistake and not rounding."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models import ROLES, family_of, sites_of
from ..offloading import copied, is_offloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Float64(TorchFunctionMode):
    """Inside, what is told to round to float32 does not: transformers' norms, softmax and rotations do so in any model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        elif func in (Tensor.to, torch.softmax, Tensor.softmax, F.softmax):
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def exact_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy in float64, or in float32 where that does not fit into memory; the model itself where neither does, or it is quantised."""
    if quantised(model):
        return model
    room, now = _room(torch.device("cpu") if is_offloaded(model) else model.device), _size(model, model.dtype.itemsize)
    for dtype in (torch.float64, torch.float32):
        if dtype == model.dtype == torch.float32:
            return model
        if now + 1.3 * _size(model, dtype.itemsize) < room:
            twin = copied(model).to(dtype)
            if dtype == torch.float64:
                twin.forward = _in_float64(twin.forward)
            return twin
    return model


def quantised(model: "PreTrainedModel") -> bool:
    return any(site.quantised for site in sites_of(model, [role for role in ROLES if role in family_of(model).roles]))


def _in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return forward(*args, **kwargs)

    return wrapped


def _size(model: "PreTrainedModel", width: int) -> int:
    return width * int(sum(parameter.numel() for parameter in model.parameters()))


def _room(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not every system says
        return 4 * 2**30
