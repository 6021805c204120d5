"""LoRA's relatives: starts, patterns, frozen A, B's own rate, biases, parts of fused weights; as their papers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import TargetError
from peftctl.kernels.linear import Product
from peftctl.methods.lora import METHOD, LoraConfig
from peftctl.methods.lora.peft import EXCHANGE
from peftctl.surgery import find, out_in, skeleton
from tests.methods import contract
from tests.models import tiny


def lora(**keys: Any) -> LoraConfig:
    return LoraConfig(name="lora", **({"rank": 4} | keys))


def deltas(config: LoraConfig, name: str) -> tuple[Any, dict[str, Any]]:
    model, attachment = contract.attached(config, name)
    return model, dict(attachment.named_deltas())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_starts_at_the_largest_singular_values(name: str) -> None:
    model, found = deltas(lora(init="pissa", alpha=3.0), name)
    for path, delta in found.items():
        weight = out_in(find(model, path), find(model, path).weight).detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :4] * values[:4]) @ right[:4]
        ours = 0.75 * delta.b.detach() @ delta.a.detach()
        rest = float((weight - best).norm())
        assert float((weight - ours).norm()) <= 1.001 * rest
        # the values are shared out over both factors
        torch.testing.assert_close(delta.a.detach().norm(dim=1), delta.b.detach().norm(dim=0), rtol=1e-4, atol=1e-4)


def test_the_orthogonal_start_is_the_first_part_of_q_and_r() -> None:
    model, found = deltas(lora(init="orthogonal"), "llama")
    for path, delta in found.items():
        weight, a, b = find(model, path).weight.detach(), delta.a.detach(), delta.b.detach()
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, b.T @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_what_it_started_from_is_frozen_saved_and_stored_as_plain(init: str) -> None:
    model, attachment = contract.attached(lora(init=init, target_modules=["q_proj"]), "llama")
    names = {name.rpartition(".")[2] for name in attachment.tensors()}
    assert names == {"a", "b", "a0", "b0"} and {n.rpartition(".")[2] for n in attachment.trainable()} == {"a", "b"}
    contract.disturb(attachment)
    keys, tensors = EXCHANGE.write(lora(init=init, target_modules=["q_proj"]), skeleton(model), attachment.tensors())
    assert (keys["r"], keys["lora_alpha"], keys["init_lora_weights"]) == (8, 16, True)
    assert {tuple(t.shape) for t in tensors.values()} == {(8, 32), (32, 8)}


def test_a_start_that_is_taken_away_costs_no_precision() -> None:
    """In bfloat16 the change is as exact as the small numbers that were learnt, not as the large ones it began with."""
    config = lora(init="pissa", target_modules=["down_proj"])
    _, attachment = contract.attached(config, "llama")
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=1e-4)
    x, zero = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 32)
    for delta in attachment.deltas:
        exact, rounded = delta(x, zero).detach(), delta(x.bfloat16(), zero.bfloat16()).detach()
        assert float((rounded.float() - exact).norm()) < 0.02 * float(exact.norm())


def test_the_scale_survives_a_larger_rank() -> None:
    for stabilized in (False, True):
        config = lora(init="pissa", rank_stabilized=stabilized, alpha=5.0, rank_pattern={"q_proj": 2})
        _, attachment = contract.attached(config, "llama")
        keys, tensors = EXCHANGE.write(config, skeleton(tiny("llama")), attachment.tensors())
        found, _ = EXCHANGE.read(keys, skeleton(tiny("llama")), tensors)
        _, again = contract.attached(LoraConfig(**found), "llama")
        scales = {path: delta.scale for path, delta in attachment.named_deltas()}
        assert {path: pytest.approx(delta.scale) for path, delta in again.named_deltas()} == scales
        assert len(set(scales.values())) == 2


def test_patterns_choose_rank_and_alpha() -> None:
    config = lora(rank_pattern={r"layers\.1\..*": 2, "q_proj": 8}, alpha_pattern={"v_proj": 1.0}, alpha=None)
    _, found = deltas(config, "llama")
    sizes = {path.removeprefix("model.layers."): (len(d.a), d.scale) for path, d in found.items()}
    assert sizes["0.self_attn.q_proj"] == (8, 2.0) and sizes["1.self_attn.q_proj"] == (2, 2.0)  # the first one counts
    assert sizes["0.self_attn.v_proj"] == (4, 0.25) and sizes["1.self_attn.v_proj"] == (2, 0.5)
    assert sizes["0.mlp.up_proj"] == (4, 2.0)


def test_plain_files_say_nothing_of_patterns() -> None:
    for keys in ({}, {"rank_pattern": {"q_proj": 8}}):
        config = lora(**keys)
        _, attachment = contract.attached(config, "llama")
        written, _ = EXCHANGE.write(config, skeleton(tiny("llama")), attachment.tensors())
        assert written.get("rank_pattern") == ({"q_proj": 8} if keys else None)
        assert written.get("alpha_pattern") == ({"q_proj": 16} if keys else None)


def test_lora_fa_trains_b_alone_and_saves_both() -> None:
    config = lora(train_a=False, target_modules=["q_proj"])
    _, attachment = contract.attached(config, "llama")
    assert METHOD.count(skeleton(tiny("llama")), config).total == 2 * 4 * 32
    assert len(attachment.tensors()) == 4 and all(name.endswith(".b") for name in attachment.trainable())


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    config = lora(lr_ratio=16.0, target_modules=["embed_tokens", "q_proj"])
    _, attachment = contract.attached(config, "llama")
    groups = attachment.groups()
    assert set(groups.values()) == {16.0} and set(groups) <= set(attachment.trainable())
    assert sorted(groups) == [f"model.layers.{i}.self_attn.q_proj.b" for i in (0, 1)]
    parts = contract.attached(lora(lr_ratio=2.0, target_modules=["c_attn.q"], bias="all"), "gpt2")[1]
    assert sorted(parts.groups()) == [f"transformer.h.{i}.attn.c_attn.q.b" for i in (0, 1)]
    assert contract.attached(lora(), "llama")[1].groups() == {}


def test_biases_are_counted_and_stored_whole() -> None:
    table = skeleton(tiny("gpt2"))
    product, layer = 2 * 4 * (32 + 96), 11 * 32
    chosen, every = (lora(target_modules=["c_attn"], bias=which) for which in ("lora_only", "all"))
    assert METHOD.count(table, chosen).total == product + 2 * 96
    assert METHOD.count(table, every).total == product + 2 * layer + 32
    model, attachment = contract.attached(every, "gpt2")
    contract.disturb(attachment)
    keys, tensors = EXCHANGE.write(every, table, attachment.tensors())
    assert keys["bias"] == "all"
    norm, inside = "transformer.ln_f.bias", "transformer.h.0.attn.c_attn.base_layer.bias"
    assert {f"base_model.model.{norm}", f"base_model.model.{inside}"} <= set(tensors)
    moved = tensors[f"base_model.model.{norm}"] - model.get_parameter(norm)
    assert 0.01 < float(moved.detach().abs().max()) < 1  # the absolute value, near the base's


def test_only_a_part_of_the_output_changes() -> None:
    model, attachment = contract.attached(lora(target_modules=["query_key_value.v"], layers=[0]), "gpt_neox")
    contract.disturb(attachment)
    module = find(model, "gpt_neox.layers.0.attention.query_key_value")
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = module(x)
        with attachment.disabled():
            moved = (module(x) != changed).any(dim=1)[0]
    per_head = moved.view(4, 3, 8)
    assert per_head[:, 2].all() and not per_head[:, :2].any()


@pytest.mark.parametrize("targets", [["c_attn.q"], ["c_attn.q", "c_attn.v"]])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_product_is_what_the_forward_adds(init: str, targets: list[str]) -> None:
    _, attachment = contract.attached(lora(init=init, target_modules=targets), "gpt2")
    contract.disturb(attachment)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for _, delta in attachment.named_deltas():
        product = delta.product()
        assert isinstance(product, Product) and len(product.a) == 4 * len(targets) * (2 if init == "pissa" else 1)
        y = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(delta(x, y), y + product.scale * x @ product.a.T @ product.b.T)


def test_counts_of_parts_by_hand() -> None:
    counted = METHOD.count(skeleton(tiny("falcon")), lora(target_modules=["query_key_value.q", "query_key_value.k"]))
    assert set(counted.places.values()) == {4 * (32 + 32), 4 * (32 + 16)} and len(counted.places) == 4
    assert counted.summary == "2 modules in 2 of 2 layers: query_key_value.q, query_key_value.k"
    # the paper's query and value of GPT-2: 4 r d a layer
    both = METHOD.count(skeleton(tiny("gpt2")), lora(target_modules=["c_attn.q", "c_attn.v"]))
    assert both.total == 2 * 4 * 4 * 32


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("llama", {"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' matches none.*did you mean q_proj"),
        ("llama", {"alpha_pattern": {"(": 2.0}}, "alpha_pattern: '\\(' is not a regular expression"),
        ("llama", {"rank_pattern": {"v_proj": 17}}, "rank_pattern: 17 is above 16, the smaller side"),
        ("llama", {"init": "pissa", "rank": 9}, "9 is above 8, as .*k_proj is to hold 2 such products; use at most 8"),
        ("gpt2", {"target_modules": ["c_attn", "c_attn.q"]}, "c_attn is named whole and in part"),
        ("gpt2", {"target_modules": ["c_attn.q", "c_attn.k"], "rank": 17}, "above 16, as .* hold 2 such products"),
        ("falcon", {"target_modules": ["query_key_value.k"], "rank": 17}, "above 16, the smaller side .* its part"),
        ("gpt2", {"target_modules": ["c_fc.q"]}, "GPT2MLP is not known"),
        ("llama", {"bias": "all"}, "there is no bias in LlamaForCausalLM"),
        ("llama", {"bias": "lora_only"}, "there is no bias in the chosen modules of LlamaForCausalLM"),
        ("llama", {"init": "pissa", "target_modules": ["embed_tokens"]}, "init: pissa is for linears"),
        ("llama", {"train_a": False, "target_modules": ["embed_tokens"]}, "train_a: false is for linears"),
    ],
)
def test_refuses_with_a_reason(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), lora(**keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"init": "pissa", "init_from": "runs/before"},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": 0.0}},
        {"lr_ratio": 0.0},
        {"bias": "some"},
    ],
)
def test_refuses_impossible_values(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        lora(**keys)
