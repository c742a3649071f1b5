"""A GPU that is only pretended: torch's tensors without content keep the device that they are on, and refuse to be mixed with those of another.

Run as `python pretended_gpu.py MODEL PARTS` by test_offloading.py, in a process of its own, because a device is added to torch for good. It prints a
line for each thing asked of the model, with the devices of what came out.
"""

import sys
import warnings
from typing import Any

import accelerate.hooks
import torch
from tiny import samples, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from sparc3.attribution.methods import settings_for
from sparc3.attribution.sums import Settings, Sums
from sparc3.circuits.ablate import ablated
from sparc3.circuits.circuit import Circuit
from sparc3.models.families import ROLES
from sparc3.models.offloading import _map_to_cpu, device_of
from sparc3.models.sites import Site, family_of, sites_of
from sparc3.samples.batches import encode, make_batches
from sparc3.samples.reference_set import ReferenceSet


class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_autocast_enabled(self) -> bool:
        return False


backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Module())
GPU = torch.device("gpu:0")


class Gathered(Sums):
    """Notes where sums come from, and looks at no value."""

    def add(self, batch: Any, gathered: Any) -> None:
        self.found = sorted({str(value.device) for value in gathered.values()})


def placed(name: str, mode: FakeTensorMode, away: str) -> Any:
    """A model whose parts that begin with `away` are offloaded, and the others on the GPU.

    Parameters are put in place without accelerate's checks.
    """
    model = tiny(name, dtype=torch.float32, attn_implementation="eager")
    kept = {key: mode.from_tensor(value.detach()) for key, value in model.state_dict().items()}
    empty = {}
    for path, module in model.named_modules():
        for part, one in module._parameters.items():
            if one is not None:
                empty[module, part] = f"{path}.{part}", nn.Parameter(torch.empty_like(one, device="meta"))
        module._buffers.update(
            {part: mode.from_tensor(one) for part, one in module._buffers.items() if one is not None}
        )

    def put(module: nn.Module, part: str, device: Any, value: Any = None, **options: Any) -> None:
        for step in part.split(".")[:-1]:
            module = getattr(module, step)
        part = part.rpartition(".")[2]
        if part in module._buffers:
            module._buffers[part] = module._buffers[part].to(device)
        else:
            key, nothing = empty[module, part]
            module._parameters[part] = (
                nothing if str(device) == "meta" else (kept[key] if value is None else value).to(device)
            )

    accelerate.hooks.set_module_tensor_to_device = put
    layers = family_of(model).layers
    parts = [
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[0] == layers or not (path.startswith(layers) or [*module.children()])
    ]
    with mode:
        accelerate.hooks.attach_align_device_hook_on_blocks(
            model, dict.fromkeys(("", *parts), GPU), {path: path.startswith(away) for path in parts}, kept
        )
    return model


def on_device(plain: Any) -> Any:
    """torch.tensor, which makes its values on the device itself, where there is nothing to make them."""
    return lambda data, *args, device=None, **options: plain(data, *args, **options).to(device or "cpu")


ASKED: list[dict[str, Any]] = [
    {"neuron": "signed"},
    {"neuron": "abs"},
    {"unit": "head"},
    {"unit": "weight"},
    {"unit": "weight", "sums_device": "gpu:0"},
    {"method": "cp-lrp"},
    {"gradient_checkpointing": "offload"},
    {"method": "gradient"},
    {"method": "wanda"},
    {"method": "activation"},
]

if __name__ == "__main__":
    encoded = encode(
        ReferenceSet.of(samples(4)), None, "predicted", context=32, vocabulary=40, truncate=False
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = placed(sys.argv[1], mode, sys.argv[2])
    torch.tensor = on_device(torch.tensor)
    torch.Tensor.__bool__ = lambda value: True  # everything is finite
    Site.is_quantised = property(lambda site: False)  # which the class of a tensor without content looks like
    warnings.simplefilter("ignore")
    with mode:
        print(
            "what a copy takes from the GPU is on the",
            *{str(value.device) for value in _map_to_cpu(model).values()},
            flush=True,
        )
        (batch,) = make_batches(encoded, 10**6, device_of(model))
        for ask in ASKED:
            every = [role for role in ROLES if role in family_of(model).roles]
            roles = tuple(
                {"head": ["attn.o"], "activation": ["mlp.up"]}.get(ask.get("unit", ask.get("method")), every)
            )
            given = {
                "method": "lrp",
                "unit": "neuron",
                "target": "predicted",
                "neuron": "abs",
                "reduce": "mean",
                "gradient_checkpointing": True,
                **ask,
            }
            method, settings = settings_for(Settings(**given), roles)
            sums = Gathered(settings)
            list(method.run(model, [batch], sites_of(model, roles), settings, sums))
            print(
                ask,
                *sums.found,
                *sorted({f"total {total.device}" for total in sums.totals.values()}),
                flush=True,
            )
        for role, unit in (("mlp.up", "neuron"), ("attn.o", "head")):
            for strength in (1.0, 0.5):
                circuit = Circuit(
                    unit, {site.name: (0, 1) for site in sites_of(model, [role])}, strength=strength
                )
                with ablated(model, circuit):
                    print(unit, strength, model(batch.ids, use_cache=False).logits.device)
