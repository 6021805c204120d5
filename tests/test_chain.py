"""The everyday chain: SFT, merge, preferences on the merged model, merge; and going on from what others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft as theirs
import pytest
import torch
from transformers import AutoModelForCausalLM

from peftctl import opened
from peftctl.errors import InputError
from peftctl.formats.origin import base_of
from peftctl.merging import merge
from tests import runs
from tests.models import logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_sft_then_merge_then_dpo_on_it_then_merge(method: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": {"add_missing": False}} if method == "bitfit" else {}
    model = {"name": str(runs.CONFIGS / "models" / "tiny-gpt2.json")} if method == "bitfit" else {}
    targets = {"method": {"target_modules": "all-linear"}} if method == "lora" else {}
    first = runs.document(method, "sft", model=model, **(keys | targets))
    runs.train(tmp_path / "sft", first)
    merge([str(tmp_path / "sft")], tmp_path / "chosen")
    second = runs.document(method, "dpo", model={"name": str(tmp_path / "chosen")}, **(keys | targets))
    runs.train(tmp_path / "dpo", second, verify=True)
    first_loss, *_, last_loss = runs.losses(tmp_path / "dpo")
    assert runs.even(first_loss) and not runs.even(last_loss)
    assert base_of(tmp_path / "dpo" / "adapter") == (str(tmp_path / "chosen"), None)
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["base"]["name"] == str(tmp_path / "chosen")
    result = merge([str(tmp_path / "dpo")], tmp_path / "final")
    assert result["max_logit_difference"] < 1e-4
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    served = opened.open(opened.find(str(tmp_path / "dpo")), device="cpu").policy
    torch.testing.assert_close(logits(final), logits(served.model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_an_adapter_that_peft_wrote(tmp_path: Path) -> None:
    runs.train(tmp_path / "made", runs.document())
    base = tmp_path / "made" / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = theirs.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = theirs.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    begun = {"init_from": str(tmp_path / "theirs"), "target_modules": ["q_proj"], "rank": 4}
    still = {"max_steps": 1, "learning_rate": 1e-9}
    contents = runs.document("lora", "sft", model={"name": str(base)}, method=begun | {"alpha": 6.0}, train=still)
    runs.train(tmp_path / "run", contents)
    served = opened.open(opened.find(str(tmp_path / "run")), device="cpu").policy.model
    torch.testing.assert_close(logits(served), logits(wrapped), rtol=1e-5, atol=1e-5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 8.0}, r"theirs has the scale \(alpha / rank\) of model\S+q_proj 1\.5, not 2\.0; .*; set method as"),
        ({"alpha": 6.0, "rank_stabilized": True}, r"1\.5, not 3\.0"),
        ({"rank": 8, "alpha": 12.0}, r"does not fit this base: model\S+a: \(4, \d+\), \(8, \d+\) expected"),
        ({"alpha": 6.0, "alpha_pattern": {"layers.1.*": 4.0}}, r"layers\.1\S+ 1\.5, not 1\.0"),
        ({"alpha": 6.0, "target_modules": ["v_proj"]}, r"v_proj\.a: missing"),
    ]
    for keys, said in wrong:
        contents["method"] = {"name": "lora"} | begun | keys
        with pytest.raises(InputError, match=r"method\.init_from:? .*" + said):
            runs.train(tmp_path / "wrong", contents)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("bottleneck", {"activation": "tanh"}, "activation relu, not tanh"),
        ("dora", {"alpha": 3.0}, r"the scale \(alpha / rank\) 2.0, not 0.1875"),
        ("adalora", {"alpha": 3.0}, r"the scale \(alpha / initial_rank\) 2.0, not 0.5"),
    ],
)
def test_settings_that_change_what_the_tensors_mean_are_refused(
    method: str, keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    runs.train(tmp_path / "first", runs.document(method))
    begun = {"init_from": str(tmp_path / "first")}
    model = {"name": str(tmp_path / "first" / "base")}
    with pytest.raises(InputError, match=rf"method\.init_from: \S+ has {said}; set method as it was set"):
        runs.train(tmp_path / "second", runs.document(method, "sft", model=model, method=begun | keys))
