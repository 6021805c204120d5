"""Recipes: every mistake is told in one go and blamed on where it was written; what is read is written back."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl import composed, located, methods, objectives, recipe
from peftctl.base import SMALL_VALUES
from peftctl.errors import RecipeError
from peftctl.schema import Recipe
from tests.cost import seconds_of_children

ROOT = Path(__file__).parent.parent
GOOD = """\
model: {name: org/model}
method: {name: lora}
objective: {name: sft}
data: {train: rows.jsonl}
output: runs/x
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str, name: str = "r.yaml") -> Recipe:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return recipe.load(Path(name), overrides)


def refusals(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


@pytest.mark.fault(31)
def test_every_problem_comes_in_one_go_at_its_place() -> None:
    text = """\
model: {name: 3, revison: x}
method: {name: lora, rank: -1, dropout: 1, target_modules: []}
objective: {name: dpo, beta: .inf}
data: {train: rows.jsonl, validation: 1.5, columns: {a: 1}}
train:
  lerning_rate: 1e-4
  batch_size: true
  betas: [0.9, .nan]
  learning_rate: .inf
  schedule: cosin
  gradient_checkpointing: yes
  max_steps: 1.0
modle: 3
"""
    assert refusals(text) == [
        "r.yaml:1:1: output is missing: the run's folder",
        "r.yaml:1:15: model.name is 3; text is meant (put it in quotes)",
        "r.yaml:1:18: model.revison is not a key; did you mean revision?",
        "r.yaml:2:28: method.rank is -1; a number at least 1 is meant",
        "r.yaml:2:41: method.dropout is 1; a number below 1.0 is meant",
        "r.yaml:2:60: method.target_modules is []; text or something not empty is meant",
        "r.yaml:3:30: objective.beta is inf; a finite number is meant",
        "r.yaml:4:39: data.validation is 1.5; a number below 1.0 or text or a mapping or a list is meant",
        "r.yaml:4:57: data.columns.a is 1; text is meant (put it in quotes)",
        "r.yaml:6:3: train.lerning_rate is not a key; did you mean learning_rate?",
        "r.yaml:7:15: train.batch_size is true; an integer is meant",
        "r.yaml:8:16: train.betas.1 is nan; a finite number is meant",
        "r.yaml:9:18: train.learning_rate is inf; a finite number is meant",
        "r.yaml:10:13: train.schedule is 'cosin'; constant, linear or cosine is meant; did you mean cosine?",
        "r.yaml:11:27: train.gradient_checkpointing is 'yes'; true or false is meant",
        "r.yaml:12:14: train.max_steps is 1.0; an integer is meant",
        "r.yaml:13:1: modle is not a key of a recipe; did you mean model?",
    ]


@pytest.mark.parametrize("block", ["model", "method", "objective", "data", "train"])
@pytest.mark.fault(31)
def test_an_unknown_key_is_refused_in_every_block(block: str) -> None:
    found = refusals(GOOD, f"{block}.zzz=1")
    assert len(found) == 1 and found[0].startswith(f"--set {block}.zzz=1: {block}.zzz is not a key; there are ")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=true", "train.learning_rate is true; a number is meant"),
        ("train.seed=-1", "train.seed is -1; a number at least 0 is meant"),
        ("train.max_steps=null", ""),
        ("train.tokens_per_batch=0", "train.tokens_per_batch is 0; a number at least 1 is meant"),
        ("train.tokens_per_batch=null", ""),
        ("data.bucket=0", "data.bucket is 0; a number at least 1 is meant"),
        ("data.bucket=8", ""),
        ("method.alpha=.nan", "method.alpha is nan; a finite number is meant"),
        ("method.alpha=true", "method.alpha is true; a number is meant"),
        ("method.rank=4.0", "method.rank is 4.0; an integer is meant"),
        ("method.rank=null", "method.rank is null; an integer is meant"),
        ("method.target_modules=[q, 1]", "method.target_modules.1 is 1; text is meant (put it in quotes)"),
        ("method=lora", "method.name is missing: one of "),
        ("method.name=lroa", "method.name: there is no method 'lroa'; did you mean lora?"),
        ("method.name=[a]", "method.name: there is no method ['a']; there is " + ", ".join(methods.names())),
        ("model=x", "model is 'x'; a mapping is meant"),
        ("train=[1]", "train is [1]; a mapping is meant"),
        ("data.train=", "data.train is null; text or a mapping or a list is meant"),
        ("data.train=[]", "data.train is []; text or a mapping or something not empty is meant"),
        ("data.train=[a.csv, 3]", "data.train.1 is 3; text or a mapping is meant"),
        ("data.train={path: a.csv, wieght: 2}", "data.train.wieght is not a key; did you mean weight?"),
        ("data.train=[a.csv, {path: b.csv, wieght: 2}]", "data.train.1.wieght is not a key; did you mean weight?"),
        (
            "data.train=[a.csv, {weight: 2}]",
            "data.train.1: path is missing: a data file, a folder or a pattern of files",
        ),
        ("data.train=[{path: a.csv, weight: 0}, a.csv]", "data.train.0.weight is 0; a number above 0.0 is meant"),
        (
            "data.train=[{path: a.csv, weight: 1}, a.csv]",
            "data.train has a weight for some sources only: give every one",
        ),
        ("data.train={path: a.csv, weight: 1}", "data.train has a weight, but no other source: leave it out"),
        ("data.validation=[{path: a.csv, weight: 1}, a.csv]", "data.validation has weights: held-out rows are each"),
        ("data.train=[{path: a.csv, format: unpaired}]", "data.train.0.format unpaired does not suit objective"),
        ("data.train=[{path: a.csv, weight: 1}, {path: b.csv, weight: 2}]", ""),
        ('output=""', "output is a folder"),
        ("output=3", "output is a folder"),
        ("train.max_steps=" + "9" * 5000, "train.max_steps is inf; an integer is meant"),
        ("data.train=" + "a" * 5000, ""),
        ("data.train=~nobody-of-that-name/rows.jsonl", ""),
        ('data.train="\\0"', "holds a null character or half a surrogate pair: leave it out"),
        ("extends=other.yaml", "extends can only be written in a file"),
        ("train.betas=[1", "is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("train.seed=1\ntrain: 2", "is not YAML: mapping values are not allowed here"),
        ("nonsense", "is not KEY=VALUE, as in --set train.max_steps=10"),
        ("=3", "is not KEY=VALUE, as in --set train.max_steps=10"),
        ("train..seed=3", "is not KEY=VALUE, as in --set train.max_steps=10"),
    ],
)
def test_a_value_of_set_is_blamed_on_the_option(override: str, said: str) -> None:
    if not said:
        load(GOOD, override)
        return
    found = refusals(GOOD, override)
    assert "\n".join(found).startswith(f"--set {override}: {said}") and len(found) == 1 + override.count("\n")


def test_set_is_typed_as_the_file_is() -> None:
    overrides = ["method.target_modules=[q_proj, v_proj]", "train.learning_rate=1e-3", "train.betas=[0.5,0.9]"]
    found = load(GOOD, *overrides, "train.max_steps=7", "data.share_starts=false", "model.revision='12'")
    assert found.model_dump()["method"]["target_modules"] == ["q_proj", "v_proj"]
    assert (found.train.learning_rate, found.train.betas, found.train.max_steps) == (1e-3, [0.5, 0.9], 7)
    assert found.data.share_starts is False and found.model.revision == "12"
    assert load(GOOD, "train.seed=1", "train.seed=2").train.seed == 2


def test_extends_merges_deep_and_later_wins() -> None:
    Path("a.yaml").write_text("train: {seed: 1, batch_size: 2, keep: 3}\n")
    Path("b.yaml").write_text("extends: a.yaml\ntrain: {batch_size: 4}\n")
    Path("c.yaml").write_text("train: {keep: 5}\n")
    one = load("extends: b.yaml\n" + GOOD).train
    assert (one.seed, one.batch_size, one.keep) == (1, 4, 3)
    several = load("extends: [c.yaml, b.yaml]\ntrain: {seed: 9}\n" + GOOD).train
    assert (several.seed, several.batch_size, several.keep) == (9, 4, 3)
    assert load("extends: [b.yaml, c.yaml]\n" + GOOD, "train.keep=6").train.keep == 6


def test_another_method_replaces_the_block_and_the_same_one_adds_to_it() -> None:
    Path("a.yaml").write_text("method: {name: lora, rank: 3, alpha: 4}\n")
    same = load("extends: a.yaml\n" + GOOD.replace("{name: lora}", "{rank: 5}")).model_dump()["method"]
    assert (same["name"], same["rank"], same["alpha"]) == ("lora", 5, 4)
    other = load("extends: a.yaml\n" + GOOD.replace("lora", "bitfit")).method
    assert other.name == "bitfit"
    assert load(GOOD, "method.name=prefix").method.name == "prefix"


def test_a_value_of_extends_is_blamed_where_it_was_written() -> None:
    Path("a.yaml").write_text("\ntrain:\n  keep: 0\n")
    assert refusals("extends: a.yaml\n" + GOOD) == ["a.yaml:3:9: train.keep is 0; a number at least 1 is meant"]
    assert load("extends: a.yaml\ntrain: {keep: 1}\n" + GOOD).train.keep == 1


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("none.yaml", "r.yaml:1:10: extends: there is no file none.yaml"),
        ("[a.yaml, none.yaml]", "r.yaml:1:19: extends: there is no file none.yaml"),
        ("r.yaml", "r.yaml:1:10: extends: a circle, r.yaml -> r.yaml"),
        ("b.yaml", "b.yaml:2:10: extends: a circle, r.yaml -> b.yaml -> r.yaml"),
        ("3", "r.yaml:1:10: extends is a file or a list of files"),
        ("[[a.yaml]]", "r.yaml:1:11: extends is a file or a list of files"),
        ("folder", "folder: cannot be read: Is a directory"),
    ],
)
def test_extends_that_cannot_be_followed(extends: str, said: str) -> None:
    Path("a.yaml").write_text("train: {seed: 1}\n")
    Path("b.yaml").write_text("\nextends: r.yaml\n")
    Path("folder").mkdir()
    assert refusals(f"extends: {extends}\n" + GOOD) == [said]


def test_paths_are_meant_from_where_they_are_written(tmp_path: Path) -> None:
    Path("shared").mkdir()
    Path("shared/a.yaml").write_text("data: {validation: held.jsonl}\nmodel: {tokenizer: tok}\n")
    text = "extends: ../shared/a.yaml\n" + GOOD.replace("org/model", "./base").replace(
        "lora}", "lora, init_from: ../old}"
    )
    found = load(text, name="deep/r.yaml")
    assert found.data.train == str(tmp_path / "deep" / "rows.jsonl")
    assert found.data.validation == str(tmp_path / "shared" / "held.jsonl")
    assert found.model.tokenizer == str(tmp_path / "shared" / "tok")
    assert found.model.name == str(tmp_path / "deep" / "base")
    assert found.method.init_from == str(tmp_path / "old")
    assert found.output == "runs/x"
    assert load(text, "data.train=mine.jsonl", name="deep/r.yaml").data.train == str(tmp_path / "mine.jsonl")
    assert load(GOOD).model.name == "org/model"
    assert load(GOOD, "data.validation=0.5").data.validation == 0.5
    shipped = load(GOOD, "data.train=configs/data/messages.jsonl").data.train
    assert Path(shipped).is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=prefix", "train.gradient_checkpointing=true"], "train.gradient_checkpointing would lose "),
        (["train.max_steps=1", "train.epochs=2"], "train.epochs and train.max_steps are both given: keep one"),
        (["data.format=preference"], "data.format preference does not suit objective sft, which learns from "),
        (["objective.name=kto", "data.format=preference"], "data.format preference does not suit objective kto"),
        (["objective.name=dpo", "data.format=messages"], "data.format messages does not suit objective dpo"),
        (["data.format=completion", "data.truncate=split"], "data.truncate split is for raw text"),
        (["objective.name=dpo", "data.truncate=split"], "data.truncate split is for raw text"),
        (["train.eval_every=2"], "train.eval_every has nothing to evaluate: set data.validation"),
        (["train.max_steps=3", "train.warmup=4"], "train.warmup is 4 of 3 steps: lower it"),
        (["train.max_steps=3", "train.warmup=1.5"], "train.warmup 1.5 is neither a fraction nor a number of steps"),
        (
            ["model.task=token-classification"],
            "model.task token-classification does not suit objective sft, which needs",
        ),
        (["model.quantize=int8"], "model.quantize is not served"),
        (["train.compile=true"], "train.compile is not served"),
        (["train.head_learning_rate=0.1"], "train.head_learning_rate has no new head: model.task is causal-lm"),
    ],
)
def test_what_is_right_alone_and_wrong_together(overrides: list[str], said: str) -> None:
    (found,) = refusals(GOOD, *overrides)
    assert found.startswith(f"--set {overrides[-1]}: {said}")


def test_conflicts_are_all_told() -> None:
    overrides = ["method.name=prefix", "train.gradient_checkpointing=true", "train.max_steps=1", "train.epochs=1"]
    assert len(refusals(GOOD, *overrides, "train.eval_every=1", "data.format=preference")) == 4


def test_a_method_of_the_command_line() -> None:
    assert recipe.method_block("lora", ["method.rank=4"]).model_dump()["rank"] == 4
    with pytest.raises(RecipeError, match=r"^--set train.seed=1: only method"):
        recipe.method_block("lora", ["train.seed=1"])
    with pytest.raises(RecipeError, match=r"^--method 5: method.name: there is no method '5'"):
        recipe.method_block("5")


def test_smoke_is_laid_over_the_recipe_and_overrides_over_both() -> None:
    Path("r.yaml").write_text(GOOD + "train: {epochs: 3, max_time: 5, warmup: 100, learning_rate: 1e-3}\n")
    found = recipe.load(Path("r.yaml"), ["train.batch_size=1"], smoke=True)
    assert (found.train.max_steps, found.train.epochs, found.train.max_time) == (2, None, None)
    assert found.model.shrink and found.train.learning_rate == 1e-3 and found.train.batch_size == 1
    assert Path(found.data.train).is_file() and Path(str(found.model.tokenizer)).is_dir()
    Path("rows.jsonl").write_text("")
    assert recipe.load(Path("r.yaml"), smoke=True).data.train == str(Path("rows.jsonl").resolve())


def test_mistakes_of_every_kind_are_told_together() -> None:
    Path("a.yaml").write_text("train: {keep: 1, keep: 2}\n")
    text = """\
extends: a.yaml
model: {name: org/model, task: ranking}
method: {name: prefix, num_virtual_tokens: 4, num_virtual_tokens: 5}
objective: {name: sft}
data: {tran: rows.jsonl}
train: {max_steps: 3, epochs: 1, eval_every: 2}
"""
    assert refusals(text, "output", "train.gradient_checkpointing=true") == [
        "--set output: is not KEY=VALUE, as in --set train.max_steps=10",
        "--set train.gradient_checkpointing=true: "
        "train.gradient_checkpointing would lose method prefix's virtual tokens: set it to false",
        "a.yaml:1:18: keep stands here again; it was set in line 1",
        "r.yaml:1:1: output is missing: the run's folder",
        "r.yaml:2:32: model.task is 'ranking'; "
        "causal-lm, seq2seq-lm, sequence-classification or token-classification is meant",
        "r.yaml:3:47: num_virtual_tokens stands here again; it was set in line 3",
        "r.yaml:5:1: data.train is missing: a data file, a folder or a pattern of files; or several",
        "r.yaml:5:8: data.tran is not a key; did you mean train?",
        "r.yaml:6:31: train.epochs and train.max_steps are both given: keep one, set the other to null",
    ]  # nothing of eval_every: what data.validation would have been is not known


def test_all_files_that_cannot_be_extended_are_told_and_nothing_else() -> None:
    Path("a.yaml").write_text("extends: lost.yaml\ntrain: {seed: x}\n")
    Path("b.yaml").write_text("a: *b\n")
    assert refusals("extends: [a.yaml, none.yaml, b.yaml]\n") == [
        "a.yaml:1:10: extends: there is no file lost.yaml",
        "r.yaml:1:19: extends: there is no file none.yaml",
        "b.yaml:1:4: anchors and aliases (& and *) are not allowed: write the value out",
    ]


def test_what_is_quoted_from_a_file_stays_on_its_line() -> None:
    found = refusals(GOOD + 'train: {"a\\nb": 1, "\\e[31mred": 2}\n')
    assert [line.split(" is ")[0] for line in found] == [r"r.yaml:6:9: train.a\nb", r"r.yaml:6:20: train.\x1b[31mred"]


def test_files_that_extend_each_other_many_times_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path, *more: Any) -> located.Node:
        read.append(path.name)
        assert len(read) < 100, "files are read again and again"
        return located.read(path, *more)

    monkeypatch.setattr(composed, "read", counted)
    Path("e0.yaml").write_text("train: {seed: 3}\n")
    for n in range(1, 40):
        twice = f"[e{n - 1}.yaml, e{n - 1}.yaml]"
        Path(f"e{n}.yaml").write_text(f"extends: {twice if n < 19 else f'e{n - 1}.yaml'}\n")
    assert load("extends: e18.yaml\n" + GOOD).train.seed == 3
    assert sorted(read) == sorted(["r.yaml", *(f"e{n}.yaml" for n in range(19))])
    read.clear()
    (deep,) = refusals("extends: e39.yaml\n" + GOOD)
    assert deep.endswith("extends: over 20 files, one under the other")
    assert len(read) == len(set(read)) <= 21


def test_a_key_counts_with_a_name_that_is_set_after_it() -> None:
    found = load(GOOD, "method.width=8", "method.name=bottleneck").method
    assert (found.name, found.model_dump()["width"]) == ("bottleneck", 8)


def test_a_missing_key_is_blamed_on_the_block_in_the_file_though_an_option_adds_to_it() -> None:
    text = GOOD.replace("train: rows.jsonl", "limit: 3")
    assert refusals(text, "data.limit=4") == [
        "r.yaml:4:1: data.train is missing: a data file, a folder or a pattern of files; or several"
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            'data.validation=""',
            "data.validation is ''; a number or something not empty or a mapping or a list is meant",
        ),
        ('data.train=""', "data.train is ''; something not empty or a mapping or a list is meant"),
        ('model.tokenizer=""', "model.tokenizer is ''; something not empty is meant"),
        ("train.device=gpu", "train.device: 'gpu' is no device; auto, cpu, cuda, cuda:1 or mps is meant"),
        ("train.optimizer=adam", "train.optimizer is 'adam'; adamw, sgd or adafactor is meant; did you mean adamw?"),
    ],
)
def test_empty_names_and_near_words_are_refused(override: str, said: str) -> None:
    assert refusals(GOOD, override) == [f"--set {override}: {said}"]


def test_a_shipped_recipe_is_found_from_any_folder() -> None:
    assert recipe.load(Path("recipes/smoke.yaml")) == recipe.load(ROOT / "recipes" / "smoke.yaml")
    Path("recipes").mkdir()
    assert load(GOOD, name="recipes/smoke.yaml").output == "runs/x"


@pytest.mark.parametrize("name", methods.names())
def test_smoke_makes_any_recipe_fit_a_tiny_model_and_the_rows_at_hand(name: str) -> None:
    text = GOOD.replace("{name: lora}", f"{{name: {name}, init_from: runs/real}}").replace(
        "rows.jsonl", "rows.jsonl, format: completion, columns: {prompt: q}"
    )
    Path("r.yaml").write_text(text)
    found = recipe.load(Path("r.yaml"), smoke=True)
    assert found.method.name == name and found.method.init_from is None
    assert (found.data.format, found.data.columns) == ("auto", None)
    Path("rows.jsonl").write_text("")
    own = recipe.load(Path("r.yaml"), smoke=True).data
    assert (own.format, own.columns) == ("completion", {"prompt": "q"})


def test_smoke_hides_no_mistake() -> None:
    Path("r.yaml").write_text("method: lora\ndata: {limit: 3}\nobjective: {name: dpo, beta: 0}\noutput: runs/x\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(Path("r.yaml"), smoke=True)
    assert str(caught.value).splitlines() == [
        "--smoke: model.name is missing: hub id, local folder, .gguf file, or a bare config.json",
        "r.yaml:1:9: method.name is missing: one of " + ", ".join(methods.names()),
        "r.yaml:2:1: data.train is missing: a data file, a folder or a pattern of files; or several",
        "r.yaml:3:30: objective.beta is 0; a number above 0.0 is meant",
    ]


def test_smoke_lets_no_row_in_that_is_longer_than_the_tiny_model_has_positions() -> None:
    Path("r.yaml").write_text(GOOD)
    longest = recipe.load(Path("r.yaml"), smoke=True).data.max_length
    assert all(longest <= SMALL_VALUES[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len"))


def test_smoke_takes_the_layers_there_are() -> None:
    Path("r.yaml").write_text(GOOD.replace("{name: lora}", "{name: lora, layers: [10, 11]}"))
    assert recipe.load(Path("r.yaml"), smoke=True).method.model_dump()["layers"] is None


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15)
ODD = TEXT | st.sampled_from(["1e5", "09", "0x1f", "yes", "null", "~", "1_0", "=", "<<", "- a", "a: b", "'", "true"])


@given(
    revision=st.none() | ODD,
    output=ODD,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    targets=ODD | st.lists(ODD, min_size=1, max_size=3),
    columns=st.none() | st.dictionaries(ODD, ODD, max_size=2),
)
def test_a_resolved_recipe_loads_to_itself(
    tmp_path_factory: pytest.TempPathFactory,
    revision: str | None,
    output: str,
    rate: float,
    seed: int,
    targets: str | list[str],
    columns: dict[str, str] | None,
) -> None:
    wanted = Recipe.model_construct(
        model=recipe.ModelConfig(name="org/model", revision=revision),
        method=methods.get("lora").config(name="lora", target_modules=targets),
        objective=objectives.get("sft").config(name="sft"),
        data=recipe.DataConfig(train="/rows.jsonl", columns=columns),
        train=recipe.TrainConfig(learning_rate=rate, seed=seed),
        output=output,
    )
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(recipe.resolved(wanted), "utf-8", newline="")
    assert recipe.load(path) == wanted


def test_the_schema_knows_what_the_loader_knows() -> None:
    schema = recipe.json_schema()
    assert set(schema["properties"]) == set(recipe.TOP)
    for key, package in (("method", methods), ("objective", objectives)):
        found = {variant["properties"]["name"]["const"]: variant for variant in schema["properties"][key]["oneOf"]}
        assert set(found) == set(package.names())
        for name, variant in found.items():
            assert set(variant["properties"]) == set(package.get(name).config.model_fields)
    for key in ("model", "method", "objective", "data", "train"):
        block = schema["properties"][key]
        assert all(variant["additionalProperties"] is False for variant in block.get("oneOf", [block]))


def test_a_bad_recipe_ends_a_command_at_once_and_without_torch(tmp_path: Path) -> None:
    Path("bad.yaml").write_text(GOOD + "train: {sead: 1}\nmodle: 1\n")
    code = (
        "import sys\nfrom peftctl.cli import main\n"
        "try:\n    main(['train', 'bad.yaml', '--set', 'train.keep=0'])\n"
        "except SystemExit as end:\n    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    print(heavy or 'light')\n    sys.exit(end.code)\n"
    )
    ended: list[subprocess.CompletedProcess[str]] = []

    def run(code: str) -> None:
        ended.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment()))

    took, torch_alone = (seconds_of_children(lambda code=code: run(code)) for code in (code, "import torch"))
    done = ended[0]
    assert done.returncode == 2 and done.stdout == "light\n"
    assert done.stderr.splitlines() == [
        "peftctl: error: --set train.keep=0: train.keep is 0; a number at least 1 is meant",
        "peftctl: error: bad.yaml:6:9: train.sead is not a key; did you mean seed?",
        "peftctl: error: bad.yaml:7:1: modle is not a key of a recipe; did you mean model?",
    ]
    assert took < torch_alone


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_every_reference_in_the_schema_is_found_from_its_root() -> None:
    schema = recipe.json_schema()
    referred = set(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)))
    assert "Reward" in referred and referred <= set(schema["$defs"])
    assert json.dumps(schema).count('"$defs"') == 1
