"""On the real SmolLM2-135M-Instruct, which `make demo-data` puts into .cache: layouts, first losses, every recipe."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import base as bases
from peftctl import commands, methods, model, objectives, opened, recipe
from peftctl.batch import build
from peftctl.compute import Precision
from peftctl.data.chat import Chat
from peftctl.opened import policy_of
from peftctl.plan import Options, plan
from peftctl.policy import Layout, Policy
from peftctl.row import Message, Row
from peftctl.run import train
from peftctl.skeleton import Skeleton
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / ".cache" / "peftctl" / "smollm2-135m"
RECIPES = sorted(ROOT.glob("recipes/smollm2-*.yaml"))


@pytest.fixture(scope="module")
def planned() -> Any:
    return plan(recipe.load(ROOT / "recipes" / "smollm2-lora.yaml"), Options())


def policies(skeleton: Skeleton) -> dict[str, Policy]:
    loaded = model.load(bases.resolve(str(BASE)), Precision("float32"), "cpu", 0)
    layers = skeleton.dimensions.layers
    return {name: policy_of(loaded, None, layers, fixed=Layout(name)) for name in ("shared", "joined", "padded")}


def test_every_layout_gives_each_row_alone(planned: Any) -> None:
    rows = planned.data.train.rows(range(6))
    with torch.no_grad():
        for name, policy in policies(planned.skeleton).items():
            together = policy.tokens(build(rows))
            labels = build(rows).labels
            for index, row in enumerate(rows):
                logits = policy.model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
                at = [k for k in range(1, len(row.ids)) if row.weights[k]]
                expected = torch.stack([logits[k - 1, row.ids[k]] for k in at])
                found = together.logprob[labels.row == index]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_template_is_the_one_of_transformers() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(BASE)
    chat = Chat(BASE)
    for line in (ROOT / ".cache/peftctl/dialogues/heldout.jsonl").read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert list(chat.dialogue([Message(**m) for m in messages])[0]) == expected


@torch.no_grad()
def opens_in_peft(adapter: Path) -> None:
    """peft finds base and tokenizer by itself, and gives every token of a sentence the same probability."""
    import peft
    from transformers import AutoTokenizer

    ids = tuple(AutoTokenizer.from_pretrained(adapter)("An adapter is a small change of a large model.").input_ids)
    policy = opened.open(opened.find(str(adapter)), device="cpu", dtype="float32").policy
    ours = policy.tokens(build([Row(ids, (1.0,) * len(ids))])).logprob
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    said = torch.tensor([ids])
    logits = theirs(input_ids=said, attention_mask=torch.ones_like(said)).logits[0, -len(ids) :]
    expected = logits.float().log_softmax(-1)[:-1].gather(-1, said[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_merges_where_it_can_and_opens_in_peft(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ["train.max_steps=3", "train.eval_every=null", "train.save_every=null", "train.warmup=0"]
    wanted = recipe.load(path, [*steps, "data.limit=60", "data.validation=null"])
    result = train(wanted, Options(quiet=True))
    events = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    if wanted.objective.name == "dpo":
        assert runs.even(events[0]["loss"])
    assert result["steps"] == 3 and result["proof"]["moved"] > 0
    if (
        methods.get(wanted.method.name).exchange is not None
        and objectives.get(wanted.objective.name).task == "causal-lm"
    ):
        opens_in_peft(Path(result["adapter"]))
    if methods.get(wanted.method.name).traits(wanted.method).foldable:
        merged = commands.merge([result["adapter"]], tmp_path / "merged", None, None, True, False, True)
        assert merged["max_logit_difference"] < 3
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
