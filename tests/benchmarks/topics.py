"""Which topic a turn is about, on a real encoder: accuracy and trained parameters of several methods, the same seeds.

`make bench-topics` runs it. What is done is kept in runs/topics. The rate of each method is the best one of those that
ARGS="--choose" tries, with another seed, by the accuracy on a fifth of the training turns; the new head beside any of
them learns at the rate that is best for the head alone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from peftctl import recipe, run
from peftctl.plan import Options
from peftctl.report import read

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "minilm-topics.yaml"
SEEDS = (0, 1, 2)
CHOOSING = 7  # the seed that the rates are chosen with
HEAD = 3e-1
# of each method its block and the rate that was chosen
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"name": "lora", "rank": 8, "alpha": 16, "target_modules": "[query, key, value, dense]"}, 2e-3),
    "bottleneck": ({"name": "bottleneck", "preset": "pfeiffer", "reduction_factor": 8}, 5e-3),
    "prefix": ({"name": "prefix", "num_virtual_tokens": 20}, 1e-1),
    "bitfit": ({"name": "bitfit"}, 3e-3),
    "head": ({"name": "head"}, HEAD),
    "full": ({"name": "full"}, 1e-4),
}
TRIED = {
    "lora": (5e-4, 1e-3, 2e-3),
    "bottleneck": (1e-3, 2e-3, 5e-3),
    "prefix": (1e-2, 3e-2, 1e-1),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "head": (1e-1, 3e-1, 1e0),
    "full": (5e-5, 1e-4, 2e-4),
}
JOB = ("train.epochs=4", "train.batch_size=32", "train.eval_every=null", "train.keep=1", "train.device=cpu")


def trained(method: str, seed: int, rate: float, choosing: bool = False) -> dict[str, Any]:
    """Parameters, and the figures on held-out turns at the end; `choosing`: on a part of the training turns instead."""
    block, _ = METHODS[method]
    output = ROOT / "runs" / "topics" / f"{'choice-' if choosing else ''}{method}-{seed}-{rate:g}"
    keys = [f"method={{{', '.join(f'{key}: {value}' for key, value in block.items())}}}"]
    keys += [
        *JOB,
        f"train.seed={seed}",
        f"train.learning_rate={rate}",
        f"train.head_learning_rate={rate if method == 'head' else HEAD}",
    ]
    keys += ["data.validation=0.2"] if choosing else []
    wanted = recipe.load(RECIPE, keys, options={"output": str(output)})
    options = Options(quiet=True, verify=False, resume=(output / "run.json").is_file())
    done = run.train(wanted, options)
    last = [event for event in read(output / "metrics.jsonl") if event["event"] == "evaluation"][-1]
    counts = run.RunFolder(output, Options()).document["counts"]
    figures = {name: last[f"validation_{name}"] for name in ("loss", "accuracy", "f1_macro", "matthews")}
    return figures | {"adapter": counts["adapter"], "head": counts["saved_modules"], "seconds": done["seconds"]}


def choose(method: str) -> None:
    for rate in TRIED[method]:
        found = trained(method, CHOOSING, rate, choosing=True)
        print(f"{method:<11}{rate:<6g}accuracy {found['accuracy']:.3f}  loss {found['loss']:.3f}", flush=True)


def line(method: str, found: list[dict[str, Any]]) -> str:
    accuracy = [one["accuracy"] for one in found]
    spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
    mean = {name: statistics.mean(one[name] for one in found) for name in ("f1_macro", "matthews", "seconds")}
    return (
        f"{method:<11} {found[0]['adapter']:>11,} {found[0]['head']:>7,}  {statistics.mean(accuracy):.3f} "
        f"+- {spread:.3f}  {mean['f1_macro']:.3f}  {mean['matthews']:.3f}  {mean['seconds']:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--choose", action="store_true", help="try rates on a part of the training turns")
    asked = parser.parse_args()
    if asked.choose:
        for method in asked.method or METHODS:
            choose(method)
        return
    print(
        f"{'method':<11} {'adapter':>11} {'head':>7}  {'accuracy':<14}  {'F1':<5}  {'MCC':<5}  {'seconds':>7}",
        flush=True,
    )
    for method in asked.method or METHODS:
        rate = METHODS[method][1]
        print(line(method, [trained(method, seed, rate) for seed in asked.seed or SEEDS]), flush=True)


if __name__ == "__main__":
    main()
