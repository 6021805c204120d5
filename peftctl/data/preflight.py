"""What is known of a recipe's rows before anything is trained on them: figures, and what in them is suspicious."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from peftctl.data.encoded import Dataset, Report, listed

BINS = 8
BAR = 32  # characters of the longest bar


class Lengths(NamedTuple):
    """The figures of a report on its sequences' lengths."""

    median: int = 0
    p90: int = 0
    longest: int = 0
    histogram: tuple[int, ...] = ()


def lengths(tokens: Iterable[int]) -> Lengths:
    """Of sequences with so many tokens each, which may be counted already."""
    counts = Counter(tokens)
    if not counts:
        return Lengths()
    total, longest = counts.total(), max(counts)
    bins = [0] * BINS
    for size, count in counts.items():
        bins[(size - 1) // width(longest)] += count
    passed = list(accumulate(counts[size] for size in sorted(counts)))
    middle, ninth = (sorted(counts)[bisect_right(passed, total * share // 10)] for share in (5, 9))
    return Lengths(middle, ninth, longest, tuple(bins))


def width(longest: int) -> int:
    """Of a histogram's step, in tokens."""
    return -(-longest // BINS)


def overlap(train: Dataset, held: Dataset | None) -> tuple[int, int]:
    """How many training examples stood before among them, and how many held-out ones are trained on as well."""
    own = listed(train.examples)
    seen = set(map(own.digest, range(len(own))))
    if held is None:
        return len(own) - len(seen), 0
    others = listed(held.examples)
    return len(own) - len(seen), sum(others.digest(index) in seen for index in range(len(others)))


def summary(report: Report) -> str:
    """A source in one line."""
    refused = f" ({report.refused:,} refused)" if report.refused else ""
    cut = f", {report.truncated:,} cut to data.max_length" if report.truncated else ""
    share = 100 * report.labelled_tokens / max(report.tokens, 1)
    return (
        f"{report.name}: {report.kept:,} rows{refused}{cut}, p50 {report.median:,}, p90 {report.p90:,}, longest "
        f"{report.longest:,} tokens, {share:.3g}% of them labels"
    )


def warnings(report: Report, repeated: int = 0, leaked: int = 0) -> list[str]:
    """What is likely to be a mistake, though training is possible; each a line."""
    counts = {
        "rows left out because no token of theirs would be learnt": report.unlabelled,
        "sequences that begin with BOS twice (is it in the rows' text as well?)": report.bos_doubled,
        "sequences that lack what the tokenizer puts before a text, BOS (does the chat template leave it out?)": (
            report.bos_missing
        ),
        "training examples that stand in the data more than once": repeated,
        "held-out examples that are trained on as well, so that the validation loss will flatter": leaked,
    }
    found = [f"{text}: {count:,}" for text, count in counts.items() if count]
    if 2 * report.ended < report.answers:
        found.insert(
            0,
            f"only {report.ended:,} of {report.answers:,} sequences end with a label that ends an answer: "
            "the model will not learn to stop",
        )
    return found


def document(report: Report) -> dict[str, Any]:
    """A report as JSON."""
    step = width(report.longest)
    first = {
        "rows": report.read,
        "kept": report.kept,
        "refused": report.refused,
        "sequences": report.sequences,
        "tokens": report.tokens,
        "labelled_tokens": report.labelled_tokens,
        "labelled_share": round(report.labelled_tokens / max(report.tokens, 1), 6),
        "p50": report.median,
        "p90": report.p90,
        "longest": report.longest,
    }
    lists = {
        "faults": list(map(str, report.faults)),
        "unused": list(report.unused),
        "histogram": [[n * step + 1, (n + 1) * step, count] for n, count in enumerate(report.histogram)],
    }
    rest = {key: value for key, value in report._asdict().items() if key not in ("read", "median", *lists)}
    return first | rest | lists


def bars(histogram: Sequence[Sequence[int]]) -> list[str]:
    """A histogram of `document` as lines to read."""
    most = max((count for _, _, count in histogram), default=0)
    edge = len(f"{histogram[-1][1]:,}") if histogram else 0
    return [
        f"  {first:>{edge},} to {last:>{edge},}  {'#' * -(-BAR * count // most):<{BAR}} {count:,}"
        for first, last, count in histogram
    ]
