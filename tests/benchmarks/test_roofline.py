"""The benchmark's own arithmetic: counted operations are the operations, workloads are recipes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftctl import recipe, surgery
from peftctl.batch import build
from peftctl.row import Row
from tests.benchmarks.roofline import flops, gemm_rate
from tests.benchmarks.workloads import WORKLOADS, Workload
from tests.models import tiny

LENGTH = 12


def rows(*lengths: int, start: int = 3) -> list[Row]:
    return [Row(tuple(range(start, start + n)), (0.0,) + (1.0,) * (n - 1), i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_operations_are_those_of_torch(name: str) -> None:
    """Of a frozen model whose inputs want gradients: forward and backward of all products, attention's and others."""
    model = tiny(name)
    model.config._attn_implementation = "eager"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedded = torch.randn(1, LENGTH, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    skeleton, batch = surgery.skeleton(model), build(rows(LENGTH))
    d = skeleton.dimensions
    # torch computes all pairs, also those that the mask hides, and a head at every token
    hidden_pairs = 12 * d.layers * d.heads * d.head_dim * (LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2)
    last_token = 4 * d.hidden * d.vocabulary
    assert counter.get_total_flops() == flops(skeleton, batch) + hidden_pairs + last_token


def test_what_is_shared_is_counted_once() -> None:
    skeleton = surgery.skeleton(tiny("llama"))
    twice = build(rows(LENGTH, LENGTH))
    alone, other = (flops(skeleton, build(rows(LENGTH, start=start))) for start in (3, 40))
    assert alone == other
    apart = flops(skeleton, build(rows(LENGTH, LENGTH), share="none"))
    assert apart == alone + other
    head = 4 * skeleton.dimensions.hidden * skeleton.dimensions.vocabulary * (LENGTH - 1)
    assert flops(skeleton, twice) == alone + head


def test_the_rate_is_a_rate() -> None:
    assert gemm_rate(surgery.skeleton(tiny("llama")), 64, torch.float32, "cpu") > 1e6


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_workloads_are_recipes(workload: Workload) -> None:
    loaded = recipe.load(workload.recipe, workload.overrides(5, "cpu"))
    assert (loaded.train.max_steps, loaded.train.device, loaded.data.validation) == (5, "cpu", None)
    assert workload.pairs == (loaded.train.batch_size if loaded.objective.name == "dpo" else None)
    assert loaded.data.limit == (2 * loaded.train.batch_size if workload.again else None)  # an epoch of 5 // 2 steps
