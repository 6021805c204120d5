"""A file that is measured for a run is read as the run's recipe read its data, where no option says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftctl import cli, metrics, opened, recipe, run_folder
from peftctl.errors import DataError, InputError
from peftctl.evaluation import evaluate
from peftctl.reading import PLAIN, Reading, reading_of
from tests import runs

# a template that is told the day, and the system prompt
TEMPLATE = (
    "{{ strftime_now('%d %B %Y') }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def document(folder: Path, **blocks: Any) -> dict[str, Any]:
    """A recipe whose data nothing but its own keys makes sense of."""
    turns = [
        {"instruction": "say " + "so " * k, "output": f"so {k}", "q": f"tell {k} " + "me " * 3 * k, "a": f"well {k}"}
        for k in range(9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    (folder / "told.jinja").write_text(TEMPLATE)
    data = {
        "train": str(folder / "rows.jsonl"),
        "validation": {"path": str(folder / "rows.jsonl")},
        "columns": {"instruction": "q", "output": "a"},
        "format": "alpaca",
        "truncate": "left",
        "max_length": 60,
        "system": "Be brief.",
        "chat_template": str(folder / "told.jinja"),
        "limit": None,
    }
    plain = runs.document(data=data, objective={"trained": "last"}, train={"max_steps": 2})
    return {key: plain[key] | blocks.get(key, {}) for key in plain}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another day."""
    output = tmp_path_factory.mktemp("reading") / "run"
    with pytest.MonkeyPatch.context() as patch:
        moment = run_folder.datetime.fromisoformat("2021-02-03T04:05:06")
        patch.setattr(run_folder.RunFolder, "now", lambda self: moment)
        runs.train(output, document(output.parent))
    return output


def measured(output: Path, reading: Reading) -> dict[str, Any]:
    thing = opened.open(opened.find(str(output)), device="cpu")
    return evaluate(thing, output.parent / "rows.jsonl", reading)


def test_the_loss_is_the_runs_own_on_the_same_rows(run: Path) -> None:
    reading = reading_of(str(run), run.parent / "rows.jsonl")
    found = measured(run, reading)
    last = next(event for event in reversed(runs.events(run)) if event["event"] == "evaluation")
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert found["token_accuracy"] == last["validation_token_accuracy"]
    assert found["truncated"] > 2 and reading.keys["trained"] == "last"
    # each of these tells
    for changed in ({"now": None}, {"max_length": 90}, {"columns": None}):
        assert measured(run, reading._replace(**changed))["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_an_option_says_otherwise(run: Path) -> None:
    def asked(**given: Any) -> Reading:
        return reading_of(str(run), "other.jsonl", **given)

    assert asked()[:5] == ("alpaca", {"instruction": "q", "output": "a"}, 60, "left", "error")
    assert asked(format="auto", columns=["output=a"], max_length=7, truncate="refuse")[:4] == (
        *("auto", {"output": "a"}, 7, "refuse"),
    )
    assert asked(asked=["rougeL,bleu", "bleu"], max_new_tokens=3).keys == {
        **{"trained": "last", "metrics": ["rougeL", "bleu"], "max_new_tokens": 3}
    }
    assert asked(asked=["none"]).keys["metrics"] == []
    assert reading_of(str(run / "adapter"), "other.jsonl") == PLAIN


def test_a_source_of_its_own_is_read_as_that_source(tmp_path: Path) -> None:
    def told(file: str, *sources: Any, objective: str = "sft") -> tuple[str, Any]:
        contents = runs.document("lora", objective, data={"train": list(sources), "columns": {"completion": "a"}})
        (tmp_path / "recipe.yaml").write_text(recipe.resolved(runs.loaded(tmp_path / "run", contents)))
        (tmp_path / "run.json").write_text("{}")
        return reading_of(str(tmp_path), tmp_path / file)[:2]

    one, two = ({"path": str(tmp_path / f"{n}.jsonl"), "columns": {"completion": n}} for n in "bc")
    assert told("b.jsonl", one, two) == ("auto", {"completion": "b"})
    assert told("c.jsonl", one, two | {"format": "completion"}) == ("completion", {"completion": "c"})
    assert told("d.jsonl", one, two) == ("auto", {"completion": "a"})  # those of data
    assert told("d.jsonl", one, one | {"path": str(tmp_path / "e.jsonl")}) == ("auto", {"completion": "b"})
    assert told("d.jsonl", str(tmp_path / "b.jsonl"), objective="dpo") == ("auto", None)  # of pairs there is no loss


def test_what_makes_no_sense_is_told_before_a_model_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**given: Any) -> str:
        with pytest.raises(InputError) as caught:
            reading_of(str(run), "rows.jsonl", **given)
        return str(caught.value)

    assert told(columns=["answer"]) == "--column answer: write our name, then the file's, as completion=answer"
    assert told(truncate="lift").endswith("refuse, left, right, split is meant; did you mean left?")
    assert told(asked=["rougeL"], truncate="right").startswith("--metrics compares whole answers")
    assert told(asked=["blue"]).startswith("--metrics: there is no metric 'blue'; did you mean bleu? there are")
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert told(asked=["bleu"]).endswith("not installed: pip install sacrebleu")


def test_what_the_file_lacks_is_told_with_who_asked_for_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n')
    thing = opened.open(opened.find(str(run)), device="cpu")
    with pytest.raises(
        DataError, match=r"no column 'q'.*recipe\.yaml says so, and --column OURS=THEIRS says otherwise$"
    ):
        evaluate(thing, tmp_path / "rows.jsonl", reading_of(str(run), "rows.jsonl"))
    asked = Reading(keys={"metrics": ["bleu"]})
    with pytest.raises(DataError, match=r"text\.jsonl: no row has a prompt to answer; leave --metrics out"):
        evaluate(thing, tmp_path / "text.jsonl", asked)
    with pytest.raises(InputError, match="--metrics has answers to write"):
        evaluate(thing, tmp_path / "rows.jsonl", output=tmp_path / "answers.jsonl")
    with pytest.raises(InputError, match="--metrics: metrics compare answers, which trained: all"):
        evaluate(thing, tmp_path / "rows.jsonl", Reading(keys={"metrics": ["bleu"], "trained": "all"}))


def test_by_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run), "--data", str(run.parent / "rows.jsonl"), "--quiet", "--json"]
    words += ["--metrics", "exact_match,rouge1", "--max-new-tokens", "4", "--output", str(tmp_path / "answers.jsonl")]
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert {"loss", "perplexity", "exact_match", "rouge1", "truncated"} <= found.keys()
    assert 0 < found["completions/length"] <= 4
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in written] == [f"well {k}" for k in range(9)]
    assert set(written[0]) == {"place", "generated", "answer", "ended", "exact_match", "rouge1"}


def test_a_head_generates_no_answers(tmp_path: Path) -> None:
    contents = runs.document("lora", "reward", model={"task": "sequence-classification"}, train={"max_steps": 1})
    runs.train(tmp_path / "run", contents)
    thing = opened.open(opened.find(str(tmp_path / "run")), device="cpu")
    with pytest.raises(InputError, match="--metrics: a model with a head of a task generates no answers"):
        evaluate(thing, runs.data("reward"), Reading(keys={"metrics": ["bleu"]}))
