"""Where methods sit in an encoder-decoder: in both stacks, and in the decoder's attention to the encoder."""

from __future__ import annotations

import pytest

from peftctl import methods
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import tiny

# of 2 encoder and 3 decoder layers: self-attention in 5, cross-attention in 3, an MLP in 5
HIDDEN, MIDDLE, WIDTH = 32, 64, 8
BOTTLENECK = 2 * HIDDEN * WIDTH + WIDTH + HIDDEN


@pytest.mark.parametrize(
    ("method", "keys", "expected"),
    [
        ("lora", {"rank": 2}, 2 * ((5 + 3) * 4 * 2 * HIDDEN + 5 * 2 * (HIDDEN + MIDDLE))),
        ("ia3", {}, (5 + 3) * 2 * HIDDEN + 5 * MIDDLE),
        ("bottleneck", {"preset": "houlsby", "width": WIDTH}, (5 + 3 + 5) * BOTTLENECK),
        ("bottleneck", {"preset": "pfeiffer", "width": WIDTH}, 5 * BOTTLENECK),
        ("bottleneck", {"preset": "parallel", "width": WIDTH}, 5 * BOTTLENECK),
        ("bitfit", {"biases": "query+mlp", "add_missing": True}, (5 + 3) * HIDDEN + 5 * MIDDLE),
        ("prefix", {"num_virtual_tokens": 3}, 3 * 2 * (5 + 3) * HIDDEN),
    ],
)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_counts_both_stacks_and_cross_attention(name: str, method: str, keys: dict, expected: int) -> None:
    config = contract.config(method, **keys)
    counted = methods.get(method).count(skeleton(tiny(name)), config)
    assert counted.total == expected
    assert ("in 8 of 8 attentions" if method == "prefix" else "in 5 of 5 layers") in counted.summary
    for check in (contract.keeps_shapes_and_counts, contract.trains_exactly_its_own, contract.leaves_no_trace):
        check(config, name)


@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_bottlenecks_of_every_preset_keep_the_contract(name: str, preset: str) -> None:
    for check in contract.CORE:
        check(contract.config("bottleneck", preset=preset), name)


def test_a_layers_number_means_that_layer_of_either_stack() -> None:
    table = skeleton(tiny("t5"))
    counted = methods.get("lora").count(table, contract.config("lora", layers=[1, 2], target_modules=["k"]))
    assert [path.split(".")[:3] for path in counted.places] == [
        ["encoder", "block", "1"],
        *(["decoder", "block", "1"],) * 2,
        *(["decoder", "block", "2"],) * 2,
    ]
    assert counted.summary == "5 modules in 3 of 5 layers: k"
