"""LoRA on the experts of mixture-of-experts models: one product an expert, however the experts are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peftctl import methods
from peftctl import model as bases
from peftctl.base import resolve
from peftctl.counting import count
from peftctl.errors import FormatError, TargetError
from peftctl.kernels.sums import Sum
from peftctl.layout import choose
from peftctl.methods.attachment import Attachment
from peftctl.policy import Layout, Policy
from peftctl.surgery import skeleton
from tests import models
from tests.methods import contract, exchange
from tests.models import inputs, tiny

BASES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last one stores its matrices the other way round
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = ("eager", "grouped_mm", "batched_mm")
GPT_OSS = models._GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def with_transposed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models._MODELS, "gpt_oss", ("GptOssConfig", "GptOssForCausalLM", GPT_OSS))


def config(targets: list[str] | str = BOTH, **keys: Any) -> Any:
    return contract.config("lora", **{"rank": 2, "target_modules": targets} | keys)


def expected(model: Any, attachment: Attachment, weights: dict[str, Tensor]) -> Tensor:
    """The logits with W + s B A in every changed parameter's place, added up by hand."""
    found = dict(model.named_parameters())
    for path, (a, b, scale) in weights.items():
        change = torch.einsum("eor,eri->eoi", b, a) * scale
        found[path] = found[path] + (change if change.shape == found[path].shape else change.mT)
    with attachment.disabled():
        return functional_call(model, found, (), inputs(model)).logits


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", BASES)
def test_keeps_the_contract(name: str, check: Callable[..., None]) -> None:
    check(config([*BOTH, "q_proj"]), name)


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
@pytest.mark.parametrize("name", BASES[1:])
def test_starts_at_parts_of_each_experts_weight_and_as_the_base(name: str, init: str) -> None:
    for check in contract.CORE:
        check(config(init=init), name)
    _, attachment = contract.attached(config(init=init), name)
    for key, tensor in attachment.tensors().items():
        if key.endswith(".a"):
            assert len({tuple(expert.flatten().tolist()) for expert in tensor}) == 4


@pytest.mark.parametrize("way", [*WAYS, "of its own"])
@pytest.mark.parametrize("name", BASES[:2])
def test_any_way_of_computing_experts_gives_the_same_and_the_same_gradients(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way that is not known gets the weight added up: a function of its own might lose the gradients of a sum."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            assert type(weight) is Tensor
            ctx.save_for_backward(x, weight)
            return torch.bmm(weight, x[..., None])[..., 0]

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return torch.bmm(slope[:, None], weight)[:, 0], slope[..., None] * x[:, None]

    def own(self: Any, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        picked = x.repeat_interleave(index.shape[1], dim=0)
        inner = self._apply_gate(Own.apply(picked, self.gate_up_proj[index.flatten()]))
        out = Own.apply(inner, self.down_proj[index.flatten()]) * shares.reshape(-1, 1)
        return out.view(*index.shape, -1).sum(1)

    ALL_EXPERTS_FUNCTIONS.register("of its own", own)
    model, attachment = contract.attached(config(), name)
    contract.disturb(attachment)
    tensors = attachment.trainable()
    weights = {
        path: (tensors[f"{path}.a"], tensors[f"{path}.b"], 2.0)
        for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    }
    right = expected(model, attachment, weights)
    slopes = torch.autograd.grad(right.square().sum(), list(tensors.values()))
    model.config._experts_implementation = way
    if way in WAYS:
        monkeypatch.delattr(Sum, "plain")  # nothing is added up
    logits = contract.forward(model, attachment)
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(logits.square().sum(), list(tensors.values()))
    for own_slope, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(own_slope, slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max()))


@pytest.mark.parametrize("layout", ["shared", "joined", "padded"])
@pytest.mark.parametrize("name", BASES[:2])
def test_rows_come_out_as_each_row_alone_in_every_layout(name: str, layout: str) -> None:
    from peftctl.batch import build
    from peftctl.layout import _rows

    model, attachment = contract.attached(config(), name)
    contract.disturb(attachment)
    assert choose(model, 2).name == "shared"
    rows, _ = _rows(model)
    with torch.no_grad():
        together = Policy(model, attachment, Layout(layout), None).row_hidden(build(rows))
        for row, hidden in zip(rows, together, strict=True):
            alone = model.base_model(input_ids=torch.tensor([row.ids]))[0][0]
            torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-4)


def test_the_count_is_exact_from_a_bare_config_and_all_linear_leaves_experts_out(tmp_path: Path) -> None:
    base = tiny("mixtral")
    (tmp_path / "mixtral.json").write_text(base.config.to_json_string(use_diff=False))
    bare = resolve(str(tmp_path / "mixtral.json"), need="config")
    # layers x experts x rank x (in + out), gate and up side by side
    found = count(bare, methods.get("lora"), config())
    assert found.adapter == 2 * 4 * 2 * ((32 + 2 * 64) + (64 + 32))
    assert found.places["model.layers.1.mlp.experts.down_proj"] == 4 * 2 * (64 + 32)
    assert found.summary == "4 modules in 2 of 2 layers: gate_up_proj, down_proj"
    linears = count(bare, methods.get("lora"), config("all-linear"))
    assert not any("experts" in place for place in linears.places)
    half = count(bare, methods.get("lora"), config(train_a=False, layers=[1]))
    assert half.adapter == 4 * 2 * (2 * 64 + 32)
    assert bases.skeleton(bare) == skeleton(base)


def test_a_name_means_experts_and_linears_of_that_name() -> None:
    table = skeleton(tiny("qwen3_moe"))  # whose first layer is dense
    found = methods.get("lora").count(table, config(["down_proj"])).places
    assert set(found) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.down_proj"}
    assert set(methods.get("lora").count(table, config(r".*experts\.\w+")).places) == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rank": 17}, r"method\.rank: 17 is above 16, the smaller side of model\.layers\.1\.mlp\.experts\.\w+;"),
        (
            {"rank": 9, "init": "pissa"},
            r"method\.rank: 9 is above 8, as model\.layers\.1\.mlp\.experts\.\w+ is to hold 2",
        ),
        ({"rank_pattern": {"gate_up_proj": 33}}, r"method\.rank_pattern: 33 is above 32"),
        ({"dropout": 0.1}, r"method\.dropout: 0\.1 has no place at model\.layers\.1\.mlp\.experts\.\w+.*; set it to 0"),
        (
            {"target_modules": ["gate_up_prj"]},
            r"'gate_up_prj' matches no module of Qwen3MoeForCausalLM; did you mean ga",
        ),
        ({"target_modules": ["experts"]}, r"'experts' is a Qwen3MoeExperts, which this method cannot adapt; it has"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(TargetError, match=reason) as caught:
        methods.get("lora").count(skeleton(tiny("qwen3_moe")), config(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in methods.names() if "target_modules" in methods.get(n).config.model_fields])
def test_other_methods_refuse_experts_by_name(name: str) -> None:
    block = contract.config(name, target_modules=["experts.gate_up_proj"])
    table = skeleton(tiny("mixtral"))
    if name == "lora":
        assert methods.get(name).count(table, block).total
        return
    with pytest.raises(
        TargetError, match=r"is a parameter of experts, which this method cannot adapt; it has"
    ) as caught:
        methods.get(name).count(table, block)
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, dict[str, Any]] = {
    "both": {},
    "one beside a linear": {"target_modules": ["experts.down_proj", "q_proj"]},
    "the other alone": {"target_modules": ["experts.gate_up_proj"]},
    "its own ranks": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"experts\.gate_up_proj": 5.0}},
    "rank stabilised": {"rank_stabilized": True},
    "a start taken away": {"init": "pissa"},
    "one layer": {"layers": [1]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", BASES)
def test_peft_computes_what_we_write_and_it_is_read_again(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    _, logits = exchange.written(tmp_path, config(**keys), name)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    torch.testing.assert_close(exchange.theirs(tmp_path, name), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exchange.ours(tmp_path, "lora", name), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["experts.down_proj"], ["experts.gate_up_proj"]])
@pytest.mark.parametrize("name", BASES)
def test_what_peft_writes_we_compute(name: str, targets: list[str], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"], target_parameters=targets)
    logits = exchange.saved_by_peft(tmp_path, theirs, name)
    assert float((logits - models.logits(tiny(name))).abs().max()) > 0.1
    torch.testing.assert_close(exchange.ours(tmp_path, "lora", name), logits, rtol=1e-4, atol=1e-4)


def test_the_form_on_disk_is_pefts(tmp_path: Path) -> None:
    exchange.written(tmp_path, config(rank=3), "qwen3_moe")
    at = "base_model.model.model.layers.1.mlp.experts"
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        f"{at}.base_layer.lora_A.weight": (4 * 3, 32),
        f"{at}.base_layer.lora_B.weight": (2 * 16, 3 * 4),
        f"{at}.lora_A.weight": (4 * 3, 16),
        f"{at}.lora_B.weight": (32, 3 * 4),
    }
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    assert keys["target_parameters"] == BOTH and keys["target_modules"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"target_parameters": ["mlp.gate.weight"]},
            r"target_parameters names model\.layers\.1\.mlp\.gate\.weight, and",
        ),
        ({"target_parameters": []}, r"belongs to model\.layers\.1\.mlp\.experts\.base_layer, which"),
        ({"lost": "base_layer.lora_A"}, r"layers\.1\.mlp\.experts\.base_layer\.lora_A\.weight is missing"),
        ({"cut": 7}, r"\(7, 32\) is not divided by its 4 experts"),
    ],
)
def test_a_file_that_peft_would_not_write_says_why(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    exchange.written(tmp_path, config(), "qwen3_moe")
    keys = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: t for name, t in tensors.items() if change.get("lost", "none") not in name}
    if "cut" in change:
        tensors = {n: t[:7].clone() if n.endswith("base_layer.lora_A.weight") else t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
    with pytest.raises(FormatError, match=reason):
        exchange.read(tmp_path, "lora", "qwen3_moe")
