"""The streaming merge: equal to folding in memory, byte for byte where nothing was touched, whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peftctl import methods
from peftctl.errors import FormatError, InputError, SaveError, Unfoldable
from peftctl.formats import names
from peftctl.formats.shards import shards
from peftctl.merge import merge
from peftctl.methods.attachment import Attachment, Delta, Injected
from tests.models import logits, tiny


class Add(Delta):
    """Adds a number to a parameter, then multiplies: the order of two of them shows."""

    def __init__(self, amount: float, factor: float = 1.0, names: tuple[str, ...] = ("weight",)) -> None:
        super().__init__()
        self.amount, self.factor, self.names = amount, factor, names

    def folds(self) -> tuple[str, ...]:
        return self.names

    def fold(self, name: str, weight: Tensor) -> Tensor:
        assert weight.dtype is torch.float32
        return (weight + self.amount) * self.factor


def saved(model: PreTrainedModel, folder: Path, size: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "chat_template.jinja").write_text("template")
    return folder


def empty(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def trained(model: PreTrainedModel, name: str, **more: Any) -> Attachment:
    """A method's deltas with random values."""
    method = methods.get(name)
    attachment = method.attach(model, method.config(name=name, **more))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in attachment.tensors().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return attachment


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "mistral", "phi3", "mixtral"])
def test_the_merged_files_answer_as_base_and_deltas_do(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    base = saved(model, tmp_path / "base")
    targets = r".*self_attn\.[qv]_proj" if name == "mixtral" else "all-linear"
    attachment = trained(model, "lora", rank=2, target_modules=targets)
    before = logits(model)
    attachment.install(model)
    expected = logits(model)
    merge(base, empty(base), attachment, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_biases_merge_too(tmp_path: Path) -> None:
    model = tiny("gpt2")
    base = saved(model, tmp_path / "base")
    attachment = trained(model, "bitfit")
    attachment.install(model)
    merge(base, empty(base), attachment, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_touched_tensors_equal_the_fold_in_memory_and_the_rest_keep_their_bytes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny("llama").to(dtype)
    base = saved(model, tmp_path / "base")
    attachment = trained(model, "lora", rank=2, target_modules=["q_proj"])
    merge(base, empty(base), attachment, tmp_path / "merged")
    before, after = shards(base), shards(tmp_path / "merged")
    assert len(before) > 1
    assert [(s.path.name, s.entries, s.metadata) for s in before] == [
        (s.path.name, s.entries, s.metadata) for s in after
    ]
    deltas = {f"{path}.weight": delta for path, delta in attachment.named_deltas()}
    for old, new in zip(before, after, strict=True):
        ours, theirs = old.path.read_bytes(), new.path.read_bytes()
        assert ours[: old.data] == theirs[: new.data]
        for entry in old.entries:
            span = slice(old.data + entry.start, old.data + entry.end)
            assert (ours[span] == theirs[span]) == (entry.name not in deltas)
    stored, merged = tensors(base), tensors(tmp_path / "merged")
    for name, delta in deltas.items():
        assert torch.equal(merged[name], delta.fold("weight", stored[name].float()).to(dtype))
    assert sorted(p.name for p in base.iterdir()) == sorted(p.name for p in (tmp_path / "merged").iterdir())


def test_a_header_that_others_would_write_differently_keeps_its_bytes(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base", "1GB")
    shard = shards(base)[0]
    entries = {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start, e.end]} for e in shard.entries}
    text = json.dumps({"__metadata__": {"z": "1", "a": "2"}} | entries, indent=3).encode() + b"   "
    whole = len(text).to_bytes(8, "little") + text + shard.path.read_bytes()[shard.data :]
    shard.path.write_bytes(whole)
    merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), tmp_path / "merged")
    merged = (tmp_path / "merged" / shard.path.name).read_bytes()
    assert merged[: 8 + len(text)] == whole[: 8 + len(text)]
    assert merged != whole


def test_several_deltas_at_one_place_are_folded_in_order_and_rounded_once(tmp_path: Path) -> None:
    base = saved(tiny("llama").to(torch.bfloat16), tmp_path / "base", "1GB")
    place = "model.layers.1.mlp.up_proj"
    merge(base, empty(base), Attachment([Injected(place, Add(1, 3)), Injected(place, Add(2, 5))]), tmp_path / "merged")
    old, new = tensors(base)[f"{place}.weight"], tensors(tmp_path / "merged")[f"{place}.weight"]
    assert torch.equal(new, (((old.float() + 1) * 3 + 2) * 5).bfloat16())


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_another_type_changes_every_tensor_and_says_so(size: str, tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base", size)
    attachment = Attachment([Injected("model.layers.0.mlp.up_proj", Add(0.5))])
    merge(base, empty(base), attachment, tmp_path / "merged", dtype="bfloat16")
    stored, merged = tensors(base), tensors(tmp_path / "merged")
    for name, old in stored.items():
        expected = old + 0.5 if name.startswith("model.layers.0.mlp.up_proj") else old
        assert torch.equal(merged[name], expected.bfloat16())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype is torch.bfloat16
    index = tmp_path / "merged" / "model.safetensors.index.json"
    if index.is_file():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(t.numel() * t.element_size() for t in merged.values())


def test_a_base_saved_without_its_head_keeps_its_own_names(tmp_path: Path) -> None:
    model = tiny("gpt2")
    base = saved(model.transformer, tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in tensors(base)
    attachment = trained(model, "lora", rank=2, target_modules=["c_attn"])
    attachment.install(model)
    merge(base, empty(base), attachment, tmp_path / "merged")
    assert set(tensors(tmp_path / "merged")) == set(tensors(base))
    (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_names_that_transformers_renames_on_loading_are_found(tmp_path: Path) -> None:
    base = saved(tiny("bert"), tmp_path / "base", "1GB")
    old = tensors(base)
    renamed = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in old
    }
    save_file({renamed[n]: t for n, t in old.items()}, base / "model.safetensors", metadata={"format": "pt"})
    place = "bert.embeddings.LayerNorm"
    attachment = Attachment([Injected(place, Add(0.5, names=("weight", "bias")))])
    with torch.device("meta"):
        model = type(tiny("bert"))(AutoConfig.from_pretrained(base))
    merge(base, model, attachment, tmp_path / "merged")
    merged = tensors(tmp_path / "merged")
    assert torch.equal(merged[f"{place}.gamma"], old[f"{place}.weight"] + 0.5)
    assert torch.equal(merged[f"{place}.beta"], old[f"{place}.bias"] + 0.5)


EXPERTS = "model.layers.1.mlp.experts"


class AddRows(Delta):
    """Adds to each expert's rows, numbered through, a number of their own: what comes out tells where it went."""

    def folds(self) -> tuple[str, ...]:
        return ("gate_up_proj",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        return weight + torch.arange(weight.shape[0] * weight.shape[1]).view(*weight.shape[:2], 1)


@pytest.mark.parametrize("size", ["20KB", "1GB"])  # experts in several files, or all in one
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_experts_go_back_under_their_own_names_each_where_it_was(size: str, dtype: str | None, tmp_path: Path) -> None:
    base = saved(tiny("mixtral"), tmp_path / "base", size)
    merge(base, empty(base), Attachment([Injected(EXPERTS, AddRows())]), tmp_path / "merged", dtype=dtype)
    old, new = tensors(base), tensors(tmp_path / "merged")
    assert set(old) == set(new)
    for name, value in old.items():
        expected = value
        if "layers.1.block_sparse_moe.experts" in name and not name.endswith("w2.weight"):
            expert = int(name.split(".")[-3])
            first = expert * 128 + (64 if name.endswith("w3.weight") else 0)  # gate, then up
            expected = value + torch.arange(first, first + 64)[:, None]
        assert torch.equal(new[name], expected if dtype is None else expected.bfloat16()), name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_merged_experts_answer_as_base_and_adapter_do(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    base = saved(model, tmp_path / "base")
    attachment = trained(model, "lora", rank=2, target_modules=["gate_up_proj", "down_proj", "q_proj"])
    attachment.install(model)
    merge(base, empty(base), attachment, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert float((logits(merged) - logits(tiny(name))).abs().max()) > 0.1


def test_experts_of_a_base_saved_without_its_head_are_found(tmp_path: Path) -> None:
    model = tiny("mixtral")
    base = saved(model.model, tmp_path / "base")
    assert "layers.0.block_sparse_moe.experts.0.w1.weight" in tensors(base)
    whole = AutoModelForCausalLM.from_config(model.config)
    merge(base, whole, Attachment([Injected(EXPERTS, AddRows())]), tmp_path / "merged")
    changed = {n for n, t in tensors(base).items() if not torch.equal(t, tensors(tmp_path / "merged")[n])}
    assert changed == {f"layers.1.block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")}


def test_experts_of_which_one_is_lacking_or_of_another_type_are_refused(tmp_path: Path) -> None:
    base = saved(tiny("mixtral"), tmp_path / "base", "1GB")
    whole, name = tensors(base), "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    for wrong in ({}, {name: whole[name].to(torch.int8)}, {name: whole[name][:, :8].contiguous()}):
        kept = {n: t for n, t in whole.items() if n != name}
        save_file(kept | wrong, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Unfoldable, match=rf"{EXPERTS}\.gate_up_proj: not in the base's files"):
            merge(base, empty(base), Attachment([Injected(EXPERTS, AddRows())]), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("how", ["other names", "other numbers"])
def test_a_mapping_that_does_not_lead_back_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tiny("mixtral"), tmp_path / "base", "1GB")
    parted = names.Parts.parted

    def wrong(self: names.Parts, made: dict[str, Tensor]) -> dict[str, Tensor]:
        if how == "other names":
            raise KeyError
        return {name: tensor.flip(0) for name, tensor in parted(self, made).items()}

    monkeypatch.setattr(names.Parts, "parted", wrong)
    with pytest.raises((Unfoldable, FormatError), match=r"not in the base's files|does not lead back to it"):
        merge(base, empty(base), Attachment([Injected(EXPERTS, AddRows())]), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_tensor_that_loading_would_rearrange_is_refused_even_in_the_right_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    monkeypatch.setattr(names, "parameters", lambda model, stored: {name: names.Place(name, False) for name in stored})
    with pytest.raises(Unfoldable, match=r"lm_head\.weight: not in the base's files"):
        merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), tmp_path / "merged")


@pytest.mark.parametrize(
    ("attachment", "reason"),
    [
        (Attachment([Injected("model.layers.0", Delta())]), "cannot be folded"),
        (Attachment([Injected("model.layers.0.mlp.up_proj", Add(1, names=("bias",)))]), "no such parameter"),
        (Attachment([Injected("model.layers.0.mlp.up_proj", Add(1)), Injected("", Delta())]), "cannot be folded"),
    ],
)
def test_what_no_weight_can_hold_is_refused_before_anything_is_written(
    attachment: Attachment, reason: str, tmp_path: Path
) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    with pytest.raises(Unfoldable, match=reason):
        merge(base, empty(base), attachment, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("name", "more"), [("prefix", {}), ("bottleneck", {}), ("bitfit", {"add_missing": True})])
def test_methods_that_cannot_fold_say_why(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama")
    base = saved(model, tmp_path / "base")
    with pytest.raises(Unfoldable, match=r"no plain weight|no weight of the base|cannot be merged"):
        merge(base, empty(base), trained(model, name, **more), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("path", ["transformer.wte", "lm_head"])
def test_one_of_two_tied_weights_is_refused_by_name(path: str, tmp_path: Path) -> None:
    base = saved(tiny("gpt2"), tmp_path / "base")
    with pytest.raises(Unfoldable, match=rf"{path}.weight is tied to"):
        merge(base, empty(base), Attachment([Injected(path, Add(1))]), tmp_path / "merged")


def test_a_touched_tensor_that_the_files_lack_is_never_skipped(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base", "1GB")
    left = {n: t for n, t in tensors(base).items() if "layers.1.mlp.up_proj" not in n}
    save_file(left, base / "model.safetensors")
    with pytest.raises(Unfoldable, match=r"layers\.1\.mlp\.up_proj"):
        merge(base, empty(base), Attachment([Injected("model.layers.1.mlp.up_proj", Add(1))]), tmp_path / "merged")


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), base)
    with pytest.raises(InputError, match="--dtype: 'int8'"):
        merge(base, empty(base), Attachment(), tmp_path / "merged", dtype="int8")
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


@pytest.mark.parametrize(("amount", "dtype"), [(float("nan"), None), (1e6, "float16")])
@pytest.mark.fault(26)
def test_a_weight_that_is_not_finite_is_refused(amount: float, dtype: str | None, tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    with pytest.raises(FormatError, match=r"lm_head\.weight: not finite"):
        merge(base, empty(base), Attachment([Injected("lm_head", Add(amount))]), tmp_path / "merged", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.fault(20)
def test_a_full_disk_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tiny("llama"), tmp_path / "base")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftctl.merge._copy", full)
    with pytest.raises(SaveError, match="No space left"):
        merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_what_is_added_at_the_end_lies_in_the_output(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    told = []

    def finish(folder: Path) -> None:
        assert not (tmp_path / "merged").exists()
        (folder / "chat_template.jinja").write_text("the adapter's own")

    merge(
        base,
        empty(base),
        Attachment([Injected("lm_head", Add(1))]),
        tmp_path / "merged",
        progress=lambda done, total: told.append((done, total)),
        finish=finish,
    )
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "the adapter's own"
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


@pytest.mark.fault(20)
def test_killed_in_the_middle_there_is_no_output_and_the_next_call_succeeds(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    script = f"""
        import os, signal
        from pathlib import Path
        from peftctl.merge import merge
        from peftctl.methods.attachment import Attachment, Injected
        from tests.test_merge import Add, empty
        base, output = Path({str(base)!r}), Path({str(tmp_path / "merged")!r})
        def killed(done, total):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), output, progress=killed)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    merge(base, empty(base), Attachment([Injected("lm_head", Add(1))]), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged"]
    file = next(s.path for s in shards(tmp_path / "merged") if any(e.name == "lm_head.weight" for e in s.entries))
    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("lm_head.weight"), tensors(base)["lm_head.weight"] + 1)


def test_memory_is_not_the_size_of_the_model(tmp_path: Path) -> None:
    """Bytes held at once, as the fold sees them: one tensor, not a shard."""
    base = saved(tiny("llama"), tmp_path / "base", "1GB")
    held: list[int] = []

    class Watch(Add):
        def fold(self, name: str, weight: Tensor) -> Tensor:
            held.append(weight.untyped_storage().nbytes())
            return super().fold(name, weight)

    merge(base, empty(base), Attachment([Injected("lm_head", Watch(1))]), tmp_path / "merged")
    assert held == [tensors(base)["lm_head.weight"].nbytes]
