"""Attention over a forest: the products with their own backward against the plain twin, and both against one row."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftctl.batch import build
from peftctl.kernels import forest
from peftctl.kernels.flex import flex
from peftctl.kernels.rectangles import LARGEST, Plan
from peftctl.row import Row

CASES = [
    # heads, kv_heads, virtual, causal, window
    (4, 4, 0, True, None),
    (6, 2, 0, True, None),
    (6, 2, 3, True, None),
    (4, 1, 0, True, 4),
    (4, 2, 3, True, 4),
    (4, 4, 0, False, None),
    (4, 2, 0, False, 3),
]


def row(*ids: int) -> Row:
    return Row(ids, (1.0,) * len(ids))


def rows() -> list[Row]:
    """Shared starts on two levels, a row that is another's start, a row of one token, rows of unlike length."""
    start = (7, 8, 9, 10)
    shared = [row(*start, 1, 2, 3), row(*start, 1, 2, 4, 5, 6, 7), row(*start), row(*start, 5)]
    return [*shared, row(3), row(*range(20, 33)), row(*range(40, 48)), row(*range(60, 85))]


def tensors(heads: int, kv_heads: int, virtual: int, dtype: torch.dtype, causal: bool) -> tuple[Plan, list[Tensor]]:
    made = Plan(build(rows(), share="all" if causal else "none"))
    generator = torch.Generator().manual_seed(1)
    shapes = [(made.tokens, heads, 8), *[(virtual + made.tokens, kv_heads, 8)] * 2]
    return made, [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def both(case: Sequence[object], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    heads, kv_heads, virtual, causal, window = case
    found = []
    for attend in (forest.fused, forest.plain):
        made, qkv = tensors(heads, kv_heads, virtual, dtype, causal)  # type: ignore[arg-type]
        out = attend(*qkv, made, virtual, 0.3, causal, window)  # type: ignore[arg-type]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (out.double() * weight).sum().backward()
        found.append((out.detach(), *(t.grad for t in qkv)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_products_equal_the_plain_twin(case: Sequence[object]) -> None:
    for ours, theirs in zip(*both(case, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16_they_differ_by_its_rounding(case: Sequence[object]) -> None:
    exact, rough = both(case, torch.float64), both(case, torch.bfloat16)
    for ours, theirs in zip(rough[0], exact[1], strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_each_query_sees_its_path_and_nothing_else(case: Sequence[int]) -> None:
    heads, kv_heads, virtual, causal, window = case
    made, (q, k, v) = tensors(heads, kv_heads, virtual, torch.float64, bool(causal))
    found = forest.fused(q, k, v, made, virtual, 0.3, bool(causal), window)
    for path in build(rows(), share="all" if causal else "none").row_tokens:
        for place, token in enumerate(path.tolist()):
            seen = [
                *(j for j in range(virtual) if window is None or j - virtual > place - window),
                *(
                    virtual + int(t)
                    for p, t in enumerate(path)
                    if (not causal or p <= place) and (window is None or abs(p - place) < window)
                ),
            ]
            for head in range(heads):
                kv = head // (heads // kv_heads)
                chances = (0.3 * k[seen, kv] @ q[token, head]).softmax(0)
                torch.testing.assert_close(found[token, head], chances @ v[seen, kv], rtol=1e-9, atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    small = Plan(build([row(1, 2, 3), row(1, 2, 4, 5)]))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, h, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for n, h in ((5, 4), (7, 2), (7, 2))
    )
    assert torch.autograd.gradcheck(lambda *t: forest.fused(*t, small, 2, 1 / math.sqrt(3), True, None), (q, k, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_sees_the_same(case: Sequence[int], softcap: float | None) -> None:
    heads, kv_heads, virtual, causal, window = case
    made, qkv = tensors(heads, kv_heads, virtual, torch.float32, bool(causal))
    q, k, v = (t.detach() for t in qkv)  # its backward pass is for other devices
    with torch.no_grad():
        ours = flex(q, k, v, made, virtual, 0.3, bool(causal), window, softcap, compiled=False)
        theirs = forest.plain(q, k, v, made, virtual, 0.3, bool(causal), window, softcap=softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_on_a_card(case: Sequence[int]) -> None:
    heads, kv_heads, virtual, causal, window = case
    found = []
    for attend in (flex, forest.plain):
        made = Plan(build(rows(), share="all" if causal else "none").to("cuda"))
        generator = torch.Generator().manual_seed(1)
        shapes = [(made.tokens, heads, 16), *[(virtual + made.tokens, kv_heads, 16)] * 2]
        qkv = [torch.randn(s, generator=generator).cuda().requires_grad_() for s in shapes]
        out = attend(*qkv, made, virtual, 0.3, bool(causal), window)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), qkv)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_unlike_widths_take_the_twin() -> None:
    _, (q, _, v) = tensors(4, 4, 0, torch.float32, True)
    assert forest.applies(q, v) and not forest.applies(q, v[..., :4])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "kept", "overhead"), [(3, 0, 1), (5, 8, 10), (128, 320, 10**9)])
def test_however_lines_are_cut_and_grouped_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch, queries: int, kept: int, overhead: int, causal: bool
) -> None:
    case = (6, 2, 2, causal, None)
    expected = both(case, torch.float64)[0]
    monkeypatch.setattr("peftctl.kernels.rectangles.QUERIES", queries)
    monkeypatch.setattr("peftctl.kernels.rectangles.OVERHEAD", overhead)
    monkeypatch.setattr("peftctl.kernels.forest.KEPT", kept)
    for found in both(case, torch.float64):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_causal_keys_end_with_their_line_and_no_rectangle_is_too_large() -> None:
    made = Plan(build([row(*range(1, 600)), row(*range(700, 720))])).laid(True)
    pairs = sum(r.queries.numel() * r.keys.shape[1] for r in made.rectangles)
    assert pairs < 0.65 * 599 * 599 and len(made.rectangles) > 2
    many = Plan(build([row(*range(i, 2000 + i)) for i in range(1, 9)])).laid(True)
    assert all(len(r.queries) == 1 or r.queries.numel() * r.keys.shape[1] <= LARGEST for r in many.rectangles)
