"""DoRA's own: the formula written out, the norm as a constant, counts by hand, the `peft` package as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftctl import methods
from peftctl.errors import TargetError
from peftctl.methods.dora import METHOD, DoraConfig
from peftctl.surgery import find, out_in, skeleton
from tests.methods import contract, exchange
from tests.models import tiny


def dora(**keys: Any) -> DoraConfig:
    return DoraConfig(name="dora", **({"rank": 4} | keys))


VARIANTS = [
    ("llama", dora(target_modules=["q_proj", "v_proj"], alpha=12.0)),
    ("llama", dora(rank_stabilized=True, alpha=3.0, layers=[1])),
    ("llama", dora(dropout=0.3)),
    ("gpt2", dora()),
    ("opt", dora(target_modules=r".*\.fc[12]")),
]


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_variants_keep_the_contract(name: str, config: DoraConfig, check: Any) -> None:
    check(config, name)


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_the_papers_formula_written_out(name: str, path: str) -> None:
    model, attachment = contract.attached(dora(), name)
    contract.disturb(attachment)
    module, delta = find(model, path), dict(attachment.named_deltas())[path]
    weight = out_in(module, module.weight).detach()
    moved = weight + 2.0 * delta.b.detach() @ delta.a.detach()
    directed = delta.magnitude.detach()[:, None] * moved / torch.linalg.norm(moved, dim=1, keepdim=True)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ directed.T + (0 if module.bias is None else module.bias)
    with torch.no_grad():
        torch.testing.assert_close(module(x[None])[0], expected, rtol=1e-5, atol=1e-5)


def test_the_norm_is_a_constant_to_the_gradient() -> None:
    """Section 4.3: d y / d (W + s B A) is m / ||W + s B A||, nothing through the norm."""
    model, attachment = contract.attached(dora(), "llama")
    contract.disturb(attachment)
    path = "model.layers.0.self_attn.q_proj"
    module, delta = find(model, path), dict(attachment.named_deltas())[path]
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    grad_b, grad_m = torch.autograd.grad(module(x).sum(), [delta.b, delta.magnitude])
    with torch.no_grad():
        moved = module.weight + 2.0 * delta.b @ delta.a
        norm = torch.linalg.norm(moved, dim=1)
        inner = (x[0] @ delta.a.T).sum(0)
        torch.testing.assert_close(grad_b, 2.0 * (delta.magnitude / norm)[:, None] * inner)
        torch.testing.assert_close(grad_m, (x[0] @ moved.T).sum(0) / norm)


def test_the_magnitude_starts_as_the_norms_of_the_rows() -> None:
    for name in ("llama", "gpt2"):
        model, attachment = contract.attached(dora(), name)
        for path, delta in attachment.named_deltas():
            module = find(model, path)
            torch.testing.assert_close(delta.magnitude.detach(), out_in(module, module.weight).norm(dim=1))


def test_a_bf16_base_starts_as_it_is_and_trains_in_fp32() -> None:
    model = tiny("llama").bfloat16()
    attachment = METHOD.attach(model, dora()).eval()
    attachment.install(model)
    assert all(t.dtype == torch.float32 for t in attachment.tensors().values())
    changed = contract.answer(model, attachment)
    assert changed.dtype == torch.bfloat16
    with attachment.disabled():
        assert torch.equal(contract.answer(model, attachment), changed)


def test_a_magnitude_counts_over_a_bf16_base() -> None:
    """1.0035 is 1 in bfloat16; what it adds to an output is not nothing there."""
    _, attachment = contract.attached(dora(target_modules=["q_proj"], layers=[0]), "llama")
    (delta,) = attachment.deltas
    y = (1 + torch.rand(5, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.no_grad():
        delta.magnitude.mul_(1.0035)
        assert delta(torch.zeros(5, 32).bfloat16(), y).ne(y).any()


def test_counts_by_hand() -> None:
    table = skeleton(tiny("llama"))
    assert METHOD.count(table, dora(target_modules=["q_proj"])).total == 2 * (4 * (32 + 32) + 32)
    assert METHOD.count(table, dora(target_modules=["k_proj"], layers=[0])).total == 4 * (32 + 16) + 16


def test_refuses_embeddings_and_ranks_above_the_matrix() -> None:
    with pytest.raises(TargetError, match="Embedding, which this method cannot adapt"):
        METHOD.count(skeleton(tiny("llama")), dora(target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="17 is above 16"):
        METHOD.count(skeleton(tiny("llama")), dora(rank=17))


def test_it_holds_no_part_of_the_base() -> None:
    model, attachment = contract.attached(dora(), "llama")
    base = {id(p) for p in model.parameters()}
    assert not base & {id(t) for t in (*attachment.parameters(), *attachment.buffers())}


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_peft_computes_the_same_from_our_files(name: str, config: DoraConfig, tmp_path: Path) -> None:
    _, expected = exchange.written(tmp_path, config, name)
    torch.testing.assert_close(exchange.theirs(tmp_path, name), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(exchange.ours(tmp_path, "dora", name), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_pefts_files_compute_the_same_here(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, **keys)
    expected = exchange.saved_by_peft(tmp_path, config, name)
    torch.testing.assert_close(exchange.ours(tmp_path, "dora", name), expected, rtol=1e-5, atol=2e-5)


def test_one_of_the_methods_that_share_a_type_claims_a_file() -> None:
    for keys in ({"use_dora": True}, {"use_dora": False}, {}):
        exchanges = [(n, e()) for n in methods.names() if (e := methods.get(n).exchange) is not None]
        claiming = [n for n, e in exchanges if e.peft_type == "LORA" and e.claims(keys)]
        assert len(claiming) == 1 and (claiming == ["dora"]) == bool(keys.get("use_dora"))
