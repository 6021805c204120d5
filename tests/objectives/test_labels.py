"""The objectives of a task's head: their losses by hand, their rows, and what a run and a measurement make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl import commands, opened
from peftctl.batch import Batch, build
from peftctl.data.chat import Chat
from peftctl.errors import DataError, RecipeError, Stopped
from peftctl.evaluation import evaluate
from peftctl.objectives import get
from peftctl.objectives._labels import agreement, quality
from peftctl.plan import Options, plan
from peftctl.row import Example, Row, judged
from tests import runs

NAMES = ("classification", "regression", "token-classification")
TASKS = {name: "token-classification" if name.startswith("token") else "sequence-classification" for name in NAMES}


class Says:
    """A policy with the given scores."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def row_scores(self, batch: Batch) -> Tensor:
        return self.scores

    token_scores = row_scores


def loss(name: str, scores: Tensor, batch: Batch, **settings: Any) -> tuple[float, Any]:
    config = get(name).config(name=name, **settings)
    found = get(name).loss(Says(scores), None, batch, config)
    return float(found.terms[0].sum) / get(name).weights(batch, config)[0], found


def document(name: str, **blocks: Any) -> dict[str, Any]:
    model = blocks.pop("model", {}) | {"task": TASKS[name]}
    return runs.document("lora", name, model=model, **blocks)


def test_cross_entropy_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    batch = build([judged((3, 4), 0), judged((5,), 2, example=1)])
    value, found = loss("classification", scores, batch, labels=["a", "b", "c"])
    first = math.log(sum(map(math.exp, (2.0, 0.0, -1.0)))) - 2
    assert value == pytest.approx((first + math.log(3)) / 2)
    assert [float(x) for x in found.metrics["accuracy"]] == [1, 2]
    assert found.predictions[0].tolist() == [0, 0] and found.predictions[1].tolist() == [0, 2]
    smooth, _ = loss("classification", scores, batch, labels=["a", "b", "c"], label_smoothing=0.3)
    even = first + 2 - sum((2.0, 0.0, -1.0)) / 3  # -log of every label's probability, averaged
    assert smooth == pytest.approx((0.7 * first + 0.3 * even + math.log(3)) / 2)


def test_squared_error_by_hand() -> None:
    scores = torch.tensor([[1.0], [3.0]])
    value, found = loss("regression", scores, build([judged((3, 4), 0.5), judged((5,), -1.0, example=1)]))
    assert value == pytest.approx((0.25 + 16) / 2)
    assert [float(x) for x in found.metrics["absolute_error"]] == [4.5, 2]


def test_token_labels_weigh_the_same_in_rows_of_any_length() -> None:
    rows = [Row((3, 4, 5), (0.0, 1.0, 1.0), targets=(0, 1, 0)), Row((6, 7), (0.0, 1.0), 1, targets=(0, 1))]
    scores = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    value, found = loss("token-classification", scores, build(rows), labels=["no", "yes"])
    assert value == pytest.approx(sum(math.log1p(math.exp(x)) for x in (-1, 2, 3)) / 3)
    assert [float(x) for x in found.metrics["accuracy"]] == [1, 3]


def test_metrics_by_hand() -> None:
    said, true = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    found = quality(said.tolist(), true.tolist())
    # of 0, 1 and 2: precision 1/2, 1, 0 and recall 1/2, 2/3, 0
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1_macro"] == pytest.approx((0.5 + 0.8 + 0) / 3)
    pairs = list(zip(said.tolist(), true.tolist(), strict=True))
    both, n = sum(a == b for a, b in pairs), len(pairs)
    p, t = ([list(one).count(k) for k in range(3)] for one in zip(*pairs, strict=True))
    spread = [n * n - sum(x * x for x in counts) for counts in (p, t)]
    expected = (both * n - sum(x * y for x, y in zip(p, t, strict=True))) / math.sqrt(spread[0] * spread[1])
    assert found["matthews"] == pytest.approx(expected)
    assert quality([0] * 5, [0] * 5)["matthews"] == 0
    x, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 5.0])
    a, b = x - x.mean(), y - y.mean()
    found = agreement(x.tolist(), y.tolist())
    assert found["pearson"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-6)
    assert found["spearman"] == pytest.approx(0.5)
    assert agreement([1.0, 2.0], [3.0, 3.0]) == agreement([1.0], [2.0]) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize(("answers", "expected"), [(["b", "a", "b"], ["a", "b"]), (["10", "9", "x"], ["9", "10", "x"])])
def test_labels_are_those_of_the_rows(answers: list[str], expected: list[str]) -> None:
    objective = get("classification")
    examples = [Example("labelled", "", texts=("x",), answers=(answer,)) for answer in answers]
    config = objective.settle(objective.config(name="classification"), examples)
    assert objective.labels(config) == tuple(expected)
    named = objective.config(name="classification", labels=["z", "y"])
    assert objective.settle(named, examples) is named


def test_labels_are_found_by_name_or_number() -> None:
    objective, chat = get("classification"), Chat(runs.CONFIGS / "tokenizer")
    config = objective.config(name="classification", labels=["sad", "glad"])

    def target(answer: str) -> float:
        (row,) = objective.encode(Example("labelled", "", texts=("x y",), answers=(answer,)), chat, config)
        assert row.weights == (*(0.0,) * (len(row.ids) - 1), 1.0)
        return row.targets[-1]

    assert [target("glad"), target("0")] == [1, 0]
    with pytest.raises(
        DataError, match=r"label 'gald' is none of sad, glad; did you mean glad\?; see objective.labels"
    ):
        target("gald")
    with pytest.raises(DataError, match="label '2' is none of"):
        target("2")
    with pytest.raises(DataError, match="label 'x' is no number; objective classification tells names apart"):
        get("regression").encode(Example("labelled", "", texts=("x",), answers=("x",)), chat, None)


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = str(request.param)
    output = tmp_path_factory.mktemp(name) / "run"
    train = {"max_steps": 25, "batch_size": 8, "gradient_accumulation": 1, "eval_every": 25}
    runs.train(output, document(name, train=train, data={"limit": None}), verify=True)
    return name, output


def test_training_learns_its_rows(trained: tuple[str, Path]) -> None:
    name, output = trained
    losses = [event["loss"] for event in runs.events(output) if event["event"] == "step"]
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])
    wanted = {"pearson", "absolute_error"} if name == "regression" else {"accuracy", "f1_macro", "matthews"}
    (checked,) = [event for event in runs.events(output) if event["event"] == "evaluation"]
    assert {f"validation_{metric}" for metric in wanted} <= set(checked)


def test_a_file_is_measured_and_scored(trained: tuple[str, Path], tmp_path: Path) -> None:
    name, output = trained
    data = runs.data(name)
    thing = opened.open(opened.find(str(output)), device="cpu")
    found = evaluate(thing, data, output=tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    said = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [one["place"].rsplit(":", 1)[1] for one in said] == [str(n) for n in range(1, len(rows) + 1)]
    if name == "classification":
        right = sum(one["label"] == str(row["label"]) for one, row in zip(said, rows, strict=True))
        assert found["accuracy"] == right / len(rows)
    elif name == "regression":
        errors = [(one["scores"]["value"] - row["label"]) ** 2 for one, row in zip(said, rows, strict=True)]
        assert found["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    else:
        pairs = [
            (a, str(b))
            for one, row in zip(said, rows, strict=True)
            for a, b in zip(one["tags"], row["tags"], strict=True)
        ]
        assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_the_labels_are_written_beside_the_adapter(trained: tuple[str, Path]) -> None:
    from transformers import AutoConfig

    name, output = trained
    names = ["value"] if name == "regression" else ["0", "1"]
    config = AutoConfig.from_pretrained(output / "adapter")
    assert config.id2label == dict(enumerate(names)) and config.label2id == {n: i for i, n in enumerate(names)}
    recipe = json.loads((output / "run.json").read_text())["recipe"]
    assert name == "regression" or recipe["objective"]["labels"] == names


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    contents = document(name, train={"save_every": 1})
    runs.train(tmp_path / "whole", contents)
    with runs.stopped_after(2, tmp_path / "cut"), pytest.raises(Stopped):
        runs.train(tmp_path / "cut", contents)
    runs.train(tmp_path / "cut", contents, resume=True)
    assert runs.bits(tmp_path / "cut") == runs.bits(tmp_path / "whole")


def test_four_micro_batches_of_one_are_one_of_four(tmp_path: Path) -> None:
    # of tokens they are not: transformers' head of that kind has dropout, which draws by batch
    found = []
    for size, parts in ((4, 1), (1, 4)):
        train = {"batch_size": size, "gradient_accumulation": parts, "max_steps": 3, "optimizer": "sgd"}
        runs.train(tmp_path / f"run{size}", document("classification", train=train))
        found.append(runs.adapter(tmp_path / f"run{size}"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)


def test_the_head_is_counted_before_anything_is_loaded(tmp_path: Path) -> None:
    path = runs.written(tmp_path / "run", document("classification"))
    counts = commands.count_params(path, [], None, None, "module", False)
    config = json.loads((runs.CONFIGS / "models" / "tiny-llama.json").read_text())
    assert counts["saved_modules"] == 2 * config["hidden_size"] == counts["by_module"]["score"]
    plain = commands.count_params(runs.written(tmp_path / "sft", runs.document()), [], None, None, None, False)
    tied = config.get("tie_word_embeddings", False)
    head = 0 if tied else config["hidden_size"] * config["vocab_size"]
    assert counts["base"] == plain["base"] - head and counts["adapter"] == plain["adapter"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "data.train: every label is 'x'"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": ["y"]}],
            "rows.jsonl:2: label must be a text; found list",
        ),
        ([{"text": " ", "label": "x"}, {"text": "b", "label": "y"}], "rows.jsonl:1: text is empty"),
        ([{"prompt": "a", "completion": "b"}], "has prompts with completions"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_before_training(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": None}
    recipe = runs.loaded(tmp_path / "run", document("classification", data=data, train={"eval_every": None}))
    with pytest.raises(DataError) as caught:
        plan(recipe, Options())
    assert said in str(caught.value) and not (tmp_path / "run").exists()


def test_held_out_labels_must_be_known(tmp_path: Path) -> None:
    for name, labels in (("rows", ("x", "y")), ("held", ("x", "z"))):
        lines = [json.dumps({"text": f"t {label}", "label": label}) for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "held.jsonl")}
    with pytest.raises(DataError, match=r"held\.jsonl:2: label 'z' is none of x, y; see objective.labels"):
        plan(runs.loaded(tmp_path / "run", document("classification", data=data)), Options())


def test_a_label_twice_is_told_at_its_place(tmp_path: Path) -> None:
    contents = document("classification") | {"objective": {"name": "classification", "labels": ["a", "b", "a"]}}
    with pytest.raises(RecipeError, match=r"objective\.labels.*'a' stands there twice"):
        runs.loaded(tmp_path / "run", contents)


def test_labels_of_several_sources_come_together(tmp_path: Path) -> None:
    for name, column in (("one", "label"), ("two", "kind")):
        rows = [{"text": f"{name} {k}", column: f"{name}{k}"} for k in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(tmp_path / "one.jsonl"), {"path": str(tmp_path / "two.jsonl"), "columns": {"label": "kind"}}]
    data = {"train": sources, "validation": None}
    planned = plan(
        runs.loaded(tmp_path / "run", document("classification", data=data, train={"eval_every": None})), Options()
    )
    assert planned.recipe.objective.model_dump()["labels"] == ["one0", "one1", "two0", "two1"]
    assert planned.counts.saved_modules == 4 * planned.skeleton.dimensions.hidden


def test_labels_of_a_data_set_on_a_hub_must_be_named(tmp_path: Path) -> None:
    data = {"train": {"hub": "some/set"}, "validation": None}
    recipe = runs.loaded(tmp_path / "run", document("classification", data=data, train={"eval_every": None}))
    with pytest.raises(DataError, match=r"objective\.labels: name the labels of some/set"):
        plan(recipe, Options())
