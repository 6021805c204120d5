"""The peer's side of the speed benchmark, in a process of its own: the same job under TRL + peft (or unsloth).

It is given our rows, encoded and in our order, and our hyper-parameters. Seconds and real tokens of each step are
written to OUTPUT/steps.json, the adapter to OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from peftctl.row import Row
from tests.benchmarks.job import Prepared, prepared

SORTED = {"train_sampling_strategy": "group_by_length"}  # the same rows in another order, with less padding
IN_ORDER = {"train_sampling_strategy": "sequential"}
# how it may go about it: arguments of its trainer
VARIANTS: dict[str, dict[str, Any]] = {
    "in order": IN_ORDER,
    "by length": SORTED,
    "by length, eager": SORTED,  # attention as plain products, where a CPU's fused one may be slower
    "by length, autocast": {**SORTED, "bf16": True},  # the adapters' products in bf16 too: the trainer's default
    "in order, autocast": {**IN_ORDER, "bf16": True},
    "precomputed": {**IN_ORDER, "precompute_ref_log_probs": True},  # of pairs: before the first step
    "precomputed, autocast": {**IN_ORDER, "precompute_ref_log_probs": True, "bf16": True},
    "padding-free": {**IN_ORDER, "padding_free": True},  # needs flash attention, which CPUs do not have
    "unsloth": IN_ORDER,
}
ATTENTION = {"by length, eager": "eager", "padding-free": "flash_attention_2"}


def train(job: Prepared, variant: str, output: Path) -> None:
    if variant == "unsloth":
        import unsloth  # noqa: F401  (first of all: it patches what is imported after it)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOTrainer, SFTTrainer

    cuda = job.recipe.train.device == "cuda"

    class Watch(TrainerCallback):
        """Seconds of each step, without the making of its batch, which comes before its begin."""

        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.tokens = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.tokens, self.begun = 0, _now(cuda)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps.append({"seconds": _now(cuda) - self.begun, "tokens": self.tokens})

    watch = Watch()

    paired = job.recipe.objective.name == "dpo"

    class Trainer(DPOTrainer if paired else SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset if paired else super()._prepare_dataset(dataset, *rest)  # pairs are encoded already

        def _get_train_sampler(self, *rest: Any) -> Any:
            return order if paired else super()._get_train_sampler(*rest)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            watch.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest, **named)

    model, low_rank = _unsloth(job) if variant == "unsloth" else _peft(job, variant)
    rows = [row for step in job.steps for batch in step for row in batch.rows]
    order, encoded = _pairs(rows) if paired else ([], _dialogues(rows))
    trainer = Trainer(
        model=model,
        args=_arguments(job, VARIANTS[variant], output),
        train_dataset=Dataset.from_dict(encoded),
        processing_class=AutoTokenizer.from_pretrained(job.base.tokenizer),
        peft_config=low_rank,
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model(str(output))
    (output / "steps.json").write_text(json.dumps(watch.steps))


def _dialogues(rows: list[Row]) -> dict[str, list[list[int]]]:
    return {
        "input_ids": [list(row.ids) for row in rows],
        "completion_mask": [[int(bool(weight)) for weight in row.weights] for row in rows],
    }


def _pairs(rows: list[Row]) -> tuple[list[int], dict[str, list[list[int]]]]:
    """Each pair once, and the order in which they come, some of them in two epochs.

    Chosen and rejected follow each other; the prompt is what comes before a row's first label.
    """
    found: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    places: dict[int, int] = {}
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        if chosen.example in places:
            continue
        places[chosen.example] = len(places)
        start = next(k for k, weight in enumerate(chosen.weights) if weight)
        columns = (chosen.ids[:start], chosen.ids[start:], rejected.ids[start:])
        for column, ids in zip(found.values(), columns, strict=True):
            column.append(list(ids))
    return [places[row.example] for row in rows[::2]], found


def _now(cuda: bool) -> float:
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _arguments(job: Prepared, own: dict[str, Any], output: Path) -> Any:
    from trl import DPOConfig, SFTConfig

    settings = job.recipe.train
    common: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "max_length": job.recipe.data.max_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": False,  # the weights are of the recipe's dtype already
        "use_cpu": settings.device != "cuda",
        "dataloader_pin_memory": settings.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": settings.seed,
    }
    if job.recipe.objective.name == "dpo":
        return DPOConfig(**common | own, beta=job.recipe.objective.beta)
    return SFTConfig(**common | own, completion_only_loss=True)


def _peft(job: Prepared, variant: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    method = job.recipe.method
    dtype, attention = getattr(torch, job.recipe.model.dtype), ATTENTION.get(variant, "sdpa")
    model = AutoModelForCausalLM.from_pretrained(job.base.weights, dtype=dtype, attn_implementation=attention)
    return model, LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or 2 * method.rank,
        lora_dropout=method.dropout,
        target_modules=method.target_modules,
        task_type="CAUSAL_LM",
    )


def _unsloth(job: Prepared) -> tuple[Any, None]:
    import torch
    from unsloth import FastLanguageModel

    method, data = job.recipe.method, job.recipe.data
    dtype = getattr(torch, job.recipe.model.dtype)
    model, _ = FastLanguageModel.from_pretrained(
        str(job.base.weights), max_seq_length=data.max_length, dtype=dtype, load_in_4bit=False
    )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model,
        r=method.rank,
        lora_alpha=method.alpha or 2 * method.rank,
        lora_dropout=method.dropout,
        target_modules=linears if method.target_modules == "all-linear" else method.target_modules,
        use_gradient_checkpointing=job.recipe.train.gradient_checkpointing,
    ), None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--variant", choices=VARIANTS, default="in order")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    train(prepared(given.recipe, given.set), given.variant, given.output)
