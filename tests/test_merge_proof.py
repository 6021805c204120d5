"""The proof of a merge out of the files: what the whole models say, of every family and method, in less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftctl import merging, methods
from peftctl import model as models
from peftctl.adapter import attach
from peftctl.base import Base, resolve
from peftctl.compute import Precision
from peftctl.errors import ModelError, PeftctlError, TargetError, Unfoldable
from peftctl.formats import peft
from peftctl.formats.shards import shards
from peftctl.lazy import Unreadable
from peftctl.opened import Found
from peftctl.skeleton import NewRows
from peftctl.surgery import skeleton
from peftctl.task import Task
from peftctl.walk import answers, first_apart, walk
from tests.models import NAMES, VOCABULARY, tiny

FOLDABLE = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "adalora": {"rank": 2, "initial_rank": 3},
    "vera": {"rank": 4},
    "bitfit": {},
    "ia3": {},
    "ln-tuning": {},
    "full": {},
}
ROWS = Task("sequence-classification", ("a", "b", "c"))
TOKENS = Task("token-classification", ("a", "b", "c"))


def based(folder: Path, name: str, **changes: Any) -> Base:
    """A tiny base in several files."""
    tiny(name).save_pretrained(folder / "base", max_shard_size="20KB")
    return resolve(str(folder / "base"))._replace(**changes)


def adapter(base: Base, folder: Path, method: str, seed: int = 3, **keys: Any) -> str:
    """An adapter of ours, far off its start."""
    model, config = models.load(base, Precision("float32"), "cpu", 0), methods.get(method).config(name=method, **keys)
    attachment = attach(model, methods.get(method), config, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder.mkdir()
    peft.write(folder, methods.get(method), config, skeleton(model), attachment.tensors(), base)
    return str(folder)


class Both:
    """What the files and the whole models say of base + adapters, and of a merged folder."""

    def __init__(self, *adapters: str) -> None:
        self.found = [merging._found(one, None, False) for one in adapters]
        own = [one.adapter for one in self.found if one.adapter is not None]
        self.walked = walk(self.found[0].base, own)
        self.expected = answers(self.walked, merging._ids(self.found[0]))
        self.whole = merging._logits(self.found, False)

    def merged(self, output: Path) -> tuple[Tensor, Tensor]:
        first = self.found[0]
        other = Found(resolve(str(output))._replace(task=first.base.task), first.skeleton, None, None)
        self.actual = answers(walk(other.base, ()), merging._ids(first))
        return self.actual.logits, merging._logits([other], False)

    def agree(self, output: Path) -> None:
        """On both sides, so that a difference between the sides is one to both."""
        mine, theirs = self.merged(output)
        for ours, whole in ((self.expected.logits, self.whole), (mine, theirs)):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        assert mine.abs().max() > 0


def spoil(output: Path, name: str) -> None:
    """Another value in one tensor of a merged folder."""
    path = next(shard.path for shard in shards(output) if any(entry.name == name for entry in shard.entries))
    held = load_file(path)
    save_file(held | {name: held[name].flip(0) * 3 + 1}, path, {"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_files_and_whole_models_agree_on_every_family(name: str, tmp_path: Path) -> None:
    base = based(tmp_path, name)
    lora = adapter(base, tmp_path / "adapter", "lora", rank=2, target_modules="all-linear")
    both = Both(lora)
    result = merging.merge([lora], tmp_path / "merged")
    both.agree(tmp_path / "merged")
    assert result["max_logit_difference"] < 1e-3 < result["largest_logit"]
    assert first_apart(both.expected, both.actual, 0.01) is None
    # a bare forward of the base says something else, so the deltas were there
    assert (merging._logits([both.found[0]._replace(adapter=None)], False) - both.whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "bert", "t5", "bart", "mixtral"])
@pytest.mark.parametrize("method", FOLDABLE)
def test_files_and_whole_models_agree_on_every_method(method: str, name: str, tmp_path: Path) -> None:
    base = based(tmp_path, name)
    try:
        changed = adapter(base, tmp_path / "adapter", method, **FOLDABLE[method])
    except TargetError:
        pytest.skip("the method has no place there")
    both = Both(changed)
    try:
        result = merging.merge([changed], tmp_path / "merged")
    except Unfoldable:
        pytest.skip("no weight can hold it there")
    both.agree(tmp_path / "merged")
    assert result["max_logit_difference"] < 1e-3 * max(1.0, result["largest_logit"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_agree(name: str, tmp_path: Path) -> None:
    base = based(tmp_path, name)
    targets = ["gate_up_proj", "down_proj", "q_proj"]
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2, target_modules=targets)
    both = Both(changed)
    merging.merge([changed], tmp_path / "merged")
    both.agree(tmp_path / "merged")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("target", ["embed_tokens", "wte"])
def test_products_beside_lookups_agree(name: str, target: str, tmp_path: Path) -> None:
    """Gemma scales its rows, which the deltas must know; the others' embeddings are tied, and refused."""
    if (name == "gpt2") != (target == "wte"):
        pytest.skip("another family's name")
    tiny_model = tiny(name)
    tiny_model.config.tie_word_embeddings = False
    type(tiny_model)(tiny_model.config).eval().save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2, target_modules=[target])
    both = Both(changed)
    merging.merge([changed], tmp_path / "merged")
    both.agree(tmp_path / "merged")


@pytest.mark.parametrize("task", [ROWS, TOKENS], ids=lambda task: task.name)
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_heads_of_tasks_agree(name: str, task: Task, tmp_path: Path) -> None:
    base = based(tmp_path, name, task=task)
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2)
    both = Both(changed)
    merging.merge([changed], tmp_path / "merged")
    both.agree(tmp_path / "merged")


def test_a_head_on_a_decoder_without_padding_reads_each_row_to_its_end(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))._replace(task=ROWS)
    both = Both(adapter(base, tmp_path / "adapter", "lora", rank=2))
    torch.testing.assert_close(both.expected.logits, both.whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])  # apart, tied, scaled
@pytest.mark.parametrize("spare", [0, 3])
def test_new_rows_agree(name: str, spare: int, tmp_path: Path) -> None:
    rows = NewRows(VOCABULARY - spare, ("<a>", "<b>", "<c>"), VOCABULARY)
    base = based(tmp_path, name, rows=rows)
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2)
    both = Both(changed)
    ids = torch.arange(VOCABULARY - spare, VOCABULARY - spare + 3)[None]  # the new ones themselves
    with torch.no_grad():
        model = models.load(base, Precision("float32"), "cpu", 0)
        attachment = attach(model, both.found[0].adapter.method, both.found[0].adapter.config, 0)  # type: ignore[union-attr]
        attachment.load(both.found[0].adapter.tensors)  # type: ignore[union-attr]
        torch.testing.assert_close(answers(both.walked, ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    merging.merge([changed], tmp_path / "merged")
    both.agree(tmp_path / "merged")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_saved_modules_and_several_adapters_agree(name: str, tmp_path: Path) -> None:
    base = based(tmp_path, name)
    targets = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}[name]
    saved = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared"}[name]
    first = adapter(base, tmp_path / "a", "lora", 1, rank=2, target_modules=[targets], save_modules=[saved])
    second = adapter(base, tmp_path / "b", "lora", 2, rank=3, target_modules=[targets])
    both = Both(first, second)
    merging.merge([first, second], tmp_path / "merged")
    both.agree(tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_is_computed_in_fp32(dtype: str, tmp_path: Path) -> None:
    tiny("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    changed = adapter(resolve(str(tmp_path / "base")), tmp_path / "adapter", "lora", rank=2)
    both = Both(changed)
    both_result = merging.merge([changed], tmp_path / "merged")
    both.agree(tmp_path / "merged")
    mine, theirs = both.actual.logits - both.expected.logits, both.merged(tmp_path / "merged")[1] - both.whole
    assert float(mine.abs().max()) == pytest.approx(both_result["max_logit_difference"], rel=1e-3)
    assert float(theirs.abs().max()) == pytest.approx(both_result["max_logit_difference"], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "tensor", "place"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1"),
        ("llama", "model.layers.0.self_attn.q_proj.weight", "model.layers.0"),
        ("llama", "lm_head.weight", None),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", "model.layers.1"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "encoder.block.1"),
        ("bert", "bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0"),
    ],
)
def test_a_damaged_merge_is_caught_by_both_and_placed(
    name: str, tensor: str, place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = based(tmp_path, name)
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2)
    merging.merge([changed], tmp_path / "merged", verify=False)
    spoil(tmp_path / "merged", tensor)
    both = Both(changed)
    mine, theirs = both.merged(tmp_path / "merged")
    for expected, actual in ((both.expected.logits, mine), (both.whole, theirs)):
        assert float((actual - expected).norm()) > merging.BROKEN * float(expected.norm())
    assert first_apart(both.expected, both.actual, merging.BROKEN) == place
    said = r"does not answer as base and adapter do: its logits differ by \S+"
    with pytest.raises(PeftctlError, match=said + (f", {place} being the first to differ; it" if place else "; it")):
        merging._difference(both.found, tmp_path / "merged", False, both.walked)
    assert not (tmp_path / "merged").exists()


def test_a_model_that_cannot_be_read_so_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = based(tmp_path, "llama")
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2)
    expected = merging.merge([changed], tmp_path / "merged")

    def unreadable(*arguments: Any) -> Any:
        raise Unreadable("in a way of its own")

    monkeypatch.setattr(merging, "answers", unreadable)
    again = merging.merge([changed], tmp_path / "again")
    assert again["largest_logit"] == pytest.approx(expected["largest_logit"], rel=1e-5)
    assert again["max_logit_difference"] < 1e-4


def test_code_that_keeps_a_parameter_without_values_is_unreadable(tmp_path: Path) -> None:
    both = Both(adapter(based(tmp_path, "llama"), tmp_path / "adapter", "lora", rank=2))
    layer = both.walked.model.model.layers[0].mlp
    layer.forward = lambda x, kept=layer.up_proj.weight.data: x @ kept[: x.shape[-1]]
    with pytest.raises(Unreadable, match=r"has a shape, .* and no values is no parameter"):
        answers(both.walked, merging._ids(both.found[0]))


def test_no_matrix_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but vectors is: a lookup takes its rows, a product takes blocks."""
    both = Both(adapter(based(tmp_path, "llama"), tmp_path / "adapter", "lora", rank=2))
    shapes, whole = [], type(next(iter(both.walked.reading.sources.values()))).read

    def watched(self: Any) -> Tensor:
        shapes.append(self.shape)
        return whole(self)

    monkeypatch.setattr("peftctl.file_weights.Whole.read", watched)
    monkeypatch.setattr("peftctl.folding.blocks.__defaults__", (64,))
    again = answers(both.walked, merging._ids(both.found[0]))
    torch.testing.assert_close(again.logits, both.expected.logits, rtol=1e-4, atol=1e-4)
    assert shapes and all(len(shape) == 1 for shape in shapes)


def test_what_the_files_lack_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = based(tmp_path, "llama")
    changed = adapter(base, tmp_path / "adapter", "lora", rank=2, target_modules=["q_proj"])
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(s.path for s in shards(tmp_path / "base") if any(e.name == name for e in s.entries))
    held = load_file(path)
    other = json.loads((tmp_path / "adapter" / "peftctl.json").read_text())
    other["base"]["weights"] = None
    (tmp_path / "adapter" / "peftctl.json").write_text(json.dumps(other))
    (tmp_path / "adapter" / "manifest.json").unlink()
    for wrong, said in (({}, "lacks 1 tensors"), ({name: held[name][:3].clone()}, "has another shape")):
        save_file({n: t for n, t in held.items() if n != name} | wrong, path, {"format": "pt"})
        with pytest.raises(ModelError, match=said):
            merging.merge([changed], tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
