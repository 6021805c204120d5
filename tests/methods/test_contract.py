"""Every method found on disk keeps the contract, with nothing but its name in the recipe; or says that it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftctl import methods
from peftctl.errors import TargetError
from peftctl.methods.base import MethodConfig
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import NAMES, tiny

IN_FULL = ("llama", "gpt2")
THE_CORE = ("opt", "gpt_neox", "qwen3", "gemma", "mistral", "phi3", "bert", "t5", "bart")

# what a method refuses with its defaults, by name and with a sentence
REFUSED = {
    "bitfit": {"llama", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "qwen3_moe", "phi3", "mpt", "t5"},
    "head": set(NAMES),  # they have no head of a task
    "ia3": {"mixtral", "qwen3_moe"},
    "p-tuning": {"t5", "bart"},
    "prompt": {"t5", "bart"},
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


TOY = '''
"""A toy: a trained gain on the last norm."""
from peftctl.methods.base import Counted, Method, MethodConfig, Traits

def _attach(model, config):
    import torch
    from peftctl.methods.attachment import Attachment, Delta, Injected

    class Gain(Delta):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.zeros(32))
        def forward(self, x, y):
            return y + y * self.gain
        def folds(self):
            return ("weight",)
        def fold(self, name, weight):
            return weight.float() * (1 + self.gain)
    return Attachment([Injected("model.norm", Gain())])

METHOD = Method(
    name="toy-gain", summary="a toy", paper="https://arxiv.org/abs/0000.00000", config=MethodConfig,
    traits=lambda config: Traits(), count=lambda table, config: Counted({"model.norm": 32}, "one"), attach=_attach,
)
'''


def test_a_folder_is_all_that_a_new_method_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "toy_gain"
    folder.mkdir()
    (folder / "__init__.py").write_text(TOY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "toy-gain" in methods.names()
    for check in contract.FULL:
        check(contract.config("toy-gain"), "llama")


@pytest.mark.parametrize("method", methods.names())
def test_says_what_it_is(method: str) -> None:
    found = methods.get(method)
    assert found.name == method
    assert found.summary and "\n" not in found.summary and len(found.summary) < 80
    assert found.paper.startswith("https://arxiv.org/abs/")


def test_declarations_and_counts_need_no_torch() -> None:
    code = (
        "import sys; from peftctl import methods; from tests.methods.tables import LLAMA\n"
        "for name in methods.names():\n"
        "    method = methods.get(name)\n"
        "    config = method.config(name=name)\n"
        "    method.traits(config), method.exchange and method.exchange()\n"
        "    try: method.count(LLAMA, config)\n"
        "    except Exception as error: assert type(error).__name__ == 'TargetError', error\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
