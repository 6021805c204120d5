"""Metrics of answers are those of the field's libraries, called by hand, whatever the order of the answers."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from peftctl import metrics
from peftctl.errors import InputError
from peftctl.metrics import NAMES, check, fault, of_all, of_each

RIGHT = ["the cat sat on the mat", "there is a house by the sea", "Eight.", "one two three four five six", "no"]
SAID = ["the cat sat down on a mat", "there is a house", " Eight.\n", "six five four three two one", ""]


def test_by_hand() -> None:
    found = of_all(["the cat sat"], ["the cat sat down"], ["exact_match", "rouge1", "rouge2", "rougeL"])
    # of words 3 of 3 and 3 of 4, of pairs 2 of 2 and 2 of 3, and the longest in common has 3
    assert found == {"exact_match": 0.0, "rouge1": pytest.approx(6 / 7), "rouge2": 0.8, "rougeL": pytest.approx(6 / 7)}
    assert of_all(["a b", " c\n"], ["a b.", "c"], ["exact_match"]) == {"exact_match": 0.5}


def _bleu(said: list[str], right: list[str]) -> float:
    """The corpus' counts put together (no word here needs sacrebleu's tokenizer, and no count is 0)."""
    shares = []
    for n in range(1, 5):
        same = total = 0
        for ours, theirs in zip(said, right, strict=True):
            a, b = (Counter(zip(*(text.split()[k:] for k in range(n)), strict=False)) for text in (ours, theirs))
            same, total = same + sum((a & b).values()), total + sum(a.values())
        shares.append(math.log(same / total))
    ours, theirs = (sum(len(text.split()) for text in texts) for texts in (said, right))
    return 100 * math.exp(sum(shares) / 4 + min(0, 1 - theirs / ours))


def test_bleu_is_of_the_corpus() -> None:
    said = ["the cat sat on the mat today", "there is a house by the sea", "no one is here any more"]
    right = ["the cat sat on the mat", "there is a house by the cold sea", "nobody is here any more now"]
    found = of_all(said, right, ["bleu"])["bleu"]
    assert found == pytest.approx(_bleu(said, right), rel=1e-9)
    rows = [of_all([a], [b], ["bleu"])["bleu"] for a, b in zip(said, right, strict=True)]
    assert abs(found - sum(rows) / 3) > 1


def test_the_libraries_called_by_hand() -> None:
    found = of_all(SAID, RIGHT, NAMES)
    assert list(found) == list(NAMES) and found["exact_match"] == 1 / 5
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        scores = [scorer.score(right, said)[name].fmeasure for said, right in zip(SAID, RIGHT, strict=True)]
        assert found[name] == pytest.approx(sum(scores) / 5, rel=1e-12) and 0 < found[name] < 1
        assert [own[name] for own in of_each(SAID, RIGHT, NAMES)] == scores
    said = [text.strip() for text in SAID]
    assert found["bleu"] == sacrebleu.corpus_bleu(said, [RIGHT]).score > 0
    assert found["chrf"] == sacrebleu.corpus_chrf(said, [RIGHT]).score > 0


def test_the_order_of_the_answers_changes_no_bit() -> None:
    words = "a b c d e f g".split()
    draw = random.Random(0)
    pairs = [tuple(" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(2)) for _ in range(40)]
    whole = of_all(*zip(*pairs, strict=True), NAMES)
    for _ in range(3):
        draw.shuffle(pairs)
        assert of_all(*zip(*pairs, strict=True), NAMES) == whole


def test_what_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(fault(name) is None for name in NAMES)
    assert fault("rougel") == (
        "there is no metric 'rougel'; did you mean rougeL? there are exact_match, rouge1, rouge2, rougeL, bleu, chrf"
    )
    assert str(fault("accuracy")).startswith("there is no metric 'accuracy'; there are exact_match")
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    check(["exact_match"], "--metrics")
    for name, package in (("rouge2", "rouge-score"), ("bleu", "sacrebleu")):
        with pytest.raises(
            InputError, match=rf"^--metrics: {name} is measured by .*not installed: pip install {package}$"
        ):
            check(["exact_match", name], "--metrics")


DRAWN = """
import random
from peftctl.metrics import NAMES, of_all
random.seed(0)
state = random.getstate()
assert of_all(["a"], ["a"], NAMES) and state == random.getstate()
"""


def test_measuring_draws_nothing() -> None:
    subprocess.run([sys.executable, "-c", DRAWN], check=True)
