"""Many answers at once are those of one prompt alone, and what is drawn is drawn by the policy's probabilities."""

from __future__ import annotations

import pytest
import torch

from peftctl import methods
from peftctl.adapter import attach
from peftctl.generation import generate
from peftctl.opened import policy_of
from peftctl.policy import Policy
from peftctl.sampling import sample
from tests.methods import contract
from tests.models import ENCODERS, NAMES, SEQ2SEQ, VOCABULARY, tiny
from tests.test_seq2seq import attached

DECODERS = sorted(set(NAMES) - ENCODERS - SEQ2SEQ)
END = (5, 17, 40, 77, 101, 120)  # several, so that some answers end early


def made(name: str, method: str | None = None) -> Policy:
    model = tiny(name)
    attachment = None
    if method is not None:
        attachment = attach(model, methods.get(method), contract.config(method), 0)
        contract.disturb(attachment)
    return policy_of(model, attachment, 2).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def alone(policy: Policy, asked: list[list[int]]) -> list[list[int]]:
    return [generate(policy, ids, max_new_tokens=8, end=END) for ids in asked]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_answers_are_those_of_each_prompt_alone(name: str) -> None:
    policy, asked = made(name), prompts(7, 1, 4, 9, 7, 2)
    endless = [generate(policy, ids, max_new_tokens=8, end=()) for ids in asked]
    end = sorted({endless[0][2], endless[3][5]})  # some end before others
    expected = [generate(policy, ids, max_new_tokens=8, end=end) for ids in asked]
    assert len(set(map(len, expected))) > 1
    found = sample(policy, asked, 2, max_new_tokens=8, end=end)
    assert found == [answer for answer in expected for _ in range(2)]


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning", "lora"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_also_with_deltas_and_virtual_tokens(name: str, method: str) -> None:
    policy, asked = made(name, method), prompts(7, 3, 4, 7)
    assert sample(policy, asked, 1, max_new_tokens=8, end=END) == alone(policy, asked)


@pytest.mark.parametrize("method", [None, "lora", "prefix"])
@pytest.mark.parametrize("name", sorted(SEQ2SEQ))
def test_also_of_encoder_decoders(name: str, method: str | None) -> None:
    policy, asked = attached(name, method), prompts(7, 1, 4, 9, 7, 2)
    endless = [generate(policy, ids, max_new_tokens=8, end=()) for ids in asked]
    assert sample(policy, asked, 1, max_new_tokens=8, end=()) == endless and len(set(map(tuple, endless))) > 1
    places = {token: {ids.index(token) if token in ids else 8 for ids in endless} for ids in endless for token in ids}
    end = [max(places, key=lambda token: len(places[token]))]  # some end before others
    expected = [generate(policy, ids, max_new_tokens=8, end=end) for ids in asked]
    assert len(set(map(len, expected))) > 1
    assert sample(policy, asked, 2, max_new_tokens=8, end=end) == [answer for answer in expected for _ in range(2)]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_prompt_may_have_a_limit_of_its_own(name: str) -> None:
    policy, asked, limits = attached(name, None), prompts(7, 3, 4, 7), [3, 8, 1, 5]
    whole = sample(policy, asked, 1, max_new_tokens=8, end=())
    assert sample(policy, asked, 1, max_new_tokens=limits, end=()) == [
        answer[:limit] for answer, limit in zip(whole, limits, strict=True)
    ]


def test_also_by_the_fast_kernels() -> None:
    policy, asked = made("llama", "lora"), prompts(7, 3, 4, 7)
    expected = alone(policy, asked)
    policy.fuse(pack=False)
    assert sample(policy, asked, 1, max_new_tokens=8, end=END) == expected


def test_what_is_drawn_depends_on_its_own_numbers_alone() -> None:
    policy, asked = made("llama"), prompts(5, 2, 8)
    numbers = torch.rand(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = torch.get_rng_state()
    whole = sample(policy, asked, 4, max_new_tokens=6, end=END, numbers=numbers)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole == sample(policy, asked, 4, max_new_tokens=6, end=END, numbers=numbers)
    assert whole[4:8] == sample(policy, asked[1:2], 4, max_new_tokens=6, end=END, numbers=numbers[4:8])
    assert len(set(map(tuple, whole))) > 6 and {len(answer) for answer in whole} != {6}
    assert all(token not in END for answer in whole for token in answer[:-1])


@torch.no_grad()
def test_tokens_are_drawn_by_their_probabilities() -> None:
    policy, asked = made("llama"), prompts(6)
    n = 4000
    even = ((torch.arange(n) + 0.5) / n)[:, None]  # numbers that fill [0, 1) evenly: no chance is left
    drawn = [answer[0] for answer in sample(policy, asked, n, max_new_tokens=1, end=(), numbers=even)]
    expected = policy.model(input_ids=torch.tensor(asked)).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)
    assert float((counts - n * expected).abs().max()) <= 1.5


def test_a_cache_holds_no_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = made("llama"), prompts(7, 3, 4, 7, 2, 2)
    whole = sample(policy, asked, 2, max_new_tokens=8, end=END)
    monkeypatch.setattr("peftctl.sampling.HELD", 40)
    assert sample(policy, asked, 2, max_new_tokens=8, end=END) == whole
