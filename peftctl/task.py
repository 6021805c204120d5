"""What a base is asked for beside predicting tokens: a head of its own, with one output a label. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# the ending of the classes that serve each task
TASKS = {
    "causal-lm": "ForCausalLM",
    "seq2seq-lm": "ForSeq2SeqLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}
HEADED = {name: end for name, end in TASKS.items() if name not in ("causal-lm", "seq2seq-lm")}


class Task(NamedTuple):
    name: str  # of HEADED
    labels: tuple[str, ...]


def labelled(task: Task) -> dict[str, Any]:
    """The keys of a model's config that name the outputs of its head."""
    return {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}


def task_of(settings: Mapping[str, Any]) -> Task | None:
    """What a model with this config was made for; None for one that predicts tokens."""
    classes = settings.get("architectures") or [""]
    names = settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # a config does not spell out the default
    known = [name for name, end in HEADED.items() if str(classes[0]).endswith(end)]
    return Task(known[0], tuple(str(names[key]) for key in sorted(names, key=int))) if known else None
