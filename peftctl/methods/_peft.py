"""What the `peft` package's files have in common, whatever the method."""

from __future__ import annotations

from collections.abc import Iterable

from peftctl.errors import FormatError
from peftctl.skeleton import Skeleton

PREFIX = "base_model.model."


def task_type(skeleton: Skeleton) -> str | None:
    """peft's name for what the model does; None where it has no head that peft knows."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for end, task in kinds.items() if skeleton.architecture.endswith(end)), None)


def number(value: float) -> int | float:
    """A whole number as an integer, as peft's own files have it."""
    return int(value) if value == int(value) else value


def place(name: str, ends: Iterable[str], skeleton: Skeleton) -> tuple[str, str]:
    """The module path and the ending of a tensor's name. Raises FormatError when it is not one that we know."""
    end = next((end for end in ends if name.endswith(end)), None)
    if end is None or not name.startswith(PREFIX):
        raise FormatError(f"adapter_model.safetensors: {name} is no tensor that this method reads")
    path = name[len(PREFIX) : -len(end)]
    if not any(module.path == path for module in skeleton.modules):
        raise FormatError(f"adapter_model.safetensors: {name} belongs to {path}, which {skeleton.architecture} lacks")
    return path, end
