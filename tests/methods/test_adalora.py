"""AdaLoRA's own: the budget, who is pruned, the penalty and files; the `peft` package is the oracle of all four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from peftctl import policy, surgery
from peftctl.errors import FormatError, InputError, TargetError
from peftctl.methods.adalora import METHOD, AdaloraConfig
from peftctl.methods.adalora.budget import Schedule
from peftctl.methods.adalora.peft import EXCHANGE
from peftctl.surgery import skeleton
from tests.methods import contract, exchange
from tests.models import inputs, logits, tiny


def adalora(**keys: Any) -> AdaloraConfig:
    return AdaloraConfig(name="adalora", **({"rank": 3, "initial_rank": 5} | keys))


VARIANTS = [
    ("llama", adalora(target_modules=["q_proj", "v_proj"], alpha=12.0)),
    ("llama", adalora(dropout=0.3, layers=[1])),
    ("gpt2", adalora()),
]


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_variants_keep_the_contract(name: str, config: AdaloraConfig, check: Any) -> None:
    check(config, name)


def test_counts_by_hand() -> None:
    table = skeleton(tiny("llama"))
    assert METHOD.count(table, adalora(target_modules=["q_proj"])).total == 2 * 5 * (32 + 1 + 32)
    assert AdaloraConfig(name="adalora").first_rank == 12  # the paper's one and a half times


def scrambled(attachment: Any, seed: int) -> None:
    """Other values and other gradients, everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def ranks(attachment: Any) -> list[int]:
    return [int(delta.e.count_nonzero()) for delta in attachment.deltas]


def test_the_budget_falls_by_the_cubic_law_to_the_target() -> None:
    schedule = Schedule.of(adalora(rank=4, initial_rank=8, budget_warmup=0.1, budget_final=0.2, interval=1), 100)
    assert (schedule.start, schedule.end) == (10, 80)
    assert [schedule.budget(step, 10) for step in (1, 10, 45, 80, 100)] == [80, 80, 40 + 40 // 8, 40, 40]
    pruning = [step for step in range(1, 101) if schedule.prunes(step)]
    assert pruning == list(range(11, 81))
    sparse = Schedule.of(adalora(budget_warmup=7.0, budget_final=20.0, interval=30), 100)
    assert [step for step in range(1, 101) if sparse.prunes(step)] == [37, 67, 80]


def test_the_budget_is_shared_by_all_and_final_at_the_end() -> None:
    config = adalora(rank=2, initial_rank=6, interval=2, budget_final=0.25)
    _, attachment = contract.attached(config, "llama")
    for step in range(1, 17):
        scrambled(attachment, step)
        attachment.after_backward(step, 16)
        if step == 12:
            final = ranks(attachment)
    assert sum(final) == 2 * 14 and len(set(final)) > 1
    # what the optimizer does to a pruned one afterwards no longer counts
    assert [int(delta.keep.sum()) for delta in attachment.deltas] == final
    for delta in attachment.deltas:
        pruned = delta.product().a[delta.keep == 0]
        assert not pruned.any() and delta.e[delta.keep == 0].all()


def test_where_the_last_prunings_own_step_is_skipped_the_next_one_prunes() -> None:
    config = adalora(rank=2, initial_rank=6, interval=2, budget_final=0.25)
    _, attachment = contract.attached(config, "llama")
    for step in (*range(1, 12), 14):  # 12 is the last pruning's, 13 was skipped as well
        scrambled(attachment, step)
        attachment.after_backward(step, 16)
    kept = [int(delta.keep.sum()) for delta in attachment.deltas]
    assert sum(kept) == 2 * 14
    held = {name: tensor.clone() for name, tensor in attachment.tensors().items()}
    scrambled(attachment, 15)
    attachment.after_backward(15, 16)
    assert [int(delta.keep.sum()) for delta in attachment.deltas] == kept
    assert all(torch.equal(held[n], t) for n, t in attachment.tensors().items() if "importance" in n), "for good"


def test_a_frozen_copy_is_not_pruned_with_the_policy() -> None:
    model, attachment = contract.attached(adalora(rank=2), "llama")
    contract.disturb(attachment)
    before, copy = contract.answer(model, attachment), policy.frozen_copy(attachment)
    scrambled(attachment, 0)
    attachment.after_backward(7, 10)
    with surgery.swapped(attachment.moving(), copy):
        assert torch.equal(contract.answer(model, attachment), before)
    assert not all(delta.keep.all() for delta in attachment.deltas)


def oracle(config: AdaloraConfig, total: int, final: int) -> Any:
    theirs = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        **{"target_r": config.rank, "init_r": config.first_rank, "lora_alpha": 2 * config.first_rank},
        **{"total_step": total, "tinit": 0, "tfinal": final, "deltaT": config.interval},
        orth_reg_weight=config.orthogonality,
    )
    return peft.get_peft_model(tiny("llama"), theirs)


def same(model: Any, attachment: Any) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Our parameters with peft's, which get our values and gradients."""
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if ".default" in n}
    pairs = {}
    for name, ours in attachment.trainable().items():
        path, _, last = name.rpartition(".")
        parameter = theirs[f"{path}.lora_{last.upper()}.default"]
        with torch.no_grad():
            parameter.copy_(ours.view(parameter.shape))
        parameter.grad = None if ours.grad is None else ours.grad.clone().view(parameter.shape)
        pairs[name] = (ours, parameter)
    return pairs


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
def test_peft_prunes_the_same() -> None:
    config = adalora(rank=2, initial_rank=6, interval=2, budget_warmup=0.0, budget_final=4.0)
    _, attachment = contract.attached(config, "llama")
    model = oracle(config, 16, 4)
    for step in range(1, 12):  # at the last pruning, step 12, peft leaves that step's own gradients out
        scrambled(attachment, step)
        pairs = same(model, attachment)
        attachment.after_backward(step, 16)
        model.base_model.update_and_allocate(step)
        assert all(torch.equal(ours.flatten(), theirs.flatten()) for ours, theirs in pairs.values())
        assert (sum(ranks(attachment)) < 6 * 14) == (step % 2 == 0)


@pytest.mark.filterwarnings("ignore")
def test_peft_adds_the_same_penalty() -> None:
    config = adalora(orthogonality=0.3)
    plain, attachment = contract.attached(config, "llama")
    scrambled(attachment, 0)
    model = oracle(config, 16, 4)
    same(model, attachment)
    call = inputs(plain)
    with torch.no_grad():
        theirs = model(**call, labels=call["input_ids"]).loss - plain(**call, labels=call["input_ids"]).loss
    penalty = attachment.penalty()
    torch.testing.assert_close(penalty.detach(), theirs, rtol=1e-4, atol=1e-5)
    penalty.backward()
    assert all(p.grad.any() for n, p in attachment.trainable().items() if not n.endswith(".e"))


def test_no_penalty_where_none_is_wanted() -> None:
    assert contract.attached(adalora(orthogonality=0.0), "llama")[1].penalty() is None
    attachment = contract.attached(adalora(), "llama")[1]
    with attachment.disabled():
        assert attachment.penalty() is None
    assert contract.attached(contract.config("lora"), "llama")[1].penalty() is None


def test_a_run_goes_on_from_its_tensors_alone() -> None:
    config = adalora(rank=2, initial_rank=6, interval=2)
    _, whole = contract.attached(config, "llama")
    _, stopped = contract.attached(config, "llama", seed=7)
    for step in range(1, 17):
        for attachment in (whole, stopped) if step > 7 else (whole,):
            scrambled(attachment, step)
            attachment.after_backward(step, 16)
        if step == 7:
            stopped.load({name: tensor.detach().clone() for name, tensor in whole.tensors().items()})
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in stopped.tensors().items())


def test_a_module_that_was_not_reached_has_no_importance() -> None:
    _, attachment = contract.attached(adalora(rank=3, interval=1, budget_warmup=0.0), "llama")
    scrambled(attachment, 0)
    idle = attachment.deltas[3]
    for parameter in idle.parameters():
        parameter.grad = None
    attachment.after_backward(1, 1)
    assert sum(ranks(attachment)) == 3 * 14 and not idle.e.any()


def test_a_schedule_without_pruning_is_refused() -> None:
    with pytest.raises(InputError, match="leave none of 20 steps for pruning"):
        Schedule.of(adalora(budget_warmup=15.0, budget_final=5.0), 20)
    with pytest.raises(ValidationError, match="leave no steps"):
        adalora(budget_warmup=0.5, budget_final=0.5)
    with pytest.raises(ValidationError, match="nothing to prune"):
        adalora(rank=9, initial_rank=8)
    with pytest.raises(TargetError, match=r"method.initial_rank: 17 is above 16"):
        METHOD.count(skeleton(tiny("llama")), adalora(initial_rank=17))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_peft_computes_the_same_from_our_files(name: str, config: AdaloraConfig, tmp_path: Path) -> None:
    _, expected = exchange.written(tmp_path, config, name)
    torch.testing.assert_close(exchange.theirs(tmp_path, name), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(exchange.ours(tmp_path, "adalora", name), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_was_pruned_is_written_as_zero(tmp_path: Path) -> None:
    config = adalora(rank=2, interval=1)
    model, attachment = contract.attached(config, "llama")
    contract.disturb(attachment)
    for parameter in attachment.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    attachment.after_backward(7, 10)
    contract.disturb(attachment)
    keys, tensors = EXCHANGE.write(config, skeleton(model), attachment.tensors())
    values = torch.cat([tensor for name, tensor in tensors.items() if name.endswith("lora_E")])
    assert int(values.count_nonzero()) == 2 * 14
    (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(
        exchange.theirs(tmp_path, "llama"), contract.answer(model, attachment), rtol=1e-5, atol=2e-5
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pruned", [False, True])
def test_pefts_files_compute_the_same_here(pruned: bool, tmp_path: Path) -> None:
    model = oracle(adalora(rank=2, initial_rank=6, interval=2), 16, 4).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
    for step in range(1, 13) if pruned else ():
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    assert (json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is not None) == pruned
    torch.testing.assert_close(exchange.ours(tmp_path, "adalora", "llama"), logits(model), rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_factors_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    exchange.written(tmp_path, adalora(), "llama")
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="do not fit init_r and rank_pattern"):
        EXCHANGE.read(keys | {"init_r": 4}, skeleton(tiny("llama")), tensors)
