"""Answers to held-out prompts: those of transformers' own greedy decoding, compared as the libraries compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score import rouge_scorer

from peftctl import answered, commands, metrics, objectives, opened, trainer
from peftctl.answered import answering
from peftctl.data.batches import each_once
from peftctl.data.chat import Chat
from peftctl.data.dataset import load
from peftctl.distributed import World
from peftctl.errors import InputError, RecipeError, Stopped
from peftctl.evaluation import evaluate
from peftctl.gathered import gathered
from peftctl.objectives.base import Loss, Term
from peftctl.opened import Opened
from peftctl.plan import Options, plan
from peftctl.reading import reading_of
from peftctl.row import Example, Message
from peftctl.trainer import Question
from tests import runs
from tests.test_distributed import trained

ASKED = [
    ("red", "a rose and a cherry"),
    ("blue", "the sky and the sea"),
    ("green", "a leaf, the grass"),
    ("white", "snow and a page of paper"),
    ("black", "a raven at night"),
    ("grey", "rain, a stone and a mouse"),
]
NAMES = [*metrics.NAMES]
BART: dict[str, Any] = {
    "architectures": ["BartForConditionalGeneration"],
    "model_type": "bart",
    "is_encoder_decoder": True,
    **{"vocab_size": 260, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.2, "dropout": 0.0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "decoder_start_token_id": 3},
    **{"max_position_embeddings": 128, "forced_eos_token_id": None},
}


def rows(path: Path, kind: str) -> str:
    lines: list[dict[str, Any]] = [{"prompt": f"{a}: ", "completion": b} for a, b in ASKED]
    if kind == "messages":
        first = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in ASKED]
        lines = [{"messages": [*first * (k % 2), *turn]} for k, turn in enumerate(turns)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def document(folder: Path, kind: str = "completion", model: str = "tiny-llama", **blocks: Any) -> dict[str, Any]:
    """A run that learns its held-out rows by heart, so that some answers are right in part after a while."""
    own = BART if model == "bart" else json.loads((runs.CONFIGS / "models" / f"{model}.json").read_text())
    wide = {"initializer_range": 0.2} if "initializer_range" in own else {}
    (folder / f"{model}.json").write_text(json.dumps(own | wide))
    task = {"task": "seq2seq-lm"} if own.get("is_encoder_decoder") else {}
    file = rows(folder / f"{kind}.jsonl", kind)
    train: dict[str, Any] = {"max_steps": 24, "batch_size": 6, "gradient_accumulation": 1}
    train["learning_rate"] = 0.003 if model == "bart" else 0.01
    plain = runs.document(
        "full",
        "sft",
        model={"name": str(folder / f"{model}.json"), **task},
        objective={"metrics": NAMES, "max_new_tokens": 30},
        data={"train": file, "validation": file, "limit": None},
        train=train | {"eval_every": 8, "schedule": "constant"},
    )
    return {key: plain[key] | blocks.get(key, {}) for key in plain}


def evaluations(output: Path) -> list[dict[str, float]]:
    found = [event for event in runs.events(output) if event["event"] == "evaluation"]
    return [{key.removeprefix("validation_"): value for key, value in one.items()} for one in found]


def open_(path: Path) -> Opened:
    return opened.open(opened.find(str(path)), device="cpu")


@torch.no_grad()
def by_transformers(thing: Opened, prompt: Sequence[int]) -> str:
    """The greedy answer of the model by itself, its deltas on it."""
    ids = torch.tensor([list(prompt)])
    found = thing.policy.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=list(thing.chat.eos_ids),
        pad_token_id=thing.chat.eos,
    )
    start = 1 if thing.policy.model.config.is_encoder_decoder else ids.shape[1]
    return thing.chat.decode(found[0, start:].tolist())


def prompts(thing: Opened, kind: str) -> list[tuple[int, ...]]:
    """What is asked, from the data alone."""
    if kind == "completion":
        return [thing.chat.prompt(f"{a}: ") for a, _ in ASKED]
    first = [Message("user", "?"), Message("assistant", "!")]
    return [thing.chat.render_prompt([*first * (k % 2), Message("user", a)]) for k, (a, _) in enumerate(ASKED)]


def by_hand(said: list[str]) -> dict[str, float]:
    right = [b for _, b in ASKED]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(b, a) for a, b in zip(said, right, strict=True)]
    found = {name: sum(one[name].fmeasure for one in scores) / len(said) for name in ("rouge1", "rouge2", "rougeL")}
    stripped = [text.strip() for text in said]
    found |= {"exact_match": sum(a == b for a, b in zip(stripped, right, strict=True)) / len(said)}
    found |= {
        "bleu": sacrebleu.corpus_bleu(stripped, [right]).score,
        "chrf": sacrebleu.corpus_chrf(stripped, [right]).score,
    }
    return found


CASES = [("messages", "tiny-llama"), ("completion", "tiny-t5"), ("completion", "bart")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind, model = request.param
    folder = tmp_path_factory.mktemp(model)
    runs.train(folder / "run", document(folder, kind, model))
    return kind, folder / "run"


def test_what_a_run_measures_is_what_the_libraries_say_of_transformers_answers(run: tuple[str, Path]) -> None:
    kind, output = run
    thing = open_(output)
    said = [by_transformers(thing, prompt) for prompt in prompts(thing, kind)]
    last = evaluations(output)[-1]
    expected = by_hand(said)
    assert {name: last[name] for name in NAMES} == pytest.approx(expected, rel=1e-9)
    assert 0 < last["rougeL"] and 0 < last["bleu"], said  # or nothing was compared
    assert last["completions/length"] > 1 and 0 <= last["completions/ended"] <= 1
    assert len({one["chrf"] for one in evaluations(output)}) > 1
    assert all("bleu" not in event for event in runs.events(output) if event["event"] == "step")


def test_a_file_is_measured_the_same_and_its_answers_are_written(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, output = run
    thing, file = open_(output), output.parent / f"{kind}.jsonl"
    reading = reading_of(str(output), file)
    assert reading.keys["metrics"] == NAMES and reading.keys["max_new_tokens"] == 30
    found = evaluate(thing, file, reading, output=tmp_path / "answers.jsonl")
    last = evaluations(output)[-1]
    assert {name: found[name] for name in (*NAMES, *metrics.LENGTHS)} == {
        name: last[name] for name in (*NAMES, *metrics.LENGTHS)
    }
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in written] == [b for _, b in ASKED]
    assert [one["place"] for one in written] == [f"{file.name}:{n}" for n in range(1, 7)] or written[0][
        "place"
    ].endswith(":1")
    assert [one["generated"] for one in written] == [by_transformers(thing, prompt) for prompt in prompts(thing, kind)]
    assert sum(one["rougeL"] for one in written) / 6 == pytest.approx(found["rougeL"])
    assert not {"bleu", "chrf"} & written[0].keys()
    plain = evaluate(thing, file, reading_of(str(output), file, asked=["none"]))
    assert not {*NAMES, *metrics.LENGTHS} & plain.keys() and plain["loss"] == found["loss"]


def test_micro_batches_change_nothing(run: tuple[str, Path]) -> None:
    kind, output = run
    thing, objective = open_(output), objectives.get("sft")
    config = objective.config(name="sft", metrics=NAMES, max_new_tokens=30)
    dataset, _ = load(output.parent / f"{kind}.jsonl", thing.chat, objective, config)
    asked = answering(objective, config, thing.policy, thing.chat, thing.found.base.positions)
    question, padded = Question(asked, config, thing.policy), thing.policy.layout.name == "padded"
    last = evaluations(output)[-1]
    for tokens in (1, 100):
        found = trainer.evaluate(question, each_once(dataset, padded=padded, tokens=tokens), "cpu")
        assert found is not None
        assert {name: found[name] for name in NAMES} == {name: last[name] for name in NAMES}


class Other(World):
    """A process that has been heard as JSON; `others` were heard before."""

    def __init__(self, others: Sequence[Any] = ()) -> None:
        self.others = others
        self.said: Any = None

    def gather(self, document: Any) -> list[Any]:
        self.said = json.loads(json.dumps(document))
        return [self.said, *self.others]


def test_answers_of_several_processes_are_put_together_in_their_order() -> None:
    def loss(*texts: str) -> Loss:
        return Loss((Term(torch.tensor(1.0)),), {}, (texts, [text.upper() for text in texts]))

    other = Other()
    gathered({1: loss("c"), 3: loss("f", "g")}, other)
    found = gathered({0: loss("a", "b"), 2: loss("d", "e")}, Other([other.said]))
    said, right = ("".join(text for one in found for text in one.predictions[side]) for side in (0, 1))
    assert (said, right) == ("abcdefg", "ABCDEFG")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    contents = document(tmp_path, train={"max_steps": 8, "gradient_accumulation": 2, "batch_size": 3})
    runs.train(tmp_path / "one", contents)
    assert trained(runs.written(tmp_path / "two", contents)) == [0, 0]
    assert runs.untimed(tmp_path / "two") == runs.untimed(tmp_path / "one")


def test_the_best_by_its_answers_resumed_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    watched = {
        "best_by": "rougeL",
        "keep_best": True,
        # once the answers are known by heart none are better, if they do not get worse before
        "early_stopping": 2,
        "eval_every": 6,
        "save_every": 1,
        "max_steps": 300,
    }
    contents = document(tmp_path, model="tiny-t5", train=watched)
    whole = runs.train(tmp_path / "whole", contents)
    scores = {one["step"]: one["rougeL"] for one in evaluations(tmp_path / "whole")}
    assert whole["best"] == {"step": max(scores, key=scores.__getitem__), "rougeL": max(scores.values())}
    assert len(set(scores.values())) > 2 and whole["best"]["step"] < whole["steps"] < 300
    with runs.stopped_after(whole["best"]["step"] + 1, tmp_path / "cut"), pytest.raises(Stopped):
        runs.train(tmp_path / "cut", contents)
    assert runs.train(tmp_path / "cut", contents, resume=True)["best"] == whole["best"]
    assert runs.untimed(tmp_path / "cut") == runs.untimed(tmp_path / "whole")
    assert runs.bits(tmp_path / "cut") == runs.bits(tmp_path / "whole")


def test_no_answer_is_longer_than_the_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = document(tmp_path, model="tiny-gpt2")
    own = json.loads((tmp_path / "tiny-gpt2.json").read_text())
    (tmp_path / "tiny-gpt2.json").write_text(json.dumps(own | {"n_positions": 40}))
    seen: list[tuple[int, int]] = []
    sample = answered.sample

    def watched(policy: Any, prompts: Any, *args: Any, **keys: Any) -> Any:
        found = sample(policy, prompts, *args, **keys)
        seen.extend((len(prompt), len(answer)) for prompt, answer in zip(prompts, found, strict=True))
        return found

    monkeypatch.setattr(answered, "sample", watched)
    contents["objective"]["max_new_tokens"] = 500
    runs.train(tmp_path / "run", contents | {"train": contents["train"] | {"max_steps": 1}})
    assert max(prompt + answer for prompt, answer in seen) == 40


def encoded(messages: Sequence[tuple[str, str, float | None]], **keys: Any) -> Any:
    objective, chat = objectives.get("sft"), Chat(runs.CONFIGS / "tokenizer")
    turns = tuple(Message(role, text, weight) for role, text, weight in messages)
    (row,) = objective.encode(
        Example("messages", "", turns), chat, objective.config(name="sft", **{"metrics": ["bleu"], **keys})
    )
    return chat, row


def test_the_last_answer_that_is_learnt_is_asked_for() -> None:
    talk = [("user", "a b", None), ("assistant", "c d", None), ("user", "e", None), ("assistant", "f g", None)]
    for keys in ({}, {"trained": "last"}, {"trained": ["user", "assistant"]}):
        chat, row = encoded(talk, **keys)
        prompt = answered._prompt(row)
        assert prompt == chat.render_prompt([Message(role, text) for role, text, _ in talk[:3]])
        assert row.extra["answer"] == "f g"
    chat, row = encoded([*talk[:3], ("assistant", "f g", 0.0)])
    assert row.extra["answer"] == "c d"
    assert answered._prompt(row) == chat.render_prompt([Message("user", "a b")])
    assert "asked" not in encoded([("assistant", "c d", None), ("user", "e", None)])[1].extra  # nothing before it
    assert not encoded(talk, metrics=[])[1].extra


def refused(folder: Path, **blocks: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan(runs.loaded(folder / "run", document(folder, **blocks)), Options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_makes_no_sense_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"data": {"validation": None}, "train": {"eval_every": None}}
    assert "objective.metrics has no held-out rows to answer: set data.validation" in refused(tmp_path, **none)
    assert "data.truncate right cuts off answers" in refused(tmp_path, data={"truncate": "right"})
    assert "trained: all does not tell from the rest" in refused(tmp_path, objective={"trained": "all"})
    assert "there is no metric 'rouge'; did you mean rouge" in refused(tmp_path, objective={"metrics": ["rouge"]})
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    raw = {"train": str(tmp_path / "text.jsonl"), "validation": 0.5}
    assert "has a prompt to answer" in refused(tmp_path, data=raw)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    said = refused(tmp_path)
    assert "run.yaml:" in said and said.endswith("not installed: pip install rouge-score")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with weights: a run's own."""
    output = tmp_path_factory.mktemp("base") / "run"
    runs.train(output, runs.document(train={"max_steps": 1}))
    return str(output / "base")


REPORTS: dict[str, list[dict[str, Any]]] = {
    "sft": [{}, {"label_smoothing": 0.1}, {"metrics": ["chrf", "rouge2"], "max_new_tokens": 2}],
    "dpo": [{}, {"sft_weight": 0.5}],
    "grpo": [{}, {"beta": 0.0}, {"rewards": [{"name": "json"}, {"name": "json", "weight": 2.0}]}],
    "kto": [{}, {"sft_weight": 0.5}],
}


@pytest.mark.parametrize(
    ("name", "keys"), [(name, keys) for name in objectives.names() for keys in REPORTS.get(name, [{}])], ids=str
)
def test_what_an_objective_says_that_it_reports_is_what_it_reports(
    name: str, keys: dict[str, Any], tmp_path: Path, base: str
) -> None:
    model = {"name": base, "task": objectives.get(name).task}
    train = {"max_steps": 1, "eval_every": 1, "gradient_accumulation": 1}
    contents = runs.document("lora", name, model=model, objective=keys, train=train)
    runs.train(tmp_path / "run", contents)
    (found,) = evaluations(tmp_path / "run")
    config = runs.loaded(tmp_path / "run", contents).objective
    told = {*objectives.get(name).reports(config)}
    assert {*found} - {"event", "step", "seconds", "tokens"} == told | {"loss"}
    with pytest.raises(
        RecipeError, match=rf"run\.yaml:.*train\.best_by is colour, which {name} does not report; there is loss, "
    ):
        runs.loaded(tmp_path / "run", contents | {"train": train | {"best_by": "colour"}})


def test_a_metric_that_is_never_reported_is_refused_with_what_may_be_meant(tmp_path: Path) -> None:
    def told(objective: dict[str, Any], best_by: str) -> str:
        contents = runs.document(objective=objective, train={"best_by": best_by})
        with pytest.raises(RecipeError) as caught:
            commands.validate(runs.written(tmp_path / "run", contents), [], False, 0)
        return str(caught.value)

    assert (
        "train.best_by is token_acuracy, which sft does not report; did you mean token_accuracy?; there is loss"
        in told({}, "token_acuracy")
    )
    assert told({}, "rougeL").endswith(
        "train.best_by is rougeL, which is measured where objective.metrics names it: add it there"
    )
    assert "did you mean rougeL?" in told({"metrics": ["rougeL"]}, "rougel")
    for name in ("rougeL", "validation_rougeL", "token_accuracy"):
        runs.loaded(tmp_path / "run", runs.document(objective={"metrics": ["rougeL"]}, train={"best_by": name}))
