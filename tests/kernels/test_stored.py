"""Weights stored in bfloat16 and multiplied in float32, against the same numbers stored in float32."""

from collections.abc import Callable
from itertools import product as pairs

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.errors import PeftctlError
from peftctl.generation import generate
from peftctl.kernels import scratch, stored
from peftctl.kernels.stored import StoredWeight, computed_type, multiply_in, stored_type
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.policy import checkpointed
from peftctl.surgery import frozen, skeleton
from tests import test_fuse as fused
from tests.models import NAMES, inputs, tiny


def rounded(name: str) -> nn.Module:
    """A tiny model in float32 whose weights bfloat16 can hold."""
    model = frozen(tiny(name))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def narrow(name: str) -> nn.Module:
    """The same, stored in bfloat16 and computed in float32."""
    model = frozen(tiny(name))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return multiply_in(model, torch.float32)


def both(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[Tensor]]]:
    """The log-probabilities and the adapter's gradients of the narrow and of the wide model, by hooks and fused."""
    answers = []
    for build, fuse in pairs((narrow, rounded), (False, True)):
        monkeypatch.setattr(fused, "tiny", build)
        policy = fused.policy(name, method)
        if fuse:
            policy.fuse(pack=False)
        answers.append(fused.answers(policy))
    return answers


@pytest.mark.parametrize("method", fused.METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_every_method_computes_as_over_float32(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        answers = both(name, method, monkeypatch)
    except PeftctlError as refusal:
        pytest.skip(str(refusal))
    for ours, theirs in zip(answers[:2], answers[2:], strict=True):
        loss, expected = ours[0].mean(), theirs[0].mean()
        assert abs(loss - expected) <= 1e-6 * abs(expected)
        for gradient, other in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_computes_as_in_float32_and_keeps_two_bytes_a_weight(name: str) -> None:
    model, wide = narrow(name), rounded(name)
    with torch.no_grad():
        ours, theirs = model(**inputs(model)).logits, wide(**inputs(wide)).logits
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (stored_type(model), computed_type(model)) == (torch.bfloat16, torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert matrices and all(isinstance(p, StoredWeight) and p.stored.dtype is torch.bfloat16 for p in matrices)
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_input_embeddings().weight]
    same = [n for n, p in wide.named_parameters(remove_duplicate=False) if p is wide.get_input_embeddings().weight]
    assert tied == same


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "bloom"])
def test_it_generates_what_float32_generates(name: str) -> None:
    texts = []
    for model in (narrow(name), rounded(name)):
        policy = policy_of(model, Attachment(), skeleton(model).dimensions.layers)
        texts.append(generate(policy, [5, 6, 7, 8], max_new_tokens=12, end=[]))
    assert texts[0] == texts[1] and len(texts[0]) == 12


@pytest.mark.parametrize("block", [1 << 25, 300])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_wide_copies_change_no_bit_and_go_away(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK", block)
    model = narrow(name)
    widened: list[int] = []
    widen = scratch.Scratch.widen

    def counted(self: scratch.Scratch, inner: Tensor, dtype: torch.dtype) -> Tensor:
        wide = widen(self, inner, dtype)
        widened.append(wide.data_ptr() in {buffer.data_ptr() for buffer in self.buffers.values()})
        return wide

    monkeypatch.setattr(scratch.Scratch, "widen", counted)
    with torch.no_grad():
        expected = model(**inputs(model)).logits
        assert widened and all(widened)
        widened.clear()
        with stored.wide_copies(model) as served:
            assert served
            assert torch.equal(model(**inputs(model)).logits, expected)
        assert widened and not any(widened)  # no product took its matrix from the scratch
        widened.clear()
        assert torch.equal(model(**inputs(model)).logits, expected)
        assert all(widened)


def test_without_memory_for_copies_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = narrow("llama")
    size = sum(weight.numel() * 4 for weight in stored._multiplied(model))
    for free, served in ((2 * size, True), (2 * size - 2, False), (None, False)):
        monkeypatch.setattr(stored, "available_bytes", lambda free=free: free)
        with stored.wide_copies(model) as found:
            assert found is served
    with stored.wide_copies(rounded("llama")) as found:
        assert not found


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_no_wide_copy_waits_for_the_backward_pass(name: str, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tiny", narrow)
    policy = fused.policy(name)
    policy.train()
    if checkpoint:
        checkpointed(policy.model)
    shapes = {tuple(s) for p in policy.model.parameters() if p.ndim > 1 for s in (p.shape, p.mT.shape, p[0].shape)}
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, StoredWeight) and tensor.dtype is torch.float32 and not tensor.requires_grad:
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprob = policy.tokens(fused.batch()).logprob
    logprob.sum().backward()
    assert not {shape for shape in saved if len(shape) > 1} & {shape for shape in shapes if len(shape) > 1}


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x, w, torch.arange(12.0)),
    "matmul": lambda x, w: x @ w.T,
    "matmul of a batch": lambda x, w: x.expand(3, -1, -1) @ w.mT,
    "matmul from the left": lambda x, w: w @ x.T,
    "addmm": lambda x, w: torch.addmm(torch.arange(12.0), x, w.T),
    "embedding": lambda x, w: F.embedding(torch.tensor([3, 0, 11]), w) * x.sum(),
    "a row": lambda x, w: x @ w[4],
    "some rows": lambda x, w: F.linear(x, w[2:7]),
    "a product by elements": lambda x, w: (x[:1] * w).sum(1),
    "a convolution": lambda x, w: F.conv1d(x.T[None], w[:, :, None]),
    "a matrix each": lambda x, w: torch.bmm(x.expand(3, -1, -1), w.view(3, 4, 8).mT),
    "groups": lambda x, w: F.grouped_mm(
        x.repeat(2, 1), w.reshape(3, 4, 8).transpose(1, 2), offs=torch.tensor([2, 2, 10], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("block", [1 << 24, 20])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_gives_what_it_gives_of_the_widened_weight(
    operation: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 8, generator=generator).bfloat16()
    x = torch.randn(5, 8, generator=generator, requires_grad=True)
    found, gradients = [], []
    for weight in (StoredWeight(values, torch.float32), values.float()):
        out = OPERATIONS[operation](x, weight)
        found.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert type(found[0]) is Tensor and found[0].dtype is torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)


def test_a_weight_that_changed_is_widened_again() -> None:
    values, x = torch.ones(4, 4).bfloat16(), torch.eye(4)
    weight = StoredWeight(values, torch.float32)
    before = F.linear(x, weight)
    values.mul_(2)
    assert torch.equal(F.linear(x, weight), 2 * before)


def test_what_is_stored_wider_is_narrowed() -> None:
    model = multiply_in(rounded("llama"), torch.bfloat16)
    assert (stored_type(model), computed_type(model)) == (torch.bfloat16, torch.bfloat16)
    assert model(**inputs(model)).logits.dtype is torch.bfloat16
