"""Compacter's own: its weights written out with torch.kron, counts by the formula, one rule for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from peftctl.errors import TargetError
from peftctl.methods.compacter import METHOD, CompacterConfig
from peftctl.methods.compacter.delta import Products, Rule
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import tiny


def compacter(**keys: Any) -> CompacterConfig:
    return CompacterConfig(name="compacter", **keys)


VARIANTS = {
    "compacter": compacter(preset="compacter"),
    "wider": compacter(phm_dim=2, rank=2, width=6),
    "one": compacter(phm_dim=1, width=3),
}


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_variants_keep_the_contract(name: str, variant: str, check: Any) -> None:
    check(VARIANTS[variant], name)


def test_counts_by_the_papers_formula() -> None:
    """n^3 once; in each place both weights' factors, r (k + d) each, and both biases."""
    hidden, layers = 32, 2
    for each, config, n, rank, width in (
        (1, compacter(), 4, 1, 4),
        (2, compacter(preset="compacter", reduction_factor=4.0), 4, 1, 8),
        (1, compacter(phm_dim=2, rank=3, width=6), 2, 3, 6),
    ):
        counted = METHOD.count(skeleton(tiny("llama")), config)
        assert counted.total == n**3 + each * layers * (2 * rank * (hidden + width) + width + hidden)
        assert counted.places["rule"] == n**3


def test_the_width_is_a_multiple_of_the_products_side() -> None:
    assert compacter().width_in(576) == 16  # 18 of the reduction alone
    assert compacter().width_in(32) == 4
    assert compacter(width=12).width_in(576) == 12


def by_kron(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The weight, (into, out)."""
    return sum((torch.kron(rule[i], s[i] @ t[i]) for i in range(len(rule))), torch.tensor(0.0))


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3])
def test_the_weight_is_a_sum_of_kronecker_products(rank: int) -> None:
    rule, h = torch.randn(4, 4, 4), torch.randn(2, 5, 32)
    products = Products(32, 8, 4, rank, zero=False)
    products.bias.normal_()
    expected = h @ by_kron(rule, products.s, products.t) + products.bias
    torch.testing.assert_close(products(h, rule), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_block_written_out_with_the_one_rule() -> None:
    model, attachment = contract.attached(compacter(), "llama")
    contract.disturb(attachment)
    tensors = attachment.tensors()
    assert [name for name in tensors if "rule" in name] == ["rule"]
    other = tiny("llama")
    for index, block in enumerate(other.model.layers):
        t = {key: tensors[f"model.layers.{index}.{key}"] for key in ("down.s", "down.t", "up.s", "up.t")}
        biases = tensors[f"model.layers.{index}.down.bias"], tensors[f"model.layers.{index}.up.bias"]
        down = by_kron(tensors["rule"], t["down.s"], t["down.t"])
        up = by_kron(tensors["rule"], t["up.s"], t["up.t"])
        block.register_forward_hook(
            lambda m, args, y, down=down, up=up, b=biases: y + torch.nn.functional.gelu(y @ down + b[0]) @ up + b[1]
        )
    expected = contract.answer(other, contract.Attachment())
    torch.testing.assert_close(contract.answer(model, attachment), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_starts_with_weights_of_glorots_variance() -> None:
    torch.manual_seed(0)
    drawn = [(Rule(8).rule, Products(32, 16, 8, 4, zero=False)) for _ in range(40)]
    made = torch.stack([by_kron(rule, products.s, products.t) for rule, products in drawn])
    assert float(made.var()) == pytest.approx(2 / (32 + 16), rel=0.1)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("mixtral", {"preset": "compacter"}, "MixtralForCausalLM has no place for it"),
        ("llama", {"phm_dim": 5}, "method.phm_dim: 5 does not divide 32, the hidden width of LlamaForCausalLM"),
    ],
)
def test_refuses_by_name(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), compacter(**keys))


def test_refuses_a_width_that_cannot_be_divided() -> None:
    with pytest.raises(ValidationError, match="width 6 is no multiple of phm_dim, 4"):
        compacter(width=6)
