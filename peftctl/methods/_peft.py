"""What the `peft` package's files have in common, whatever the method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftctl.errors import FormatError, several
from peftctl.skeleton import Skeleton, experts

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


def shortest(paths: Sequence[str], skeleton: Skeleton) -> list[str]:
    """Names that match these modules and no others: their last parts where these will do, else whole paths."""
    ends = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    known = (*skeleton.modules, *skeleton.added, *experts(skeleton))
    matched = {m.path for m in known if m.path.rsplit(".", 1)[-1] in ends}
    return ends if matched == set(paths) else list(paths)


def targeting(peft_type: str, skeleton: Skeleton, paths: Sequence[str]) -> dict[str, Any]:
    """The keys of every method that changes the weights of these modules."""
    kinds = {module.path: module.kind for module in skeleton.modules}
    return {
        "peft_type": peft_type,
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "target_modules": shortest(paths, skeleton),
        "bias": "none",
        "fan_in_fan_out": any(kinds[path] == "Conv1D" for path in paths),
        "modules_to_save": None,
    }


def refuse(keys: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """What a reader of peft's config must not overlook, with the values that change nothing. Raises FormatError."""
    for key, values in harmless.items():
        if keys.get(key) not in values:
            raise FormatError(f"adapter_config.json: {key} is {keys[key]!r}, which cannot be read yet")


def renamed(tensors: Mapping[str, Any], names: Mapping[str, str], skeleton: Skeleton) -> dict[str, Any]:
    """Tensors of a file under our names; `names` maps the ending of a name there to ours, the first that fits.

    Raises FormatError, which names those that have no place here.
    """
    paths, found, wrong = {module.path for module in skeleton.modules}, dict[str, Any](), list[str]()
    for name, tensor in tensors.items():
        end = next((end for end in names if name.startswith(PREFIX) and name.endswith(end)), None)
        path = name[len(PREFIX) : -len(end)] if end is not None else ""
        if end is None:
            wrong.append(f"{name} {tuple(tensor.shape)} is no tensor that this method reads")
        elif path not in paths:
            wrong.append(f"{name} {tuple(tensor.shape)} belongs to {path}, which {skeleton.architecture} lacks")
        else:
            found[f"{path}.{names[end]}"] = tensor
    if wrong:
        raise FormatError(f"adapter_model.safetensors: {several(wrong)}")
    if not found:
        raise FormatError(f"adapter_model.safetensors holds none of {', '.join(names)}")
    return found


def paths_of(tensors: Iterable[str]) -> list[str]:
    """The modules that tensors under our names belong to, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
