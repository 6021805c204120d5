"""The same SFT job here and under TRL + peft: time, memory, and the loss on held-out rows measured by one program.

Usage: python tests/benchmarks/sft_against_trl.py RECIPE [--steps N] [--rounds N]

Each side is a process of its own, in turn. Both get the same encoded rows with the same labels, the same start
(rank, alpha, targets, seed of the data order apart), optimizer, schedule, dtype and threads. Both results are
adapters, measured by `peftctl eval` on the recipe's validation file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "peftctl.cli"]


def ours(recipe: str, steps: int, output: str) -> dict[str, Any]:
    begun = time.perf_counter()
    overrides = [f"train.max_steps={steps}", "train.eval_every=null", "train.save_every=null"]
    options = [word for o in overrides for word in ("--set", o)]
    done = subprocess.run(
        [*COMMAND, "train", recipe, "--output", output, "--no-verify", "--json", *options],
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    result["process_seconds"] = time.perf_counter() - begun
    return result | {"adapter": result["adapter"]}


def theirs(recipe: str, steps: int, output: str) -> dict[str, Any]:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, recipe, "--peer", output, "--steps", str(steps)],
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"process_seconds": time.perf_counter() - begun, "adapter": output}


def peer(path: str, steps: int, output: str) -> None:
    """The job under TRL + peft, in this process."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from peftctl import objectives, recipe
    from peftctl.data.dataset import prepare
    from peftctl.plan import base_and_chat

    wanted = recipe.load(Path(path), [])
    base, chat = base_and_chat(wanted)
    data = prepare(wanted, chat, objectives.get(wanted.objective.name))
    rows = [row for example in data.train.examples for row in example]
    encoded = {
        "input_ids": [list(row.ids) for row in rows],
        "completion_mask": [[int(bool(w)) for w in row.weights] for row in rows],
    }
    settings, method = wanted.train, wanted.method
    model = AutoModelForCausalLM.from_pretrained(base.weights, dtype=getattr(torch, wanted.model.dtype))
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or 0.0,
        max_length=wanted.data.max_length,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=settings.device != "cuda",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
    )
    low_rank = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or 2 * method.rank,
        lora_dropout=method.dropout,
        target_modules=method.target_modules,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(encoded),
        processing_class=AutoTokenizer.from_pretrained(base.tokenizer),
        peft_config=low_rank,
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    trainer.save_model(output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"training_seconds": seconds, "peak_memory_bytes": peak}))


def held_out(adapter: str, recipe: str, base: str) -> dict[str, Any]:
    from peftctl import recipe as recipes

    file = str(recipes.load(Path(recipe), []).data.validation)
    command = [*COMMAND, "eval", adapter, "--data", file, "--base", base, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", metavar="OUTPUT", help="run the peer's side alone")
    given = parser.parse_args()
    if given.peer:
        return peer(given.recipe, given.steps, given.peer)
    from peftctl import recipe as recipes

    base = recipes.load(Path(given.recipe), []).model.name
    packages = ("torch", "transformers", "trl", "peft")
    print(", ".join(f"{name} {version(name)}" for name in packages), f"- {os.cpu_count()} processors")
    print(f"{'round':<6}{'side':<12}{'process s':>10}{'training s':>11}{'peak GB':>9}{'held-out loss':>15}")
    for number in range(1, given.rounds + 1):
        for name, side in (("peftctl", ours), ("trl + peft", theirs)):
            with tempfile.TemporaryDirectory() as folder:
                result = side(given.recipe, given.steps, f"{folder}/run")
                loss = held_out(result["adapter"], given.recipe, base)["loss"]
            training = result.get("training_seconds", result.get("seconds"))
            print(
                f"{number:<6}{name:<12}{result['process_seconds']:>10.1f}{training:>11.1f}"
                f"{result['peak_memory_bytes'] / 1e9:>9.2f}{loss:>15.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
