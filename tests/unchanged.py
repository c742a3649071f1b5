"""Everything of a model that a temporary change might forget to put back."""

import sys
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Values, gradients, flags, hooks and attributes of each module; its class and the module that defines it; the configuration."""
    found: dict[str, Any] = {}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}: value"] = (
            parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        found[f"{name}: state"] = (
            id(parameter),
            parameter.requires_grad,
            parameter.grad is None,
            parameter.data_ptr(),
        )
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = {
            key: id(value) for key, value in module.__dict__.items() if key != "training"
        }
        found[f"{name}: hooks"] = {
            key: dict(value)
            for key, value in module.__dict__.items()
            if "hook" in key and isinstance(value, dict)
        }
        found[f"{name}: training"] = module.training
        for kind in type(module).__mro__[:-1]:
            found[f"class {kind.__qualname__}"] = {
                key: id(value) for key, value in vars(kind).items() if not key.startswith("__")
            }
            source = sys.modules[kind.__module__]
            if source.__name__.startswith("transformers.models"):
                found[f"module {source.__name__}"] = {
                    key: id(value) for key, value in vars(source).items() if not key.startswith("__")
                }
    found["config"] = (id(model.config), model.config.to_dict(), model.config._attn_implementation)  # type: ignore[union-attr, operator]
    return found


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert equality, naming what differs and not its value."""
    assert one.keys() == other.keys()
    assert [key for key in one if one[key] != other[key]] == []
