"""The rival of benchmarks/sparsegpt.py against the update as the paper states it: by the inverse Hessian of the columns to come, inverted anew at each."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def sparsegpt() -> Any:
    place = Path(__file__).parents[1] / "benchmarks/sparsegpt.py"
    spec = importlib.util.spec_from_file_location("sparsegpt", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step_by_step(
    weight: Tensor, hessian: Tensor, block: int, fraction: float, groups: tuple[int, int] | None
) -> Tensor:
    w, columns = weight.clone(), weight.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    ahead = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]
    cost = torch.stack([one[0, 0] for one in ahead])
    gone = torch.zeros_like(w, dtype=torch.bool)
    for i in range(columns):
        if groups is None and i % block == 0:
            saliency = w[:, i : i + block] ** 2 / cost[i : i + block]
            order = saliency.flatten().argsort()[: int(saliency.numel() * fraction)]
            chosen = torch.zeros(saliency.numel(), dtype=torch.bool)
            chosen[order] = True
            gone[:, i : i + block] = chosen.view(saliency.shape)
        if groups and i % groups[1] == 0:
            saliency = w[:, i : i + groups[1]] ** 2 / cost[i : i + groups[1]]
            for row, places in enumerate(saliency.argsort(1)[:, : groups[0]].tolist()):
                gone[row, [i + place for place in places]] = True
        for row in range(len(w)):
            if gone[row, i]:
                w[row, i:] -= w[row, i] / ahead[i][0, 0] * ahead[i][0]
                w[row, i] = 0
    return w


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize(("fraction", "groups"), [(0.5, None), (0.25, None), (0.0, (2, 4)), (0.0, (1, 4))])
def test_columns_are_removed_and_made_up_for(
    sparsegpt: Any,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    fraction: float,
    groups: tuple[int, int] | None,
) -> None:
    generator = torch.Generator().manual_seed(block)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 16, generator=generator, dtype=torch.float64) @ torch.randn(
        16, 16, generator=generator, dtype=torch.float64
    )
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    hessian = inputs.T @ inputs
    found = sparsegpt.pruned(weight, hessian, fraction=fraction, groups=groups)
    torch.testing.assert_close(found, step_by_step(weight, hessian, block, fraction, groups))
    share = groups[0] / groups[1] if groups else fraction
    assert float((found == 0).double().mean()) == share
    # The same weights removed without making up for them do more damage.
    bare = weight.masked_fill(found == 0, 0)
    errors = [float(((one - weight) @ inputs.T).square().sum()) for one in (found, bare)]
    assert errors[0] < errors[1]
