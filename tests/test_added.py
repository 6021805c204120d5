"""`model.add_tokens`: rows of new tokens, trained and saved beside any method; in our files, in peft's, and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftctl import commands, methods, opened, recipe
from peftctl.adapter import attach
from peftctl.base import Base, resolve
from peftctl.batch import build
from peftctl.compute import AUTO
from peftctl.counting import count
from peftctl.data.added import extended
from peftctl.data.chat import Chat
from peftctl.errors import InputError
from peftctl.exporting import export
from peftctl.formats.peft import WEIGHTS, write
from peftctl.merging import merge
from peftctl.methods.attachment import Attachment
from peftctl.model import load as load_model
from peftctl.model import skeleton as table_of
from peftctl.opened import policy_of
from peftctl.plan import Options, plan
from peftctl.row import Message, Row
from peftctl.skeleton import NewRows
from peftctl.surgery import skeleton
from tests import runs
from tests.models import VOCABULARY, tiny

TOKENS = ("<tool>", "kugelblitz", "<end of tool>")
OTHER = ("lora", "prefix", "bottleneck", "ia3")
BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "target_modules": "all-linear"},
    "prefix": {"num_virtual_tokens": 3},
}


def based(name: str, folder: Path, spare: int = 0, **config: Any) -> Base:
    """A tiny base on disk that is given tokens; `spare`: rows of its embeddings that its tokenizer has no token for."""
    model = tiny(name)
    model.config.update(config)
    if config:
        model = type(model)(model.config).eval()
    model.save_pretrained(folder / "base")
    return resolve(str(folder / "base"))._replace(rows=NewRows(VOCABULARY - spare, TOKENS, VOCABULARY))


def attached(base: Base, method: str = "lora", moved: bool = True, **keys: Any) -> tuple[Any, Attachment, Any]:
    model = load_model(base, AUTO, "cpu", 0)
    config = methods.get(method).config(name=method, **(BLOCKS.get(method, {}) | keys))
    attachment = attach(model, methods.get(method), config, 0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.trainable().values() if moved else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, attachment, config


def ids() -> torch.Tensor:
    """Two rows, with each of the new tokens and old ones."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    found[0, 2:5] = torch.arange(VOCABULARY, VOCABULARY + 3)
    found[1, 7] = VOCABULARY + 1
    return found


@torch.no_grad()
def answers(model: Any, at: int = 0) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids() - at).logits
    return logits


FAMILIES = ["llama", "gpt2", "gemma", "gemma3", "opt", "phi3", "bloom", "gptj"]


@pytest.mark.parametrize("name", FAMILIES)
def test_starts_as_the_grown_base_is_trained_and_is_switched_off_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = based(name, tmp_path)
    plain, expected = load_model(resolve(str(tmp_path / "base")), AUTO, "cpu", 0), load_model(base, AUTO, "cpu", 0)
    old = ids().clamp(max=VOCABULARY - 1)
    with torch.no_grad():  # what was there before stays
        theirs, ours = plain(input_ids=old).logits, expected(input_ids=old).logits
        torch.testing.assert_close(ours[..., :VOCABULARY], theirs, rtol=1e-6, atol=1e-6)
    start = answers(expected)
    model, attachment, _ = attached(base, moved=False)
    assert torch.equal(answers(model), start)
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()
    )
    loss.backward()
    rows = {n: p for n, p in attachment.trainable().items() if n.rpartition(".")[2] in ("rows", "row_bias")}
    tied = model.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2) + (name == "gptj" and not tied)
    assert all((p.grad is not None and p.grad.abs().amin() > 0) or p.grad.abs().sum() > 0 for p in rows.values())
    assert not any(p.requires_grad for p in model.parameters())
    model, attachment, _ = attached(base)
    assert not torch.equal(answers(model), start)
    with attachment.disabled():
        assert torch.equal(answers(model), start)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_counts_by_hand_and_as_built(name: str, tmp_path: Path) -> None:
    base = based(name, tmp_path)
    config = methods.get("lora").config(name="lora", **BLOCKS["lora"])
    counts, without = (count(one, methods.get("lora"), config) for one in (base, base._replace(rows=None)))
    rows = 3 * 32 * (2 if name == "llama" else 1)
    assert counts.saved_modules == rows and without.saved_modules == 0
    assert (counts.adapter, counts.base) == (without.adapter, without.base)
    assert counts.summary == f"{without.summary}; 3 new tokens"
    _, attachment, _ = attached(base)
    built = {
        path: sum(p.numel() for n, p in attachment.trainable().items() if n.startswith(f"{path}."))
        for path in counts.places
    }
    assert built == counts.places and sum(built.values()) == counts.trainable


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_kernels_train_the_same(name: str, tmp_path: Path) -> None:
    rows = [Row(tuple(row.tolist()), (1.0,) * 9) for row in ids()]
    found = []
    for fused in (False, True):
        model, attachment, _ = attached(based(name, tmp_path))
        policy = policy_of(model, attachment, skeleton(model).dimensions.layers)
        if fused:
            policy.fuse(pack=False)
        logprob = policy.tokens(build(rows)).logprob
        expected = answers(model).log_softmax(-1)[:, :-1].gather(-1, ids()[:, 1:, None])[..., 0]
        labels = build(rows).labels
        assert len(labels.target) == expected.numel()
        torch.testing.assert_close(logprob.sum(), expected.sum(), rtol=1e-4, atol=1e-3)
        found.append(torch.autograd.grad(logprob.sum(), list(attachment.trainable().values())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def written(base: Base, folder: Path, method: str, **keys: Any) -> tuple[Any, Attachment]:
    model, attachment, config = attached(base, method, **keys)
    folder.mkdir()
    write(folder, methods.get(method), config, table_of(base), attachment.written(), base)
    tokenizer = Chat(extended(runs.CONFIGS / "tokenizer", TOKENS))
    tokenizer.save(folder)
    return model, attachment


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama", method) for method in ("lora", "dora", "ia3", "vera", "ln-tuning", "bottleneck", "full")),
        *((name, "lora") for name in ("gpt2", "gemma3", "opt", "gptj", "phi3")),  # a scale, an offset, a head's bias
        ("gpt2", "full"),
    ],
)
def test_read_again_it_answers_the_same_and_so_does_peft(name: str, method: str, tmp_path: Path) -> None:
    base = based(name, tmp_path)
    keys = {"last_layers": 1} if method == "full" else {"rank": 12} if method == "vera" else {}
    model, _ = written(base, tmp_path / "adapter", method, **keys)
    expected = answers(model)
    found = opened.find(str(tmp_path / "adapter"))
    assert found.base.rows == base.rows
    assert torch.equal(answers(opened.open(found, device="cpu").policy.model), expected)
    if methods.get(method).exchange is None:
        return
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    whole = [t for t in stored.values() if t.shape == (VOCABULARY + 3, 32)]
    # the embeddings, and the head where that is not the same matrix
    assert len(whole) == (1 if model.config.tie_word_embeddings else 2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(VOCABULARY + 3)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(wrapped), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "targets"), [("llama", ["embed_tokens", "lm_head", "q_proj"]), ("gpt2", ["c_fc"])])
def test_beside_products_on_the_same_matrices(name: str, targets: list[str], tmp_path: Path) -> None:
    base = based(name, tmp_path)
    config = methods.get("lora").config(name="lora", rank=2, target_modules=targets)
    model, attachment = written(base, tmp_path / "adapter", "lora", target_modules=targets)
    counts = count(base, methods.get("lora"), config)
    assert counts.trainable == sum(p.numel() for p in attachment.trainable().values()) == sum(counts.places.values())
    found = opened.open(opened.find(str(tmp_path / "adapter")), device="cpu").policy.model
    assert torch.equal(answers(found), answers(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(VOCABULARY + 3)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(wrapped), answers(model), rtol=1e-5, atol=1e-5)
    merge([str(tmp_path / "adapter")], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_peft_saves_of_a_model_that_was_resized_is_read(name: str, tmp_path: Path) -> None:
    base = based(name, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(base.weights)
    theirs.resize_token_embeddings(VOCABULARY + 3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    Chat(extended(runs.CONFIGS / "tokenizer", TOKENS)).save(tmp_path / "theirs")
    found = opened.find(str(tmp_path / "theirs"))
    assert found.base.rows is not None and found.base.rows.total == VOCABULARY + 3
    ours = opened.open(found, device="cpu").policy.model
    torch.testing.assert_close(answers(ours), answers(wrapped), rtol=1e-5, atol=1e-5)
    merge([str(tmp_path / "theirs")], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(merged), answers(wrapped), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("name", "size"), [("llama", "1GB"), ("gpt2", "1GB"), ("gptj", "20KB")])
def test_merged_matrices_are_grown_and_the_config_says_so(name: str, size: str, method: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "base", max_shard_size=size)
    base = resolve(str(tmp_path / "base"))._replace(rows=NewRows(VOCABULARY, TOKENS, VOCABULARY))
    model, _ = written(base, tmp_path / "adapter", method)
    result = merge([str(tmp_path / "adapter")], tmp_path / "merged")
    assert result["max_logit_difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == VOCABULARY + 3 == merged.get_input_embeddings().weight.shape[0]
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == [tokenizer.convert_tokens_to_ids(t) for t in TOKENS]


@pytest.mark.filterwarnings("ignore")
def test_spare_rows_are_taken_before_any_is_added(tmp_path: Path) -> None:
    base = based("llama", tmp_path, spare=2)  # two of three tokens have a row already
    model, attachment = written(base, tmp_path / "adapter", "lora")
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 1
    assert attachment.trainable()["model.embed_tokens.rows"].shape == (3, 32)
    found = opened.open(opened.find(str(tmp_path / "adapter")), device="cpu").policy.model
    assert torch.equal(answers(found, 2), answers(model, 2))
    merge([str(tmp_path / "adapter")], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(merged, 2), answers(model, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beside_modules_that_are_saved_whole(name: str, tmp_path: Path) -> None:
    base = based(name, tmp_path)
    saved = ["lm_head"] if name == "llama" else ["wte"]
    model, attachment = written(base, tmp_path / "adapter", "lora", save_modules=saved)
    rows = [key for key in attachment.trainable() if key.endswith(".rows")]
    assert rows == (["model.embed_tokens.rows"] if name == "llama" else [])
    found = opened.open(opened.find(str(tmp_path / "adapter")), device="cpu").policy.model
    assert torch.equal(answers(found), answers(model))
    merge([str(tmp_path / "adapter")], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-4, atol=1e-4)


def document(**blocks: Any) -> dict[str, Any]:
    return runs.document("lora", "sft", **({"model": {"add_tokens": list(TOKENS[:2])}} | blocks))


@pytest.mark.filterwarnings("ignore")
def test_a_run_trains_saves_resumes_and_merges_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"say {n}", "completion": f"<tool> kugelblitz {n}"} for n in range(9)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    contents = document(data={"train": str(rows), "validation": None}, train={"eval_every": None})
    result = runs.train(tmp_path / "run", contents, verify=True)
    assert result["proof"]["max_difference"] == 0 and result["merged"]["max_logit_difference"] < 1e-4
    with runs.stopped_after(2, tmp_path / "cut"), pytest.raises(Exception, match="stopped after step 2"):
        runs.train(tmp_path / "cut", contents)
    runs.train(tmp_path / "cut", contents, resume=True)
    whole, cut = (tmp_path / name / "adapter" / WEIGHTS for name in ("run", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    base = AutoTokenizer.from_pretrained(tmp_path / "run" / "base")
    size = len(base)
    assert len(tokenizer) == size + 2 and tokenizer("<tool> kugelblitz").input_ids == [
        size,
        *base(" ").input_ids,
        size + 1,
    ]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    ours = opened.open(opened.find(str(tmp_path / "run")), device="cpu").policy.model
    said = torch.tensor([[5, size, 7, size + 1]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=said).logits, ours(input_ids=said).logits, rtol=1e-5, atol=1e-5)
    merged = opened.open(opened.find(str(tmp_path / "run" / "merged")), device="cpu")
    assert merged.found.tokenizer == tmp_path / "run" / "merged" and merged.chat.vocabulary == size + 2
    # preferences, on the merged model and on the adapter
    more = {"model": {"name": str(tmp_path / "run" / "merged"), "add_tokens": None}}
    runs.train(tmp_path / "dpo", runs.document("lora", "dpo", **more))
    begun = {"model": {"name": str(tmp_path / "run" / "base"), "add_tokens": list(TOKENS[:2])}}
    go_on = runs.document("lora", "dpo", **begun, method={"init_from": str(tmp_path / "run")})
    runs.train(tmp_path / "on", go_on)
    assert runs.even(runs.losses(tmp_path / "on")[0])
    for tokens in (None, list(TOKENS[1::-1]), ["<tool>"]):
        go_on["model"]["add_tokens"] = tokens
        with pytest.raises(InputError, match=r"was trained with model\.add_tokens \['<tool>', 'kugelblitz'\]: set the"):
            runs.train(tmp_path / "wrong", go_on)
    for to in ("gguf", "adapterhub"):
        with pytest.raises(InputError, match="has no place for the tokens that were added"):
            export(str(tmp_path / "run"), tmp_path / "out", to=to)
    with pytest.raises(InputError, match=r"vllm: .*takes no new tokens with an adapter"):
        export(str(tmp_path / "run"), tmp_path / "out", to="peft", server="vllm")
    export(str(tmp_path / "run"), tmp_path / "out", to="peft")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes()


def test_a_template_gets_the_tokens_that_the_base_lacks(tmp_path: Path) -> None:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    contents = document(model={"add_tokens": None}, data={"chat_template": "llama3"})
    with pytest.raises(
        InputError, match=r"needs <\|start_header_id\|>, .* does not have; model.add_tokens gives a base"
    ):
        runs.train(tmp_path / "run", contents)
    contents["model"]["add_tokens"] = marks
    runs.train(tmp_path / "run", contents, verify=True)
    chat = opened.open(opened.find(str(tmp_path / "run")), device="cpu").chat
    first = chat.vocabulary - 3
    ids, weights = chat.dialogue([Message("user", "a"), Message("assistant", "b")])
    assert [i for i in ids if i >= first] == [first, first + 1, first + 2] * 2
    assert weights[-1] == 1 and ids[-1] == first + 2 in chat.eos_ids  # the answer's end is learnt, and ends it


def test_dpo_starts_at_ln_2_against_the_grown_base(tmp_path: Path) -> None:
    runs.train(tmp_path / "run", runs.document("lora", "dpo", model={"add_tokens": ["spider"]}))
    first_loss, *_, last_loss = runs.losses(tmp_path / "run")
    assert runs.even(first_loss) and not runs.even(last_loss)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<a>", "<b>", "<a>"], "model.add_tokens: '<a>' is named twice"),
        (["a"], r"model.add_tokens: 'a' is a token of \S+ already; leave it out"),
    ],
)
def test_what_cannot_be_added_is_said_before_anything_is_loaded(tokens: list[str], said: str, tmp_path: Path) -> None:
    path = runs.written(tmp_path / "run", document(model={"add_tokens": tokens}))
    for command in (
        lambda: commands.validate(path, (), False, 0),
        lambda: commands.count_params(path, (), None, None, None, False),
        lambda: runs.train(tmp_path / "run", document(model={"add_tokens": tokens})),
    ):
        with pytest.raises(InputError, match=said):
            command()
    with pytest.raises(InputError, match=r"model\.add_tokens"):
        recipe.load(path, ['model.add_tokens=[""]'])


def test_a_method_that_would_not_see_the_rows_is_refused(tmp_path: Path) -> None:
    said = r"lm_head has rows of model\.add_tokens, so this method cannot change it"
    with pytest.raises(InputError, match=said):
        attached(based("llama", tmp_path), "dora", rank=2, target_modules=["lm_head"])
    contents = runs.document("dora", "sft", model={"add_tokens": ["<a>"]}, method={"target_modules": ["lm_head"]})
    with pytest.raises(InputError, match=said):
        plan(runs.loaded(tmp_path / "run", contents), Options())
