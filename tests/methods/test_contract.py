"""Every method found on disk keeps the contract, with nothing but its name in the recipe; or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peftctl import methods
from peftctl.errors import TargetError
from peftctl.methods.base import MethodConfig
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import NAMES, tiny

IN_FULL = ("llama", "gpt2")
THE_CORE = ("opt", "gpt_neox", "qwen3", "gemma", "mistral", "phi3", "bert")

# what a method refuses with its defaults, by name and with a sentence
REFUSED = {
    "bitfit": {"llama", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "phi3", "mpt", "t5"},
    "bottleneck": {"t5"},
    "prefix": {"t5"},
}


def serves(method: str, name: str) -> bool:
    return name not in REFUSED.get(method, ())


def pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(method, name) for method in methods.names() for name in names if serves(method, name)]


def label(check: object) -> str:
    return getattr(check, "__name__", str(check))


@pytest.mark.parametrize("check", contract.FULL, ids=label)
@pytest.mark.parametrize(("method", "name"), pairs(IN_FULL))
def test_in_full(method: str, name: str, check: Callable[[MethodConfig, str], None]) -> None:
    check(contract.config(method), name)


@pytest.mark.parametrize("check", contract.CORE, ids=label)
@pytest.mark.parametrize(("method", "name"), pairs(THE_CORE))
def test_the_core(method: str, name: str, check: Callable[[MethodConfig, str], None]) -> None:
    check(contract.config(method), name)


@pytest.mark.parametrize("method", methods.names())
def test_serves_or_refuses_every_architecture_by_name(method: str) -> None:
    for name in NAMES:
        config, table = contract.config(method), skeleton(tiny(name))
        if serves(method, name):
            contract.keeps_shapes_and_counts(config, name)
            continue
        with pytest.raises(TargetError) as counting:
            methods.get(method).count(table, config)
        with pytest.raises(TargetError) as attaching:
            contract.attached(config, name)
        assert str(counting.value) == str(attaching.value)
        assert table.architecture in str(counting.value) and "\n" not in str(counting.value)


@pytest.mark.parametrize("method", methods.names())
def test_says_what_it_is(method: str) -> None:
    found = methods.get(method)
    assert found.name == method
    assert found.summary and "\n" not in found.summary and len(found.summary) < 80
    assert found.paper.startswith("https://arxiv.org/abs/")
