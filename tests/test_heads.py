"""Heads of tasks: the scores are those of transformers' own classes, alone or in a forest, and of peft both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from peftctl import methods, opened
from peftctl import model as models
from peftctl.adapter import attach
from peftctl.base import Base, resolve
from peftctl.batch import Batch, build
from peftctl.compute import AUTO
from peftctl.counting import count
from peftctl.errors import InputError
from peftctl.exporting import export
from peftctl.formats.peft import write
from peftctl.formats.shards import shards
from peftctl.merging import merge
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.policy import Layout, Policy
from peftctl.row import Row, judged
from peftctl.task import Task
from tests import runs
from tests.models import tiny
from tests.runs import CONFIGS

NAMES = ("llama", "gpt2", "qwen3", "mistral", "bert", "roberta")
LABELS = ("bad", "good", "neither")
ROWS = Task("sequence-classification", LABELS)
TOKENS = Task("token-classification", LABELS)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "target_modules": "all-linear"},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain bases, none of which has a head."""
    folder = tmp_path_factory.mktemp("heads")
    for name in NAMES:
        tiny(name).save_pretrained(folder / name)
        for file in (CONFIGS / "tokenizer").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


def base_of(folder: Path, name: str, task: Task) -> Base:
    return resolve(str(folder / name))._replace(task=task)


def loaded(base: Base, method: str = "lora", moved: bool = True) -> tuple[Policy, Attachment, Any]:
    """A policy whose deltas and head are moved off their start."""
    model, config = models.load(base, AUTO, "cpu", 0), methods.get(method).config(name=method, **METHODS[method])
    attachment = attach(model, methods.get(method), config, 0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.trainable().values() if moved else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy_of(model, attachment, 2).eval(), attachment, config


def rows(typed: bool = False) -> list[Row]:
    """Rows of three lengths, two of which begin alike."""
    ids = [(5, 6, 7, 8, 9), (5, 6, 7, 30, 31, 32, 33), (40, 41)]
    types = [tuple(int(k >= len(one) // 2) for k in range(len(one))) if typed else () for one in ids]
    return [judged(one, k, example=k, types=kinds) for k, (one, kinds) in enumerate(zip(ids, types, strict=True))]


def tagged() -> Batch:
    return build([row._replace(weights=(0.0,) + (1.0,) * (len(row.ids) - 1)) for row in rows()])


@torch.no_grad()
def alone(model: Any, typed: bool = False) -> list[Tensor]:
    """What the model says about each row by itself."""
    found = []
    for row in rows(typed):
        more = {"token_type_ids": torch.tensor([row.types])} if typed else {}
        found.append(model(input_ids=torch.tensor([row.ids]), **more).logits[0])
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["chosen", "padded"])
@torch.no_grad()
def test_rows_score_together_as_each_does_alone(name: str, layout: str, folder: Path) -> None:
    policy, attachment, _ = loaded(base_of(folder, name, ROWS))
    expected = torch.stack(alone(policy.model))
    if layout == "padded":
        policy.layout = Layout("padded", policy.layout.first_position)
    scores = policy.row_scores(build(rows(), trim=policy.layout.name == "shared"))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    with attachment.disabled():
        assert (policy.row_scores(build(rows())) - scores).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["chosen", "padded"])
@torch.no_grad()
def test_an_encoder_is_told_which_text_a_token_belongs_to(layout: str, folder: Path) -> None:
    policy, _, _ = loaded(base_of(folder, "bert", ROWS))
    if layout == "padded":
        policy.layout = Layout("padded")
    scores = policy.row_scores(build(rows(typed=True)))
    torch.testing.assert_close(scores, torch.stack(alone(policy.model, typed=True)), rtol=1e-4, atol=1e-5)
    assert (scores - policy.row_scores(build(rows()))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
@torch.no_grad()
def test_tokens_score_where_they_stand(name: str, folder: Path) -> None:
    policy, _, _ = loaded(base_of(folder, name, TOKENS))
    expected = torch.cat([scores[1:] for scores in alone(policy.model)])
    torch.testing.assert_close(policy.token_scores(tagged()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_answers_to_one_prompt_share_is_computed_once(folder: Path) -> None:
    policy, _, _ = loaded(base_of(folder, "llama", ROWS))
    prompt = tuple(range(10, 40))
    pair = [judged((*prompt, *answer), role=role) for role, answer in (("chosen", (5, 6)), ("rejected", (7, 8, 9)))]
    batch = build(pair, trim=True)
    assert len(batch) == len(prompt) + 5 < batch.real_tokens
    expected = [policy.model(input_ids=torch.tensor([row.ids])).logits[0] for row in pair]
    torch.testing.assert_close(policy.row_scores(batch), torch.stack(expected), rtol=1e-4, atol=1e-5)


def theirs(base: Base, task: Task) -> Any:
    """transformers' own model of the plain base, its head drawn anew."""
    end = {"sequence-classification": "Sequence", "token-classification": "Token"}[task.name]
    made = getattr(transformers, f"AutoModelFor{end}Classification")
    torch.manual_seed(99)
    return made.from_pretrained(base.weights, num_labels=len(task.labels)).eval()


def written(policy: Policy, attachment: Attachment, config: Any, base: Base, target: Path) -> None:
    target.mkdir()
    table = models.skeleton(base)
    write(target, methods.get(config.name), config, table, attachment.tensors(), base)


@pytest.mark.filterwarnings("ignore")  # both libraries' remarks
@pytest.mark.parametrize("task", [ROWS, TOKENS], ids=lambda task: task.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
@torch.no_grad()
def test_peft_scores_the_same_with_our_files(name: str, method: str, task: Task, folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, name, task)
    policy, attachment, config = loaded(base, method)
    batch = build(rows()) if task is ROWS else tagged()
    ours = policy.row_scores(batch)
    written(policy, attachment, config, base, tmp_path / "adapter")
    again = opened.open(opened.find(str(tmp_path / "adapter")), device="cpu")
    assert again.found.base.task == task
    assert torch.equal(again.policy.row_scores(batch), ours)
    if method == "prefix":
        return  # for a head, peft 0.21 looks for the cache under the name that it had in transformers 4
    model = peft.PeftModel.from_pretrained(theirs(base, task), tmp_path / "adapter").eval()
    found = [model(input_ids=torch.tensor([r.ids]), attention_mask=torch.ones(1, len(r.ids)).long()) for r in rows()]
    held = [
        one.logits[0] if task is ROWS else one.logits[0][-len(r.ids) :][1:]
        for one, r in zip(found, rows(), strict=True)
    ]
    expected = torch.stack(held) if task is ROWS else torch.cat(held)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2", "bert"])
@torch.no_grad()
def test_pefts_own_files_score_as_peft_says(name: str, folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, name, ROWS)
    if name == "bert":  # of a base without a pooler peft keeps none: it would be drawn anew each time
        whole = theirs(base, ROWS)
        whole.save_pretrained(tmp_path / "whole")
        for file in (CONFIGS / "tokenizer").iterdir():
            (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
        base = resolve(str(tmp_path / "whole"))._replace(task=ROWS)
    model = peft.get_peft_model(
        theirs(base, ROWS), peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = torch.stack(alone(model))
    thing = opened.open(opened.find(str(tmp_path / "adapter")), device="cpu")
    assert len(thing.found.base.task.labels) == 3
    torch.testing.assert_close(thing.policy.row_scores(build(rows())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", [ROWS, TOKENS], ids=lambda task: task.name)
def test_the_head_is_counted_as_what_is_built(name: str, task: Task, folder: Path) -> None:
    base = base_of(folder, name, task)
    policy, attachment, config = loaded(base)
    counts = count(base, methods.get("lora"), config)
    trained = {key: p.numel() for key, p in attachment.trainable().items()}
    assert counts.trainable == sum(trained.values())
    head = {key: size for key, size in trained.items() if not key.endswith((".a", ".b"))}
    hidden = 32
    built = {"bert": 3 * (hidden + 1), "roberta": 3 * (hidden + 1), "gpt2": 3 * hidden, "llama": 3 * hidden}
    expected = built.get(name, 3 * hidden)
    if task is ROWS and name in ("bert", "roberta"):
        expected += hidden * (hidden + 1)  # BERT's pooler, which the base lacks; RoBERTa's dense
    if task is TOKENS and name not in ("bert", "roberta"):
        expected = 3 * (hidden + 1)
    assert sum(head.values()) == counts.saved_modules == expected
    plain = sum(p.numel() for p in policy.model.base_model.parameters())
    assert counts.base == plain - (hidden * (hidden + 1) if name == "bert" and task is ROWS else 0)


def test_training_reaches_the_head_and_the_deltas(folder: Path) -> None:
    policy, attachment, _ = loaded(base_of(folder, "llama", ROWS))
    policy.train()
    policy.row_scores(build(rows())).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.trainable().values())
    assert not [name for name, p in policy.model.named_parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("task", [ROWS, TOKENS], ids=lambda task: task.name)
@torch.no_grad()
def test_merged_with_its_head_into_plain_weights(name: str, task: Task, folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, name, task)
    policy, attachment, config = loaded(base)
    written(policy, attachment, config, base, tmp_path / "adapter")
    assert merge([str(tmp_path / "adapter")], tmp_path / "merged")["max_logit_difference"] < 1e-4
    end = "Sequence" if task is ROWS else "Token"
    model = getattr(transformers, f"AutoModelFor{end}Classification").from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    for ours, expected in zip(alone(model), alone(policy.model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert opened.find(str(tmp_path / "merged")).base.task == task


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_head_for_other_labels_is_replaced(folder: Path, tmp_path: Path) -> None:
    """A bare trunk, whose files have no prefix, with a head for two labels, which has one."""
    other = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    other.save_pretrained(tmp_path / "bert")
    for file in (CONFIGS / "tokenizer").iterdir():
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    base = base_of(tmp_path, "bert", ROWS)
    policy, attachment, config = loaded(base)
    written(policy, attachment, config, base, tmp_path / "adapter")
    assert merge([str(tmp_path / "adapter")], tmp_path / "merged")["max_logit_difference"] < 1e-4
    names = [entry.name for shard in shards(tmp_path / "merged") for entry in shard.entries]
    assert sum("classifier" in name for name in names) == 2 == len({n for n in names if "classifier" in n})


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_bare_trunk_gets_its_head(folder: Path, tmp_path: Path) -> None:
    trunk = transformers.AutoModel.from_pretrained(folder / "bert", add_pooling_layer=True)
    trunk.save_pretrained(tmp_path / "bert")
    for file in (CONFIGS / "tokenizer").iterdir():
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    base = base_of(tmp_path, "bert", ROWS)
    policy, attachment, config = loaded(base)
    assert not any("pooler" in name and not name.endswith((".a", ".b")) for name in attachment.trainable())
    written(policy, attachment, config, base, tmp_path / "adapter")
    assert merge([str(tmp_path / "adapter")], tmp_path / "merged")["max_logit_difference"] < 1e-4
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for ours, expected in zip(alone(model), alone(policy.model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["gguf", "adapterhub"])
def test_a_form_without_a_place_for_a_head_is_refused(to: str, folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, "llama", ROWS)
    policy, attachment, config = loaded(base)
    written(policy, attachment, config, base, tmp_path / "adapter")
    with pytest.raises(InputError, match=rf"--to {to}: its form has no place for a head of Llama.*; use --to peft"):
        export(str(tmp_path / "adapter"), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_rate_of_its_own_moves_the_head_alone(tmp_path: Path) -> None:
    """Of one plain step down the gradient, rates of 1, 2 and 3 times as much lie on one line."""
    found = []
    for own in (None, 0.02, 0.03):
        keys = {"optimizer": "sgd", "betas": [0.0, 0.0], "max_grad_norm": None, "schedule": "constant", "warmup": 0}
        contents = runs.document("lora", "classification", model={"task": ROWS.name}, data={"validation": None})
        contents["train"] |= {"max_steps": 1, "eval_every": None, "head_learning_rate": own, **keys}
        runs.train(tmp_path / str(own), contents)
        found.append(runs.adapter(tmp_path / str(own)))
    heads = [next(tensor for name, tensor in one.items() if "score" in name) for one in found]
    assert (heads[1] - heads[0]).abs().max() > 1e-5
    torch.testing.assert_close(heads[2] - heads[1], heads[1] - heads[0], rtol=1e-3, atol=1e-7)
    assert all(torch.equal(found[0][name], one[name]) for one in found for name in one if "score" not in name)
