"""Chunked log-probabilities against the plain formula, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from peftctl.kernels import token_stats as module
from peftctl.kernels.token_stats import token_stats


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, dtype=dtype)
    hidden = torch.randn(17, 8, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(0, 30, (17,)), head, torch.randn(17)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_formula(monkeypatch: pytest.MonkeyPatch, frozen: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "CHUNK", 30 * 5)  # several chunks, the last one short
    hidden, targets, head, upstream = problem(dtype)
    head.requires_grad_(not frozen)
    logprob, correct = token_stats(hidden, targets, head, 30, frozen)
    (logprob * upstream).sum().backward()
    logits = F.linear(hidden.detach().requires_grad_(), head.weight, head.bias)
    twin = hidden.detach().clone().requires_grad_()
    expected = F.linear(twin, head.weight, head.bias).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * upstream).sum().backward()
    exact = dtype is torch.float32
    torch.testing.assert_close(logprob, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-5 if exact else 3e-2, atol=1e-6 if exact else 2e-2)
    assert torch.equal(correct, logits.argmax(-1) == targets)


def test_a_trained_head_gets_its_gradient() -> None:
    hidden, targets, head, upstream = problem(torch.float32)
    logprob, _ = token_stats(hidden, targets, head, 30, frozen=False)
    (logprob * upstream).sum().backward()
    grad, head.weight.grad = head.weight.grad, None
    expected = head(hidden.detach()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * upstream).sum().backward()
    torch.testing.assert_close(grad, head.weight.grad)


def test_no_labels_no_answers() -> None:
    hidden, _, head, _ = problem(torch.float32)
    logprob, correct = token_stats(hidden[:0], torch.zeros(0, dtype=torch.long), head, 30, frozen=False)
    assert logprob.shape == correct.shape == (0,)
