"""GRPO: its loss is TRL's, its advantages are the paper's, and its answers are scored by the recipe's functions."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl.batch import Batch, build
from peftctl.data.chat import Chat
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.objectives.base import Answer
from peftctl.row import Example, Message, Row
from tests import runs
from tests.objectives.paired import Says, some
from tests.objectives.test_trl import bare, the_same

GRPO = get("grpo")
LENGTH = {"name": "length", "characters": 10}
KINDS = {"grpo": "grpo", "dr-grpo": "dr_grpo", "dapo": "dapo"}
MOST = 9


def config(**settings: Any) -> Any:
    plain = {"name": "grpo", "rewards": [LENGTH], "group_size": 3, "max_new_tokens": MOST}
    return GRPO.config.model_validate(plain | settings)


def batch_of(advantages: list[float], old: Tensor | None = None) -> Batch:
    """Answers of 2, 3, ... tokens with these advantages, and perhaps the log-probabilities they were given with."""
    rows, start = [], 0
    for i, advantage in enumerate(advantages):
        answer = tuple(range(5 + i, 7 + 2 * i))
        extra: dict[str, Any] = {"advantage": advantage, "measured": {"reward": float(i)}}
        if old is not None:
            extra["old"] = old[start : start + len(answer)].tolist()
        start += len(answer)
        rows.append(Row((1, 2, *answer), (0.0, 0.0, *(1.0,) * len(answer)), 0, extra=extra))
    return build(rows)


def theirs(trainer: type, kind: str, batch: Batch, policy: Tensor, settings: dict[str, Any], **spoken: Tensor) -> Any:
    """GRPOTrainer's own loss and metrics; the model's answers are put in its mouth."""
    owner, starts = batch.labels.row, dict[int, int]()
    columns = torch.tensor([i - starts.setdefault(int(r), i) for i, r in enumerate(owner)])

    def rectangle(values: Tensor) -> Tensor:
        return values.new_zeros(len(batch.rows), MOST + 3).index_put((owner, columns), values)

    mask = rectangle(torch.ones_like(policy.detach()))
    made = bare(
        trainer,
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type=KINDS[settings["loss"]],
        epsilon_low=settings["clip"],
        epsilon_high=settings["clip_high"] or settings["clip"],
        beta=settings["beta"],
        max_completion_length=MOST,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (rectangle(policy), torch.zeros_like(mask), None),
    )
    made.accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
    ids = torch.zeros(len(batch.rows), 1).long()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": mask.long(), "completion_mask": mask}
    inputs |= {"advantages": policy.new_tensor([row.extra["advantage"] for row in batch.rows])}
    inputs |= {"num_items_in_batch": mask.sum(), **{name: rectangle(values) for name, values in spoken.items()}}
    return made._compute_loss(None, inputs), made._metrics["eval"]


@pytest.fixture(scope="module")
def trainer() -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOTrainer
    return GRPOTrainer


@pytest.mark.parametrize("again", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("clip_high", [None, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics_are_those_of_trl(kind, clip_high, beta, again, trainer):
    advantages = [1.5, -0.7, 0.0, 0.4, -1.2]
    plain = batch_of(advantages)
    policy, old, reference = (some(plain, seed, torch.float64) for seed in (1, 2, 3))
    old = policy + 0.2 * (old - policy)  # near enough that some ratios are clipped and some are not
    batch = batch_of(advantages, old if again else None)
    policy.requires_grad_()
    settings = {"loss": kind, "clip": 0.1, "clip_high": clip_high, "beta": beta}
    spoken = {"ref_per_token_logps": reference} | ({"old_per_token_logps": old} if again else {})
    their_loss, their_metrics = theirs(trainer, kind, batch, policy, settings, **spoken)
    own = config(**settings)
    assert (GRPO.reference(own) is None) == (beta == 0)
    found = GRPO.loss(Says(policy), Says(reference) if beta else None, batch, own)
    the_same(found.terms[0].sum / GRPO.weights(batch, own)[0], their_loss, policy)
    total, count = found.metrics["clip_fraction"]
    assert float(total / count) == pytest.approx(their_metrics["clip_ratio/region_mean"][0], rel=1e-6)
    assert (float(total) > 0) == again and float(total / count) < 1
    if beta:
        total, count = found.metrics["kl"]
        assert float(total / count) == pytest.approx(their_metrics["kl"][0], rel=1e-6)


def test_a_clipped_token_has_no_gradient_but_the_references():
    """By hand: one token, twice as likely as when it was given, and rewarded: it has gained enough."""
    row = Row((1, 2), (0.0, 1.0), 0, extra={"advantage": 1.0, "measured": {}, "old": [math.log(0.25)]})
    policy = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([math.log(0.25)], dtype=torch.float64)
    found = GRPO.loss(Says(policy), Says(reference), build([row]), config(clip=0.2, beta=0.1))
    kl = 0.5 - math.log(0.5) - 1  # k3 of a ratio of one half
    assert float(found.terms[0].sum.detach()) == pytest.approx(-1.2 + 0.1 * kl, rel=1e-12)
    found.terms[0].sum.backward()
    assert float(policy.grad) == pytest.approx(0.1 * (1 - 0.5), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_equals_its_parts(kind):
    own = config(loss=kind, beta=0.0)
    batch = batch_of([1.5, -0.7, 0.0, 0.4])
    policy = some(batch, 1)
    whole = GRPO.loss(Says(policy), None, batch, own)
    sums, weights = [], []
    for rows in ([0, 1], [2, 3]):
        kept = torch.isin(batch.labels.row, torch.tensor(rows))
        part = build([batch.rows[i] for i in rows])
        sums.append(float(GRPO.loss(Says(policy[kept]), None, part, own).terms[0].sum))
        weights.append(GRPO.weights(part, own)[0])
    assert float(whole.terms[0].sum) == pytest.approx(sum(sums), rel=1e-6)
    assert GRPO.weights(batch, own)[0] == sum(weights)


TEXTS = [["ab", "abcde", "0123456789"], ["same", "same", "same"]]


def rolled(**settings: Any) -> list[Row]:
    prompts = [Row((1, 2), (0.0, 0.0), n, extra={"prompt": "q", "answer": "abcde"}) for n in range(2)]

    def generate(rows: Any, count: int, most: int) -> list[list[Answer]]:
        assert (list(rows), count, most) == (prompts, 3, MOST)
        return [[Answer(tuple(map(ord, text)), text, k > 0) for k, text in enumerate(group)] for group in TEXTS]

    assert GRPO.rollout is not None
    return GRPO.rollout(generate, prompts, config(**settings))


def test_advantages_are_those_of_the_group():
    rewards = [LENGTH, {"name": "exact", "weight": 2.0}]
    rows = rolled(rewards=rewards)
    totals = [0.2, 0.5 + 2.0, 1.0]  # lengths 2, 5 and 10 of 10; the second is the answer
    expected = [(total - fmean(totals)) / (stdev(totals) + 1e-4) for total in totals]
    assert [row.extra["advantage"] for row in rows] == pytest.approx([*expected, 0, 0, 0], rel=1e-12)
    bare = [row.extra["advantage"] for row in rolled(rewards=rewards, loss="dr-grpo")]
    assert bare == pytest.approx([total - fmean(totals) for total in totals] + [0, 0, 0], rel=1e-12)
    first = rows[0].extra["measured"]
    assert first["reward"] == pytest.approx(0.2) and first["reward_std"] == pytest.approx(stdev(totals))
    assert [row.extra["measured"]["zero_variance"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row.extra["measured"]["rewards/exact"] for row in rows] == [0, 1, 0, 0, 0, 0]
    assert [row.extra["measured"]["completions/ended"] for row in rows] == [0, 1, 1, 0, 1, 1]
    assert [row.extra["measured"]["completions/length"] for row in rows] == [2, 5, 10, 4, 4, 4]
    assert rows[1].ids == (1, 2, *b"abcde") and rows[1].weights == (0, 0, 1, 1, 1, 1, 1)
    assert [row.example for row in rows] == [0, 0, 0, 1, 1, 1]


def test_every_measure_is_a_mean_over_answers():
    rows = rolled()
    batch = build(rows)
    metrics = GRPO.loss(Says(some(batch, 1)), None, batch, config(beta=0.0)).metrics
    found = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert found["zero_variance"] == 0.5 and found["completions/length"] == pytest.approx(29 / 6)
    assert found["reward"] == found["rewards/length"] == pytest.approx((0.2 + 0.5 + 1.0 + 3 * 0.4) / 6)
    assert found["completions/ended"] == pytest.approx(4 / 6) and found["clip_fraction"] == 0


def test_any_row_with_a_prompt_is_asked():
    chat = Chat(runs.CONFIGS / "tokenizer")
    talk = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    for example, asked, ids in (
        (Example("messages", "", talk), "c", chat.render_prompt(talk[:3])),
        (Example("prompt", "", talk[:3], completion="d"), "c", chat.render_prompt(talk[:3])),
        (Example("completion", "", (), "what?", "d"), "what?", chat.prompt("what?")),
        (Example("prompt", "", (), "what?", "d"), "what?", chat.prompt("what?")),
    ):
        (row,) = GRPO.encode(example, chat, config())
        assert row.ids == ids and not any(row.weights) and row.extra == {"prompt": asked, "answer": "d"}
    (row,) = GRPO.encode(Example("prompt", "", (), "what?"), chat, config())
    assert row.extra["answer"] is None
    with pytest.raises(DataError, match="no 'answer', which the reward exact compares with"):
        GRPO.encode(Example("prompt", "", (), "what?"), chat, config(rewards=[{"name": "exact"}]))
    with pytest.raises(DataError, match="nothing stands before"):
        GRPO.encode(Example("messages", "", talk[1:2]), chat, config())
