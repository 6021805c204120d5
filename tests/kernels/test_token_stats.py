"""Chunked log-probabilities against the plain formula, values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from peftctl.kernels import token_stats as module
from peftctl.kernels.matrix import matrix, onward
from peftctl.kernels.token_stats import FrozenHead, token_stats

Finish = Callable[[torch.Tensor], torch.Tensor]


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, dtype=dtype)
    hidden = torch.randn(17, 8, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(0, 30, (17,)), head, torch.randn(17)


def capped(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / 2) * 2


@pytest.mark.parametrize("finish", [None, capped])
@pytest.mark.parametrize("kind", ["trained", "frozen", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, kind: str, finish: Finish | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4 * 30 * 5)  # several chunks, the last one short
    monkeypatch.setattr(module, "BLOCK", 30 * 2)  # and blocks
    hidden, targets, linear, upstream = problem(dtype)

    def head(x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, linear.weight, linear.bias)
        return logits if finish is None else finish(logits)

    frozen = FrozenHead(matrix(linear.weight.detach(), linear.bias.detach(), pack=kind == "packed"), finish)
    logprob, correct = token_stats(hidden, targets, head, 30, None if kind == "trained" else frozen)
    (logprob * upstream).sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    expected = head(twin).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * upstream).sum().backward()
    exact = dtype is torch.float32
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if exact else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(logprob, expected, **tolerance)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-5 if exact else 3e-2, atol=1e-6 if exact else 2e-2)
    assert torch.equal(correct, head(hidden).argmax(-1) == targets)


@pytest.mark.parametrize("finish", [None, capped])
@pytest.mark.parametrize("kind", ["trained", "frozen", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_mean_it_is_label_smoothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, finish: Finish | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4 * 30 * 5)
    monkeypatch.setattr(module, "BLOCK", 30 * 2)
    hidden, targets, linear, upstream = problem(dtype)

    def head(x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, linear.weight, linear.bias)
        return logits if finish is None else finish(logits)

    frozen = FrozenHead(matrix(linear.weight.detach(), linear.bias.detach(), pack=kind == "packed"), finish)
    frozen = None if kind == "trained" else frozen
    logprob, correct, mean = token_stats(hidden, targets, head, 30, frozen, mean=True)
    loss = -(0.9 * logprob + 0.1 * mean)
    (loss * upstream).sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    expected = F.cross_entropy(head(twin).float(), targets, reduction="none", label_smoothing=0.1)
    (expected * upstream).sum().backward()
    exact = dtype is torch.float32
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if exact else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-5 if exact else 3e-2, atol=1e-6 if exact else 2e-2)
    hidden.grad = None
    plain = token_stats(hidden, targets, head, 30, frozen)
    assert torch.equal(plain[0], logprob) and torch.equal(plain[1], correct)
    with torch.no_grad():
        assert torch.equal(token_stats(hidden, targets, head, 30, frozen, mean=True)[2], mean)


@pytest.mark.parametrize("finish", [None, capped])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_labels_are_gone_over_at_once_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, finish: Finish | None, mean: bool, dtype: torch.dtype
) -> None:
    hidden, targets, linear, upstream = problem(dtype)
    frozen = FrozenHead(matrix(linear.weight.detach(), linear.bias.detach()), finish)
    found = []
    for labels in (1, 4, 100):
        monkeypatch.setattr(module, "BLOCK", 30 * labels)
        stats = token_stats(hidden, targets, linear, 30, frozen, mean)
        found.append([*stats, *torch.autograd.grad((sum(stats[::2]) * upstream).sum(), hidden)])
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))


def test_logits_in_fp32_over_a_half_precision_head() -> None:
    hidden, targets, linear, upstream = problem(torch.bfloat16)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    rough = FrozenHead(matrix(weight, bias))
    exact = rough._replace(wide=onward(weight.float(), bias.float()))
    expected = F.linear(hidden.float(), weight.float(), bias.float()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprob, _ = token_stats(hidden, targets, linear, 30, exact)
    torch.testing.assert_close(logprob, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(token_stats(hidden, targets, linear, 30, rough)[0], expected, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad((logprob * upstream).sum(), hidden, retain_graph=True)
    (true,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(slope, true, rtol=3e-2, atol=2e-2)


def test_without_gradients_the_answers_are_the_same() -> None:
    hidden, targets, linear, _ = problem(torch.float32)
    frozen = FrozenHead(matrix(linear.weight.detach(), linear.bias.detach()))
    with_gradient = token_stats(hidden, targets, linear, 30, frozen)
    with torch.no_grad():
        without = token_stats(hidden, targets, linear, 30, frozen)
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])


def test_a_trained_head_gets_its_gradient() -> None:
    hidden, targets, head, upstream = problem(torch.float32)
    logprob, _ = token_stats(hidden, targets, head, 30, frozen=None)
    (logprob * upstream).sum().backward()
    grad, head.weight.grad = head.weight.grad, None
    expected = head(hidden.detach()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * upstream).sum().backward()
    torch.testing.assert_close(grad, head.weight.grad)


def test_no_labels_no_answers() -> None:
    hidden, _, head, _ = problem(torch.float32)
    logprob, correct = token_stats(hidden[:0], torch.zeros(0, dtype=torch.long), head, 30, frozen=None)
    assert logprob.shape == correct.shape == (0,)
    assert token_stats(hidden[:0], torch.zeros(0, dtype=torch.long), head, 30, None, mean=True)[2].shape == (0,)


def test_chunks_are_few_and_of_like_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 labels of which 7 fit: 6, 6 and 5, not 7, 7 and 3."""
    monkeypatch.setattr(module, "CHUNK", 4 * 30 * 7)
    hidden, targets, linear, _ = problem(torch.float32)
    seen: list[int] = []

    def finish(logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return logits

    token_stats(hidden, targets, linear, 30, FrozenHead(matrix(linear.weight.detach()), finish))
    assert seen == [6, 6, 5]
