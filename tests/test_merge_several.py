"""Several adapters merged into their base at once: what each adds is added, and what does not add up is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftctl import cli, methods
from peftctl.base import resolve
from peftctl.errors import InputError, Unfoldable
from peftctl.formats import peft
from peftctl.merging import merge
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import logits, tiny
from tests.runs import CONFIGS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("gpt2").save_pretrained(tmp_path / "base")
    shutil.copytree(CONFIGS / "tokenizer", tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


def adapter(base: Path, name: str, method: str, seed: int, **keys: Any) -> str:
    config, folder = contract.config(method, **keys), base.with_name(name)
    model, attachment = contract.attached(config, "gpt2")
    contract.disturb(attachment, seed)
    folder.mkdir()
    peft.write(folder, methods.get(method), config, skeleton(model), attachment.tensors(), resolve(str(base)))
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_adapters_of_unequal_kinds_add_is_added(base: Path, tmp_path: Path) -> None:
    several = [
        adapter(base, "a", "lora", 1, rank=4, target_modules=["c_attn", "c_fc"]),
        adapter(base, "b", "lora", 2, rank=2, target_modules=["c_attn"], bias="lora_only"),
        adapter(base, "c", "bitfit", 3),
    ]
    result = merge(several, tmp_path / "all")
    assert result["max_logit_difference"] < 1e-4 < result["largest_logit"]
    merge(several[::-1], tmp_path / "again", verify=False)
    before, after, again = weights(base), weights(tmp_path / "all"), weights(tmp_path / "again")
    total = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for number, one in enumerate(several):
        merge([one], tmp_path / f"{number}", verify=False)
        for name, tensor in weights(tmp_path / f"{number}").items():
            total[name] += tensor - before[name]
    changed = {name for name, change in total.items() if change.any()}
    assert any("c_attn.weight" in name for name in changed) and any("ln_1.bias" in name for name in changed)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + total[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[name], again[name], rtol=0, atol=1e-6)
        assert name in changed or torch.equal(after[name], tensor)


def test_adapters_of_several_bases_are_refused(base: Path, tmp_path: Path) -> None:
    one = adapter(base, "a", "lora", 1)
    other = tiny("gpt2")
    with torch.no_grad():
        other.transformer.wte.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(CONFIGS / "tokenizer", tmp_path / "other", dirs_exist_ok=True)
    two = adapter(tmp_path / "other", "b", "lora", 1)
    said = r"a and \S+b cannot be merged into one model: the one's base is \S+base, the other's \S+other"
    with pytest.raises(InputError, match=said):
        merge([one, two], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("method", "keys"), [("dora", {}), ("ia3", {}), ("full", {"last_layers": 1})])
def test_changes_that_do_not_add_up_are_refused(method: str, keys: dict[str, Any], base: Path, tmp_path: Path) -> None:
    several = [adapter(base, "a", "lora", 1), adapter(base, "b", method, 2, **keys)]
    with pytest.raises(
        Unfoldable, match=r"is changed by 2 of the adapters.*do not add up: merge one, and train"
    ) as said:
        merge(several, tmp_path / "merged")
    assert "\n" not in str(said.value) and not (tmp_path / "merged").exists()


def test_one_is_refused_with_its_own_reason(base: Path, tmp_path: Path) -> None:
    several = [adapter(base, "a", "lora", 1), adapter(base, "b", "prefix", 2, num_virtual_tokens=2)]
    with pytest.raises(Unfoldable):
        merge(several, tmp_path / "merged")
    with pytest.raises(InputError, match="base is a model, not an adapter"):
        merge([several[0], str(base)], tmp_path / "merged")


def test_the_command_takes_several(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = [adapter(base, "a", "lora", 1), adapter(base, "b", "lora", 2)]
    with pytest.raises(SystemExit) as left:
        cli.main(["--quiet", "merge", *several, "--output", str(tmp_path / "merged"), "--json"])
    assert not left.value.code and '"max_logit_difference"' in capsys.readouterr().out
    assert not torch.equal(logits(tiny("gpt2")), logits(type(tiny("gpt2")).from_pretrained(tmp_path / "merged").eval()))
