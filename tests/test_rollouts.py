"""A run that learns from its own answers: they are drawn by seed and step alone, and what is rewarded is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftctl import commands, recipe, trainer
from peftctl.distributed import ALONE
from peftctl.errors import InputError, Stopped
from peftctl.feeding import batches_of
from peftctl.loading import load
from peftctl.plan import Options, Plan, plan
from peftctl.policy import Reference
from peftctl.rollouts import Rollouts
from peftctl.row import Row
from peftctl.run_folder import RunFolder
from peftctl.trainer import Question
from tests import runs


def contents(**blocks: dict[str, Any]) -> dict[str, Any]:
    return runs.document("lora", "grpo", **blocks)


def opened(output: Path, written: dict[str, Any]) -> tuple[Plan, Rollouts]:
    """The data source of a run, as at its start; the adapter is moved, so that it and the reference differ."""
    planned, options = plan(runs.loaded(output, written), Options()), Options()
    training = load(planned, RunFolder(output, options), None, options)
    with torch.no_grad():
        for tensor in training.attachment.trainable().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    batches = batches_of(planned, training.policy, ALONE, {})
    assert isinstance(batches, Rollouts)
    return planned, batches


def ids(source: Rollouts, position: int) -> list[tuple[int, ...]]:
    return [row.ids for batch in source.step(position)[0] for row in batch.rows]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base with weights: a run's own."""
    output = tmp_path_factory.mktemp("base") / "run"
    runs.train(output, contents(train={"max_steps": 1}))
    return {"name": str(output / "base")}


@pytest.mark.parametrize("objective", [{}, {"iterations": 3, "clip": 0.01}, {"iterations": 2, "beta": 0.0}], ids=str)
def test_stopped_after_every_step_equals_never_stopped(objective: dict[str, Any], tmp_path: Path) -> None:
    written = contents(objective=objective, train={"save_every": 1, "keep": 9, "learning_rate": 0.05})
    runs.train(tmp_path / "whole", written)
    for cut in (1, 2, 3, 4):
        with runs.stopped_after(cut, tmp_path / "pieces"), pytest.raises(Stopped):
            runs.train(tmp_path / "pieces", written, resume=cut > 1)
    runs.train(tmp_path / "pieces", written, resume=True)
    assert runs.untimed(tmp_path / "whole") == runs.untimed(tmp_path / "pieces")
    assert runs.bits(tmp_path / "whole") == runs.bits(tmp_path / "pieces")
    steps = [event for event in runs.events(tmp_path / "whole") if event["event"] == "step"]
    if "clip" in objective:  # the first step of a rollout is on its policy, to the bit; later ones are off it
        assert [step["clip_fraction"] > 0 for step in steps] == [False, True, True, False]


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_killed_within_a_step_equals_never_stopped(micro_batch: int, tmp_path: Path) -> None:
    written = contents(objective={"iterations": 2}, train={"save_every": 1})
    runs.train(tmp_path / "whole", written)
    with pytest.raises(runs.Killed), runs.killed_in(micro_batch):
        runs.train(tmp_path / "killed", written)
    runs.train(tmp_path / "killed", written, resume=True)
    assert runs.untimed(tmp_path / "whole") == runs.untimed(tmp_path / "killed")
    assert runs.bits(tmp_path / "whole") == runs.bits(tmp_path / "killed")


def test_answers_depend_on_seed_step_and_policy_alone(weights: dict[str, Any], tmp_path: Path) -> None:
    written = contents(model=weights)
    _, source = opened(tmp_path / "run", written)
    state = torch.get_rng_state()
    first, second = ids(source, 0), ids(source, 4)
    assert torch.equal(torch.get_rng_state(), state) and source.policy.training
    assert first == ids(source, 0) and first != second and len(first) == 4 * 3
    torch.manual_seed(5)
    assert second == ids(opened(tmp_path / "again", written)[1], 4)  # not on the steps before
    assert first != ids(opened(tmp_path / "other", contents(model=weights, train={"seed": 1}))[1], 0)
    held = [[row.ids for batch in source.evaluation() for row in batch.rows] for _ in range(2)]
    assert held[0] == held[1] and len(held[0]) == 2 * 3


def test_a_groups_question_is_computed_once_and_is_no_label(weights: dict[str, Any], tmp_path: Path) -> None:
    planned, source = opened(tmp_path / "run", contents(model=weights))
    for batch in source.step(0)[0]:
        for example in set(batch.examples):
            prompt = len(planned.data.train.examples[example][0].ids)
            rows = [row for row in batch.rows if row.example == example]
            assert len(rows) == 3 and len({row.ids[:prompt] for row in rows}) == 1
            assert all(not any(row.weights[:prompt]) and all(row.weights[prompt:]) for row in rows)
        prompts = {row.ids[: len(planned.data.train.examples[row.example][0].ids)] for row in batch.rows}
        answers = sum(int(sum(row.weights)) for row in batch.rows)
        assert len(batch) <= sum(map(len, prompts)) + answers < batch.real_tokens


@pytest.mark.parametrize("layout", ["shared", "joined", "padded"])
def test_the_first_step_is_on_the_policy_in_every_layout(layout: str, weights: dict[str, Any], tmp_path: Path) -> None:
    _, source = opened(tmp_path / "run", contents(model=weights | {"layout": layout}, objective={"iterations": 2}))
    for batch in source.step(0)[0]:
        old = torch.tensor([value for row in batch.rows for value in row.extra["old"]])
        assert torch.equal(old, source.policy.tokens(batch).logprob)


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "dapo"])
def test_how_a_step_is_cut_changes_nothing_that_is_learnt(kind: str, weights: dict[str, Any], tmp_path: Path) -> None:
    planned, source = opened(tmp_path / "run", contents(model=weights, objective={"loss": kind, "beta": 0.5}))
    question = Question(source.objective, planned.recipe.objective, source.policy, Reference(source.policy, None))
    parameters, found = source.policy.attachment.trainable(), []
    for size, tokens in ((4, None), (1, None), (4, 300)):
        source.prompts.batch_size, source.prompts.tokens, source.index = size, tokens, -1
        batches, _ = source.step(0)
        assert (len(batches) == 1) == ((size, tokens) == (4, None))
        source.policy.zero_grad()
        loss, metrics = trainer._backward(question, batches, 1, torch.device("cpu"), ALONE)
        found.append((loss, metrics, torch.cat([p.grad.flatten() for p in parameters.values()])))  # type: ignore[union-attr]
    for loss, metrics, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4) and metrics == pytest.approx(found[0][1], rel=1e-4)
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-3, atol=1e-6)


def test_what_is_rewarded_is_learnt(tmp_path: Path) -> None:
    """A small letter at the start, which a random base gives by chance: on prompts it has not seen as well."""
    own = json.loads((runs.CONFIGS / "models" / "tiny-llama.json").read_text())
    # its embeddings are the head, which is frozen: they must be long enough to make a token likely
    (tmp_path / "wide.json").write_text(json.dumps(own | {"initializer_range": 0.2}))
    written = contents(
        model={"name": str(tmp_path / "wide.json")},
        objective={"rewards": [{"name": "regex", "pattern": "^[a-z]"}], "group_size": 8, "max_new_tokens": 2},
        method={"target_modules": "all-linear"},
        train={"max_steps": 16, "learning_rate": 0.01, "gradient_accumulation": 1, "batch_size": 4, "eval_every": 16},
    )
    runs.train(tmp_path / "run", written)
    events = runs.events(tmp_path / "run")
    rewards = [event["reward"] for event in events if event["event"] == "step"]
    held = [event["validation_reward"] for event in events if event["event"] == "evaluation"]
    assert sum(rewards[:3]) / 3 < 0.3 and sum(rewards[-3:]) / 3 > 0.9, rewards
    assert held[-1] > 0.4  # of two prompts; only seven others were seen


def test_steps_that_repeat_are_counted_in_epochs(tmp_path: Path) -> None:
    train = {"max_steps": None, "epochs": 2}
    for iterations in (1, 3):
        written = contents(objective={"iterations": iterations}, train=train)
        assert plan(runs.loaded(tmp_path / "run", written), Options()).steps == 4 * iterations  # 14 examples by 4


def test_a_prompt_must_leave_room_for_its_answer(tmp_path: Path) -> None:
    written = contents(data={"max_length": 60})
    with pytest.raises(
        InputError, match=r"messages\.jsonl:1: the prompt has 5\d tokens, and data.max_length 60 leaves"
    ):
        plan(runs.loaded(tmp_path / "run", written), Options())
    whole = plan(runs.loaded(tmp_path / "run", contents()), Options()).data
    cut = plan(runs.loaded(tmp_path / "run", contents(data={"max_length": 60, "truncate": "left"})), Options()).data
    assert cut.report.truncated == sum(
        len(rows[0].ids) > 54 for rows in (*whole.train.examples, *whole.validation.examples)
    )  # type: ignore[union-attr]
    for long, short in zip(whole.train.examples, cut.train.examples, strict=True):
        assert short[0].ids == long[0].ids[-54:] and len(short[0].weights) == len(
            short[0].ids
        )  # its end is what is asked
    assert cut.report.reach == 60 and cut.report.truncated > 0
    written = contents(objective={"max_new_tokens": 1000}, data={"max_length": 4096})
    with pytest.raises(InputError, match="the base has positions for 1024"):
        plan(runs.loaded(tmp_path / "run", written), Options())


def own_reward(folder: Path, body: str = "len(completion)") -> dict[str, Any]:
    (folder / "own.py").write_text(f"def score(prompt, completion, answer):\n    return {body}\n")
    return contents(objective={"rewards": [{"name": "own.py:score"}]}, train={"save_every": 2})


def test_a_function_of_ones_own_runs_on_the_command_lines_word_alone(tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = runs.written(output, own_reward(tmp_path))
    with pytest.raises(InputError, match=r"wants to run .*own\.py:score: .* --trust-recipe-code"):
        commands.train(path, [], {}, False, False, {"quiet": True})
    assert commands.validate(path, [], False, 0)["rows"] == 9 and not output.exists()
    trusted = {"quiet": True, "trust_recipe_code": True, "verify": False}
    commands.train(path, [], {}, False, False, trusted)
    name = f"{tmp_path / 'own.py'}:score"  # relative to the recipe
    assert recipe.load(output / "recipe.yaml").objective.rewards[0].name == name  # type: ignore[attr-defined]
    assert len(json.loads((output / "run.json").read_text())["code"][name]) == 64
    event = runs.events(output)[0]
    assert event["rewards/score"] == event["reward"] > 1
    own_reward(tmp_path, "-len(completion)")
    with pytest.raises(InputError, match=r"another job.*the content of.*own\.py:score"):
        commands.train(path, ["train.max_steps=6"], {}, False, False, trusted | {"resume": True})


def test_mistakes_in_rewards_are_told_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"extends: {runs.CONFIGS.parent}/recipes/smoke.yaml\n"
        "objective:\n  name: grpo\n  rewards:\n  - {name: lenght}\n  - {name: json, wieght: 2}\n  - {weight: 2}\n"
        "  - {name: regex, pattern: 3}\n  - json\n"
    )
    with pytest.raises(InputError) as caught:
        recipe.load(tmp_path / "r.yaml")
    lines = [line.partition("r.yaml:")[2] for line in str(caught.value).splitlines()]
    assert [line.split(":")[0] for line in lines] == ["5", "6", "7", "8", "9"]
    told = ["there is no reward 'lenght'; did you mean length", "did you mean weight?", "rewards.2.name is missing"]
    told += ["is 3; text is meant", "a mapping is meant"]
    assert all(said in line for line, said in zip(lines, told, strict=True))


def test_streamed_prompts_are_asked_in_turn_each_for_as_many_steps() -> None:
    asked: list[int] = []

    class Watched(Rollouts):
        def _answered(self, index: int, start: int) -> list[list[Row]]:
            asked.append(start)
            return []

    prompts: Any = SimpleNamespace(stream=object(), chosen=lambda start: (None, [], start + 3))
    objective: Any = SimpleNamespace(repeats=lambda config: 2)
    nothing: Any = None
    rollouts, position = Watched(prompts, objective, None, nothing, nothing), 0
    for _ in range(6):
        _, position = rollouts.step(position)
    assert asked == [0, 3, 6]
