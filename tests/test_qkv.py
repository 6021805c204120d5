"""Whose outputs of a fused linear are whose: seen by disturbing them at one position of a tiny model's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from peftctl.errors import TargetError
from peftctl.qkv import LAYOUTS, PARTS, sort
from peftctl.surgery import skeleton
from tests.models import inputs, tiny

FUSED = {
    "gpt2": "c_attn",
    "gpt_neox": "query_key_value",
    "falcon": "query_key_value",
    "falcon, one key": "query_key_value",
    "falcon, a key each": "query_key_value",
    "phi3": "qkv_proj",
    "bloom": "query_key_value",
    "mpt": "Wqkv",
}
AT = 4  # the disturbed position, of 9


def model_of(name: str) -> Any:
    if "," not in name:
        return tiny(name)
    size = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    one = name.endswith("one key")
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(**size, multi_query=one, initializer_range=0.2)
    ).eval()


class Attention:
    """The attention of a model's first layer, with what its fused linear gives changed on the way."""

    def __init__(self, name: str) -> None:
        self.model = model_of(name)
        table = skeleton(self.model)
        parts = sort(table, [f"{FUSED[name]}.{part}" for part in PARTS]).parts
        self.path, self.rows = next(iter(parts.items()))
        self.width = next(m.out_features for m in table.modules if m.path == self.path)
        assert type(self.model.get_submodule(self.path.rpartition(".")[0])).__name__ in LAYOUTS

    @torch.no_grad()
    def answer(self, noisy: str = "", zero: str = "") -> Tensor:
        """The attention's output, (rows, positions, width)."""
        noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
        found: list[Tensor] = []

        def change(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for part in zero:
                out[..., self.rows[part]] = 0
            for part in noisy:
                rows = list(self.rows[part])
                out[:, AT, rows] += noise[: len(rows)]
            return out

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        attention = self.model.get_submodule(self.path.rpartition(".")[0])
        handles = [self.model.get_submodule(self.path).register_forward_hook(change)]
        handles.append(attention.register_forward_hook(keep))
        self.model(**inputs(self.model))
        for handle in handles:
            handle.remove()
        return found[0]

    def moved(self, noisy: str, zero: str = "") -> list[bool]:
        """Which positions of the output move when a part is disturbed at one."""
        difference = (self.answer(noisy, zero) - self.answer(zero=zero)).abs().amax(dim=(0, 2))
        return [float(d) > 1e-4 for d in difference]


@pytest.mark.parametrize("name", FUSED)
def test_each_part_does_what_its_name_says(name: str) -> None:
    attention = Attention(name)
    nowhere, here = [False] * 9, [False] * AT + [True] + [False] * (8 - AT)
    later = [False] * AT + [True] * (9 - AT)
    assert attention.moved("q") == here  # a query is its own position's alone
    assert attention.moved("v") == later  # a value is seen from its position on,
    assert attention.moved("v", zero="q") == later  # whatever the queries
    assert attention.moved("k") == later  # and so is a key,
    assert attention.moved("k", zero="q") == nowhere  # but only by a query
    assert attention.moved("qk", zero="v") == nowhere


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_are_all_there_is(name: str) -> None:
    attention = Attention(name)
    assert sorted(row for rows in attention.rows.values() for row in rows) == list(range(attention.width))


def test_a_part_may_be_named_by_more_of_its_path() -> None:
    table = skeleton(tiny("gpt2"))
    assert sort(table, ["h.1.attn.c_attn.q"]).parts.keys() == {"transformer.h.1.attn.c_attn"}
    found = sort(table, ["c_fc", "c_attn.v"])
    assert found.whole == ["c_fc"] and [list(parts) for parts in found.parts.values()] == [["v"]] * 2


def test_a_linear_of_that_name_is_no_part() -> None:
    assert sort(skeleton(tiny("t5")), ["SelfAttention.q", "q"]) == (["SelfAttention.q", "q"], {})


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("llama", "o_proj.q", "model.layers.0.self_attn.o_proj of LlamaAttention is not known"),
        ("gpt2", "c_fc.q", "transformer.h.0.mlp.c_fc of GPT2MLP is not known; it is of GPT2Attention"),
        ("gpt2", "attn.c_proj.v", "transformer.h.0.attn.c_proj gives 32 numbers, not the 96 of query, key and value"),
    ],
)
def test_a_part_of_what_is_not_known_is_refused_by_name(name: str, target: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        sort(skeleton(tiny(name)), [target])
