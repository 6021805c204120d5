"""The loop: equal however it is cut into micro-batches or interrupted, and stopped before a bad update."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftctl import checkpoint, objectives, optim, report, trainer
from peftctl.batch import Batch, build
from peftctl.checkpoint import Progress, State
from peftctl.errors import DataError, Stopped, TrainingError
from peftctl.objectives.base import Answers, Loss, Objective, ObjectiveConfig, Term, TokenStats
from peftctl.report import Doing
from peftctl.row import Row
from peftctl.trainer import Event, Job, Question

VOCABULARY = 13


class Toy(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, VOCABULARY)

    def tokens(self, batch: Batch) -> TokenStats:
        logits = self.head(self.dropout(self.embed(batch.ids[batch.labels.source])))
        target = batch.labels.target
        return TokenStats(logits.log_softmax(-1)[torch.arange(len(target)), target], logits.argmax(-1) == target)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 3 to 8 tokens, some of them labels of uneven weight."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def row(index: int) -> Row:
        length = integer(3, 9)
        weights = (*(integer(0, 3) / 2 for _ in range(length - 1)), 1.0)
        return Row(tuple(integer(0, VOCABULARY) for _ in range(length)), weights, index)

    return [row(index) for index in range(count)]


@dataclass
class Shuffled:
    """`accumulate` micro-batches of `size` rows a step, from one permutation an epoch after the other."""

    rows: list[Row]
    size: int = 4
    accumulate: int = 1
    validation: tuple[Row, ...] = ()

    def step(self, position: int) -> tuple[list[Batch], int]:
        taken = [self._row(position + k) for k in range(self.size * self.accumulate)]
        parts = [taken[k : k + self.size] for k in range(0, len(taken), self.size)]
        return [build(part) for part in parts], position + len(taken)

    def evaluation(self) -> Iterator[Batch]:
        return (build(self.validation[k : k + 3]) for k in range(0, len(self.validation), 3))

    def _row(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.rows))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(epoch))
        return self.rows[int(order[place])]


def two_terms(policy: Answers, reference: Answers | None, batch: Batch, config: ObjectiveConfig) -> Loss:
    """A mean over tokens, and another over those rows alone that have more than five tokens."""
    stats, labels = policy.tokens(batch), batch.labels
    long = torch.tensor([len(row.ids) > 5 for row in batch.rows]).float()
    per_row = torch.zeros(len(batch.rows)).index_add(0, labels.row, stats.logprob)
    nll = -(stats.logprob * labels.weight).sum()
    hits = (stats.correct * 1.0).sum(), torch.tensor(float(len(stats.correct)))
    return Loss((Term(nll), Term((long * per_row.square()).sum(), 0.01)), {"accuracy": hits})


def two_weights(batch: Batch, config: ObjectiveConfig) -> tuple[float, ...]:
    return float(batch.labels.weight.sum()), float(sum(len(row.ids) > 5 for row in batch.rows))


TWO = Objective("two", "", "", ObjectiveConfig, frozenset(), lambda *args: (), two_weights, two_terms)
SFT = objectives.get("sft")
BOTH = {"sft": (SFT, SFT.config(name="sft")), "two": (TWO, ObjectiveConfig(name="two"))}
TIMINGS = {"seconds", "tokens_per_s"}


@dataclass
class Run:
    """A job on fresh objects, with all that it emitted and saved."""

    job: Job
    policy: Toy
    events: list[Event]
    saved: list[Progress]

    def train(self, progress: Progress | None = None) -> Progress:
        return trainer.train(self.job, progress or Progress())

    def untimed(self) -> list[Event]:
        return [{k: v for k, v in event.items() if k not in TIMINGS} for event in self.events]

    def kinds(self) -> list[tuple[str, int]]:
        return [(event["event"], event["step"]) for event in self.events]


def make(
    batches: Any, objective: str = "sft", kind: str = "adamw", dropout: float = 0.0, steps: int = 8, **more: Any
) -> Run:
    policy = Toy(dropout)
    parameters = dict(policy.named_parameters())
    events: list[Event] = []
    saved: list[Progress] = []
    job = Job(
        question=Question(*BOTH[objective], policy=policy),
        batches=batches,
        parameters=parameters,
        optimizer=optim.build(parameters, {}, kind, 0.05),
        lr=0.05,
        schedule=lambda step: optim.schedule("cosine", step, steps, 2),
        steps=steps,
        emit=events.append,
        save=saved.append,
        **more,
    )
    return Run(job, policy, events, saved)


def values(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.policy.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", BOTH)
@pytest.mark.fault(45)
def test_four_micro_batches_of_one_equal_one_of_four(objective: str) -> None:
    rows = make_rows(12)
    whole, parts = (make(Shuffled(rows, size, 4 // size), objective, "sgd", steps=3) for size in (4, 1))
    whole.train()
    parts.train()
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=0, atol=1e-6)
    for a, b in zip(whole.untimed(), parts.untimed(), strict=True):
        assert {k: v for k, v in b.items() if k != "event"} == pytest.approx(
            {k: v for k, v in a.items() if k != "event"}, abs=1e-5, rel=1e-6
        )


@dataclass
class Examples(Shuffled):
    """Examples of two rows each, `size` of them a micro-batch."""

    pairs: tuple[tuple[Row, ...], ...] = ()

    def step(self, position: int) -> tuple[list[Batch], int]:
        starts = range(position, position + self.size * self.accumulate, self.size)
        return [self._batch(start) for start in starts], position + self.size * self.accumulate

    def evaluation(self) -> Iterator[Batch]:
        return (self._batch(start) for start in range(0, len(self.pairs), self.size))

    def _batch(self, start: int) -> Batch:
        return build([row for place in range(start, start + self.size) for row in self.pairs[place % len(self.pairs)]])


def test_what_a_loss_must_know_of_the_whole_step_is_found_first() -> None:
    """KTO's reference point is the mean over all micro-batches, and over all held-out ones."""
    kto = objectives.get("kto")
    rows = [(row._replace(role="undesirable" if row.example % 3 == 0 else "desirable"),) for row in make_rows(12)]
    pairs = kto.pair(rows, list(range(12))) if kto.pair is not None else ()
    found = []
    for size in (4, 1):
        run = make(Examples([], size, 4 // size, pairs=pairs), "sft", "sgd", steps=3, eval_every=1)
        other = Toy()
        with torch.no_grad():
            other.head.weight.mul_(3)  # surer of what is wrong: the policy is ahead of it, and the point is not 0
        question = Question(kto, kto.config(name="kto", beta=0.5), run.policy, reference=other)
        run.job = replace(run.job, question=question)
        run.train()
        found.append(run)
    whole, parts = found
    assert whole.events[0]["kl"] > 0.1
    for a, b in zip(whole.untimed(), parts.untimed(), strict=True):
        assert {k: v for k, v in b.items() if k != "event"} == pytest.approx(
            {k: v for k, v in a.items() if k != "event"}, abs=1e-5, rel=1e-5
        )
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=0, atol=1e-6)


def test_what_is_shared_is_found_without_gradients_or_dropout() -> None:
    seen: list[tuple[bool, bool, int]] = []

    def shared(policy: Any, reference: Any, batches: Any, config: Any) -> dict[str, Tensor]:
        seen.append((torch.is_grad_enabled(), policy.training, len(list(batches))))
        return {"x": torch.tensor(float(len(seen)))}

    def loss(policy: Answers, reference: Any, batch: Batch, config: Any, shared: dict[str, Tensor]) -> Loss:
        return SFT.loss(policy, None, batch, config)._replace(metrics={"x": (shared["x"], torch.tensor(1.0))})

    run = make(Shuffled(make_rows(8), 2, 2, tuple(make_rows(5))), steps=2, eval_every=2, dropout=0.5)
    question = replace(run.job.question, objective=replace(SFT, shared=shared, loss=loss))
    run.job = replace(run.job, question=question)
    run.train()
    assert seen == [(False, False, 2)] * 3, "once a step, once an evaluation"
    assert run.policy.training
    assert [event.get("x", event.get("validation_x")) for event in run.events] == [1, 2, 3]


def test_loss_and_gradient_are_each_term_by_its_own_weight() -> None:
    batch = build(make_rows(4))
    run = make(Shuffled(make_rows(4), size=2, accumulate=2), "two", steps=1, max_grad_norm=None)
    found = two_terms(run.policy, None, batch, ObjectiveConfig(name="two"))
    tokens, long = two_weights(batch, ObjectiveConfig(name="two"))
    expected = found.terms[0].sum / tokens + 0.01 * found.terms[1].sum / long
    gradients = torch.autograd.grad(expected, list(run.policy.parameters()))
    run.train()
    assert run.events[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(run.policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    assert long not in (0, 4) and tokens != 4, "the weights differ, or the test shows nothing"


def save_to(folder: Path, run: Run, log: report.Log) -> None:
    """Let a run keep checkpoints and a log."""

    def save(progress: Progress) -> None:
        log.sync()
        tensors, facts = optim.state(run.job.optimizer, run.job.parameters)
        rng = checkpoint.random_state()
        checkpoint.save(folder, State(progress, dict(run.policy.named_parameters()), tensors, facts, rng))
        checkpoint.rotate(folder, keep=2)

    def emit(event: Event) -> None:
        log({k: v for k, v in event.items() if k not in TIMINGS})

    run.job = replace(run.job, save=save, emit=emit)


def go_on(folder: Path, run: Run) -> Progress:
    """Put the newest checkpoint into a fresh run."""
    path = checkpoint.newest(folder)
    if path is None:
        torch.manual_seed(7)
        return Progress()
    found = checkpoint.load(path)
    checkpoint.rewind(folder, found.progress.step)
    run.policy.load_state_dict(dict(found.adapter))
    optim.restore(run.job.optimizer, run.job.parameters, found.optimizer, found.optimizer_facts)
    checkpoint.restore_random(found.rng)
    return found.progress


def attempt(folder: Path, change: Callable[[Run], None], **options: Any) -> Run:
    """One process's part of a run, from whatever the one before left on the disk."""
    batches = Shuffled(make_rows(10), size=2, accumulate=2, validation=tuple(make_rows(7, seed=1)))
    run = make(batches, dropout=0.3, steps=8, eval_every=2, **options)
    progress = go_on(folder, run)
    report.truncate(folder / "metrics.jsonl", progress.step)
    with report.Log(folder / "metrics.jsonl") as log:
        save_to(folder, run, log)
        change(run)
        run.train(progress)
    return run


class Killed(BaseException):
    pass


def stop_after(step: int) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        seen: list[Event] = []
        emit = run.job.emit
        run.job = replace(
            run.job,
            emit=lambda event: (emit(event), seen.append(event)) and None,
            stop=lambda: 15 if any(event["step"] == step for event in seen) else None,
        )

    return change


def die_in_accumulation_of(step: int) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        count = 0
        loss = run.job.question.objective.loss

        def dying(*args: Any) -> Loss:
            nonlocal count
            count += torch.is_grad_enabled()
            if count == 2 * step:  # the second micro-batch of that step, the first being in the gradients
                raise Killed
            return loss(*args)

        objective = replace(run.job.question.objective, loss=dying)
        run.job = replace(run.job, question=replace(run.job.question, objective=objective))

    return change


def nothing(run: Run) -> None:
    pass


@pytest.mark.parametrize(
    ("objective", "kind", "save_every"),
    [("sft", "adamw", 3), ("two", "adamw", 2), ("two", "sgd", 1), ("sft", "adafactor", None)],
)
@pytest.mark.fault(1, 2)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, objective: str, kind: str, save_every: int | None
) -> None:
    """10 rows, 4 a step: epochs end within steps 3 and 8 and after step 5. Dropout and shuffling are on."""
    options = {"objective": objective, "kind": kind, "save_every": save_every}
    (tmp_path / "whole").mkdir()
    whole = attempt(tmp_path / "whole", nothing, **options)
    log = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    final, _ = optim.state(whole.job.optimizer, whole.job.parameters)
    assert len(report.read(tmp_path / "whole" / "metrics.jsonl")) == 8 + 4

    for step in range(1, 9):
        for name, interrupt, error in [
            ("stopped", stop_after(step), Stopped),
            ("killed", die_in_accumulation_of(step), Killed),
        ]:
            folder = tmp_path / f"{name}-{step}"
            folder.mkdir()
            with pytest.raises(error):
                attempt(folder, interrupt, **options)
            resumed = attempt(folder, nothing, **options)
            assert equal(values(resumed), values(whole)), f"{name} at step {step}"
            assert equal(optim.state(resumed.job.optimizer, resumed.job.parameters)[0], final)
            assert (folder / "metrics.jsonl").read_bytes() == log
            ours = checkpoint.newest(folder)
            assert ours is not None and ours.name == "step-000008"


@pytest.mark.fault(1)
def test_stopped_at_every_step_in_turn(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = attempt(tmp_path / "whole", nothing)
    for step in range(1, 8):
        with pytest.raises(Stopped, match=f"stopped after step {step} of 8; --resume goes on from there"):
            attempt(tmp_path / "cut", stop_after(step))
    assert equal(values(attempt(tmp_path / "cut", nothing)), values(whole))
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1] != b""


@pytest.mark.parametrize("number", [2, 15])
def test_signal_finishes_the_step_saves_and_skips_the_evaluation(number: int) -> None:
    asked: list[int] = []
    run = make(
        Shuffled(make_rows(10), validation=tuple(make_rows(4))),
        eval_every=1,
        stop=lambda: asked[0] if asked else None,
        after_backward=lambda step, total: asked.append(number) if step == 3 else None,
    )
    with pytest.raises(Stopped) as caught:
        run.train()
    assert caught.value.exit_code == 128 + number
    assert run.kinds()[-1] == ("step", 3) and [p.step for p in run.saved] == [3]
    assert run.saved[0].position == 12


def test_signal_while_loading_ends_before_the_first_step() -> None:
    run = make(Shuffled(make_rows(10)), stop=lambda: 15)
    with pytest.raises(Stopped, match="before the first step") as caught:
        run.train()
    assert caught.value.exit_code == 143 and run.saved == [] and run.kinds() == []


def test_signal_in_an_evaluation_cuts_it_short() -> None:
    calls = 0

    def stop() -> int | None:
        nonlocal calls
        calls += 1
        return 15 if calls > 1 else None

    run = make(Shuffled(make_rows(10), validation=tuple(make_rows(9))), eval_every=1, save_every=1, stop=stop)
    with pytest.raises(Stopped):
        run.train()
    assert run.kinds() == [("step", 1)] and len(run.saved) == 1, "saved once, before the evaluation"


def test_what_happens_when() -> None:
    order: list[str] = []
    run = make(Shuffled(make_rows(10), validation=tuple(make_rows(4))), steps=5, eval_every=2, save_every=3)
    emit = lambda event: order.append(f"{event['event']} {event['step']}")  # noqa: E731
    run.job = replace(run.job, emit=emit, save=lambda progress: order.append(f"save {progress.step}"))
    run.train()
    assert order == [
        *("step 1", "step 2", "evaluation 2", "step 3", "save 3", "step 4", "evaluation 4"),
        *("step 5", "save 5", "evaluation 5"),
    ]


def test_each_micro_batch_is_told_of_and_changes_nothing() -> None:
    told: list[Doing] = []
    batches = Shuffled(make_rows(24), size=2, accumulate=3, validation=tuple(make_rows(5, seed=1)))
    loud, quiet = (make(batches, steps=2, eval_every=2, progress=heard) for heard in (told.append, lambda doing: None))
    loud.train()
    quiet.train()
    assert loud.untimed() == quiet.untimed() and str(values(loud)) == str(values(quiet))
    tokens = [[batch.real_tokens for batch in batches.step(position)[0]] for position in (0, 6)]
    held = [batch.real_tokens for batch in batches.evaluation()]
    assert told == [
        Doing("step", 1),
        *(Doing("step", 1, done, 3, sum(tokens[0][:done])) for done in (0, 1, 2, 3)),
        Doing("step", 2),
        *(Doing("step", 2, done, 3, sum(tokens[1][:done])) for done in (0, 1, 2, 3)),
        Doing("evaluation", 2),
        *(Doing("evaluation", 2, done, None, sum(held[:done])) for done in (0, 1, 2)),
    ]


def test_step_event_has_named_figures_and_totals_add_up() -> None:
    run = make(Shuffled(make_rows(10), size=2, accumulate=2), "two", steps=3)
    progress = run.train()
    assert list(run.events[0])[:6] == ["event", "step", "loss", "lr", "grad_norm", "tokens"]
    assert {"tokens_per_s", "seconds", "accuracy"} <= set(run.events[0])
    assert [event["lr"] for event in run.events] == pytest.approx(
        [0.05 * optim.schedule("cosine", step, 3, 2) for step in (1, 2, 3)]
    )
    batches = Shuffled(make_rows(10), size=2, accumulate=2)
    tokens = [sum(batch.real_tokens for batch in batches.step(position)[0]) for position in (0, 4, 8)]
    assert [event["tokens"] for event in run.events] == tokens
    assert progress[:3] == (3, 12, sum(tokens)) and progress.seconds > 0


def test_a_metric_named_like_a_figure_of_the_loop_does_not_replace_it() -> None:
    run = make(Shuffled(make_rows(10)), steps=1)
    loss = SFT.loss

    def renamed(*args: Any) -> Loss:
        one = torch.tensor(1.0)
        return loss(*args)._replace(metrics={"loss": (one, one), "step": (one * 9, one)})

    question = replace(run.job.question, objective=replace(SFT, loss=renamed))
    run.job = replace(run.job, question=question)
    run.train()
    assert run.events[0]["step"] == 1 and run.events[0]["loss"] != 1


def test_clipping_scales_what_is_applied_and_reports_what_was_found() -> None:
    seen: dict[float | None, tuple[float, Tensor]] = {}
    for largest in (None, 1e-3):
        run = make(Shuffled(make_rows(10)), kind="sgd", steps=1, max_grad_norm=largest)
        before = values(run)["head.weight"]
        run.train()
        seen[largest] = run.events[0]["grad_norm"], values(run)["head.weight"] - before
    assert seen[None][0] == pytest.approx(seen[1e-3][0]) and seen[None][0] > 0.01
    ratio = (seen[1e-3][1].norm() / seen[None][1].norm()).item()
    assert ratio == pytest.approx(1e-3 / seen[None][0], rel=1e-3)


def test_after_backward_sees_gradients_before_clipping() -> None:
    norms: list[tuple[int, int, float]] = []
    run = make(Shuffled(make_rows(10)), steps=2, max_grad_norm=1e-3)

    def look(step: int, total: int) -> None:
        grads = [p.grad for p in run.policy.parameters() if p.grad is not None]
        norms.append((step, total, nn.utils.get_total_norm(grads).item()))

    run.job = replace(run.job, after_backward=look)
    run.train()
    assert [n[:2] for n in norms] == [(1, 2), (2, 2)]
    assert [n[2] for n in norms] == pytest.approx([event["grad_norm"] for event in run.events])


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.fault(41)
def test_what_is_not_finite_stops_before_the_update(where: str, bad: float) -> None:
    run = make(Shuffled(make_rows(10), size=2, accumulate=2), steps=5, save_every=1)

    def poison(slope: Tensor) -> Tensor:
        if not run.saved or run.saved[-1].step < 2 or where == "loss":
            return slope
        return slope.index_fill(0, torch.tensor([0]), bad)

    run.policy.head.bias.register_hook(poison)

    def poisoned(*args: Any) -> Loss:
        loss = SFT.loss(*args)
        if run.saved and run.saved[-1].step == 2:
            return loss._replace(terms=(loss.terms[0]._replace(sum=loss.terms[0].sum * bad),))
        return loss

    objective = replace(SFT, loss=poisoned) if where == "loss" else SFT
    kept: list[dict[str, Tensor]] = []
    run.job = replace(
        run.job,
        question=replace(run.job.question, objective=objective),
        save=lambda progress: (run.saved.append(progress), kept.append(values(run))) and None,
    )
    with pytest.raises(TrainingError) as caught:
        run.train()
    text = str(caught.value)
    assert "step 3: the loss is " in text and "lr 0.0" in text and "\n" not in text
    examples = [str(e) for batch in run.job.batches.step(8)[0] for e in batch.examples]
    assert f"examples {', '.join(dict.fromkeys(examples))})" in text
    assert [p.step for p in run.saved] == [1, 2] and equal(values(run), kept[-1])
    assert all(torch.isfinite(v).all() for entry in run.job.optimizer.state.values() for v in entry.values())


def unlabelled(rows: list[Row]) -> list[Row]:
    return [row._replace(weights=(0.0,) * len(row.ids)) for row in rows]


def test_step_without_a_label_is_refused() -> None:
    run = make(Shuffled(unlabelled(make_rows(4))), steps=2)
    with pytest.raises(DataError, match=r"step 1: none of its examples \(\d, \d, \d, \d\) has a label"):
        run.train()


@pytest.mark.parametrize("objective", BOTH)
def test_micro_batch_without_a_label_changes_nothing(objective: str) -> None:
    short = [row for row in make_rows(40) if len(row.ids) <= 5][:4]

    @dataclass
    class Fixed(Shuffled):
        extra: bool = False

        def step(self, position: int) -> tuple[list[Batch], int]:
            return [build(short[:2]), *([build(unlabelled(short[2:]))] if self.extra else [])], position + 4

    def asked(policy: Answers, reference: Answers | None, batch: Batch, config: Any) -> Loss:
        assert len(batch.labels.target), "nothing to learn, nothing to compute"
        return BOTH[objective][0].loss(policy, reference, batch, config)

    runs = [make(Fixed(short, extra=extra), objective, "sgd", steps=1) for extra in (False, True)]
    for run in runs:
        question = replace(run.job.question, objective=replace(BOTH[objective][0], loss=asked))
        run.job = replace(run.job, question=question)
        run.train()
    assert equal(values(runs[0]), values(runs[1])), "a term that weighs nothing is left out as well"


def test_evaluation_is_a_weighted_mean_without_dropout_gradients_or_randomness() -> None:
    rows = tuple(make_rows(8, seed=2))
    run = make(Shuffled(make_rows(8), validation=rows), "two", dropout=0.5)
    run.policy.train()
    run.policy.head.eval()
    before = torch.get_rng_state()
    parts = trainer.evaluate(run.job.question, run.job.batches.evaluation(), "cpu")
    whole = trainer.evaluate(run.job.question, [build(rows)], "cpu")
    assert parts is not None and whole is not None
    assert parts == pytest.approx(whole, rel=1e-6) and set(parts) == {"loss", "tokens", "accuracy"}
    assert parts["tokens"] == sum(len(row.ids) for row in rows)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in run.policy.parameters())
    modes = {name: module.training for name, module in run.policy.named_modules()}
    assert modes == {"": True, "embed": True, "dropout": True, "head": False}, "each module in its own mode again"


def test_modes_come_back_when_an_evaluation_breaks() -> None:
    run = make(Shuffled(make_rows(4)), dropout=0.5)
    run.policy.train()

    def broken() -> Iterator[Batch]:
        raise OSError("gone")
        yield

    with pytest.raises(OSError):
        trainer.evaluate(run.job.question, broken(), "cpu")
    assert run.policy.dropout.training


def test_evaluation_without_rows_or_labels() -> None:
    run = make(Shuffled(make_rows(4)), steps=2, eval_every=1)
    run.train()
    assert run.kinds() == [("step", 1), ("step", 2)]
    with pytest.raises(DataError, match="no token of the validation rows is a label"):
        trainer.evaluate(run.job.question, [build(unlabelled(make_rows(2)))], "cpu")


def test_time_limit_ends_as_if_finished() -> None:
    run = make(Shuffled(make_rows(10), validation=tuple(make_rows(4))), steps=10**9, max_seconds=0.2)
    progress = run.train()
    assert progress.seconds >= 0.2 and 0 < progress.step < 10**9
    assert [p.step for p in run.saved] == [progress.step]
    assert run.kinds()[-2:] == [("step", progress.step), ("evaluation", progress.step)]
    spent = replace(run.job, batches=None)  # type: ignore[arg-type]
    assert run.job.finished(progress) and spent.finished(progress._replace(seconds=0.2))


def test_loss_falls() -> None:
    run = make(Shuffled(make_rows(6)), steps=60)
    run.train()
    assert run.events[-1]["loss"] < 0.6 * run.events[0]["loss"]


def test_reference_and_config_reach_the_objective() -> None:
    seen: list[Any] = []
    run = make(Shuffled(make_rows(4)), steps=1)

    def look(policy: Answers, reference: Answers | None, batch: Batch, config: Any) -> Loss:
        seen.append((policy, reference, config))
        return SFT.loss(policy, reference, batch, config)

    other = copy.deepcopy(run.policy)
    question = replace(run.job.question, objective=replace(SFT, loss=look), reference=other)
    run.job = replace(run.job, question=question)
    run.train()
    assert seen == [(run.policy, other, BOTH["sft"][1])]
