"""The fast kernels under a model: the same answers and gradients as the plain one, and nothing left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl import methods
from peftctl.adapter import attach
from peftctl.batch import build
from peftctl.fuse import fuse
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.policy import Policy, checkpointed
from peftctl.row import Row
from peftctl.skeleton import LINEAR
from peftctl.surgery import frozen, kind_of, skeleton
from tests.models import tiny

MODELS = ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma2", "mistral", "mixtral", "phi3", "bloom"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "bottleneck": {"reduction_factor": 4},
    "bitfit": {"add_missing": True},
    "compacter": {},
    "ia3": {},
    "ln-tuning": {},
    "full": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "dora": {"rank": 4},
    "vera": {"rank": 24},
    "adalora": {"rank": 3},
}


def policy(name: str, method: str = "lora", **keys: Any) -> Policy:
    model = frozen(tiny(name))
    found = methods.get(method)
    attachment = attach(model, found, found.config(name=method, **(METHODS[method] | keys)), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy_of(model, attachment, skeleton(model).dimensions.layers)


def batch() -> Any:
    start = (5, 6, 7, 8)
    ids = [(*start, 9, 10, 11), (*start, 12, 13), tuple(range(20, 32))]
    return build([Row(i, (0.0,) * 2 + (1.0,) * (len(i) - 2)) for i in ids])


def answers(found: Policy) -> tuple[Tensor, list[Tensor]]:
    logprob = found.tokens(batch()).logprob
    parameters = list(found.attachment.trainable().values())
    return logprob.detach(), list(torch.autograd.grad(logprob.sum(), parameters))


def near(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_answers_and_gradients_are_the_plain_ones(name: str, pack: bool) -> None:
    found = policy(name)
    logprob, gradients = answers(found)
    found.fuse(pack=pack)
    fused = answers(found)
    assert near(fused[0], logprob) and all(near(a, b) for a, b in zip(fused[1], gradients, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_delta_goes_on(method: str) -> None:
    found = policy("llama", method)
    logprob, gradients = answers(found)
    found.fuse(pack=True)
    fused = answers(found)
    assert near(fused[0], logprob) and all(near(a, b) for a, b in zip(fused[1], gradients, strict=True))


@pytest.mark.parametrize("method", ["ln-tuning", "full"])
def test_modules_with_other_parameters_keep_their_own_forward(method: str) -> None:
    found = policy("llama", method)
    found.fuse(pack=False)
    places = [found.model.get_submodule(path) for path in found.attachment.paths]
    assert places and not [m for m in places if "forward" in vars(m)]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"init": "pissa"}),
        ("llama", {"init": "orthogonal", "train_a": False, "rank_pattern": {"q_proj": 3}}),
        ("gpt2", {"target_modules": ["c_attn.q", "c_attn.v"], "init": "pissa"}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("gpt_neox", {"target_modules": ["query_key_value.v"]}),
        ("phi3", {"target_modules": ["qkv_proj.q", "qkv_proj.v", "o_proj"]}),
    ],
)
def test_what_is_not_one_product_of_two_parameters_goes_on(name: str, keys: dict[str, Any]) -> None:
    found = policy(name, **keys)
    logprob, gradients = answers(found)
    found.fuse(pack=True)
    fused = answers(found)
    assert near(fused[0], logprob) and all(near(a, b) for a, b in zip(fused[1], gradients, strict=True))


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_start_that_is_taken_away_leaves_the_base_under_the_fused_kernels_too(init: str) -> None:
    model = frozen(tiny("llama"))
    found = methods.get("lora")
    attachment = attach(model, found, found.config(name="lora", rank=4, init=init), 0)
    made = policy_of(model, attachment, 2)
    made.fuse(pack=True)
    with attachment.disabled():
        base = made.tokens(batch()).logprob
    assert torch.equal(made.tokens(batch()).logprob, base)


def test_a_bias_beside_a_product_goes_on_by_its_hook() -> None:
    found = policy("opt", bias="lora_only")
    logprob, gradients = answers(found)
    found.fuse(pack=False)
    assert len(found.attachment._handles) == len(found.attachment.paths) // 2
    fused = answers(found)
    assert near(fused[0], logprob) and all(near(a, b) for a, b in zip(fused[1], gradients, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_off_is_the_base_under_the_same_kernels_and_removal_leaves_nothing(name: str) -> None:
    bare = policy_of(frozen(tiny(name)), None, skeleton(tiny(name)).dimensions.layers)
    plain = bare.tokens(batch()).logprob
    bare.fuse(pack=True)
    found = policy(name)
    found.fuse(pack=True)
    keys, modules = list(found.model.state_dict()), dict(found.model.named_modules())
    with found.attachment.disabled():
        assert torch.equal(found.tokens(batch()).logprob, bare.tokens(batch()).logprob)
    found.attachment.remove()
    assert list(found.model.state_dict()) == keys and dict(found.model.named_modules()) == modules
    assert not [m for m in found.model.modules() if "forward" in vars(m)]
    found = Policy(found.model, Attachment(), found.layout, found.head)
    found.head.frozen = found.head.multiplied_by(pack=False)  # type: ignore[union-attr]
    assert torch.equal(found.tokens(batch()).logprob, plain)


def test_what_shares_an_input_is_computed_together() -> None:
    found = policy("llama")
    found.fuse(pack=False)
    owners: dict[int, list[str]] = {}
    for path, module in found.model.named_modules():
        if kind_of(module) in LINEAR and "forward" in vars(module):
            siblings = vars(module)["forward"].__closure__
            owner = next(c.cell_contents for c in siblings if type(c.cell_contents).__name__ == "Siblings")
            owners.setdefault(id(owner), []).append(path.split(".")[-1])
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(owners.values()) == layer * 2


@pytest.mark.parametrize(
    ("name", "mlps", "norms"), [("llama", 2, 5), ("gpt2", 0, 0), ("qwen3", 2, 9), ("gemma2", 2, 0)]
)
def test_what_an_mlp_and_a_norm_are_made_of_is_seen(name: str, mlps: int, norms: int) -> None:
    found = policy(name)
    found.fuse(pack=False)
    replaced = [m for m in found.model.modules() if "forward" in vars(m)]
    assert sum(type(m).__name__.endswith("MLP") for m in replaced) == mlps
    assert sum(kind_of(m) == "Norm" for m in replaced) == norms


def test_an_mlp_whose_linears_are_watched_calls_them() -> None:
    found = policy("llama", "bitfit")
    found.fuse(pack=False)
    assert not [m for m in found.model.modules() if type(m).__name__ == "LlamaMLP" and "forward" in vars(m)]


def test_an_input_that_was_written_to_is_another_one() -> None:
    found = policy("llama")
    found.fuse(pack=False)
    first, second = (found.model.get_submodule(f"model.layers.0.self_attn.{n}") for n in ("q_proj", "k_proj"))
    x = torch.randn(1, 3, first.in_features)
    with torch.no_grad():
        first(x)
        x.mul_(2)
        expected = second(x.clone())
        first(x.div_(2))
        assert torch.equal(second(x.mul_(2)), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_nothing_flows_back_below_the_lowest_delta(name: str) -> None:
    found = policy(name, layers=[1])
    found.fuse(pack=False)
    seen: dict[str, bool] = {}
    for path, module in found.model.named_modules():
        if path.split(".")[-1].isdigit():
            module.register_forward_hook(
                lambda m, args, out, path=path: seen.update(
                    {path: (out[0] if isinstance(out, tuple) else out).requires_grad}
                )
            )
    answers(found)
    assert list(seen.values()) == [False, True]


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = policy("llama", dropout=0.3)
    found.fuse(pack=False)
    found.train()
    torch.manual_seed(1)
    kept = answers(found)
    checkpointed(found.model)
    torch.manual_seed(1)
    again = answers(found)
    assert torch.equal(kept[0], again[0]) and all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_linears_that_are_trained_or_not_reached_stay_as_they_are() -> None:
    model = frozen(tiny("llama"))
    model.model.spare = torch.nn.Linear(2, 2)
    trained = model.model.layers[0].self_attn.q_proj
    trained.weight.requires_grad_()
    fuse(model, Attachment(), pack=False)
    assert "forward" not in vars(trained) and "forward" in vars(model.model.layers[0].self_attn.k_proj)
    assert "forward" not in vars(model.model.spare) and "forward" not in vars(model.lm_head)
