"""The prompt's own: where it starts, the layouts that it is served in, and the `peft` package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from peftctl.batch import build
from peftctl.data.chat import Chat
from peftctl.errors import FormatError, InputError, TargetError
from peftctl.generation import generate, generate_plainly
from peftctl.head import head_of
from peftctl.layout import choose
from peftctl.methods.prompt import METHOD, PromptConfig
from peftctl.methods.prompt.peft import EXCHANGE
from peftctl.policy import Layout, Policy, last_hidden
from peftctl.row import Row
from peftctl.surgery import skeleton
from tests import runs
from tests.methods import contract, oracle
from tests.models import ENCODERS, NAMES, SEQ2SEQ, tiny
from tests.runs import CONFIGS

TOKENS = 5
SERVED = [name for name in NAMES if name not in SEQ2SEQ]


def prompt(**keys: Any) -> PromptConfig:
    return PromptConfig(name="prompt", **({"num_virtual_tokens": TOKENS} | keys))


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("config", [prompt(init="random"), prompt(num_virtual_tokens=1)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_variants_keep_the_contract(name: str, config: PromptConfig, check: Any) -> None:
    check(config, name)


def test_counts_by_hand() -> None:
    assert METHOD.count(skeleton(tiny("llama")), prompt()).total == TOKENS * 32
    # bloomz-560m is 1024 wide: 8 virtual tokens are 8,192 numbers
    wide = skeleton(tiny("bloom"))._replace(modules=tuple(_widened(m) for m in skeleton(tiny("bloom")).modules))
    assert METHOD.count(wide, prompt(num_virtual_tokens=8)).total == 8192


def _widened(module: Any) -> Any:
    return module._replace(shapes={"weight": (128, 1024)}) if module.kind == "Embedding" else module


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_starts_as_embeddings_of_the_vocabulary_with_the_familys_scale(name: str) -> None:
    model, attachment = contract.attached(prompt(), name)
    every = model.get_input_embeddings()(torch.arange(128))
    assert all(any(torch.equal(row, token) for token in every) for row in attachment.tensors()["prompt"])
    _, other = contract.attached(prompt(), name, seed=1)
    assert not torch.equal(other.tensors()["prompt"], attachment.tensors()["prompt"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [3, 40])
def test_starts_as_the_embeddings_of_a_text_as_pefts_does(tokens: int) -> None:
    text, folder = "Answer in one word. ", CONFIGS / "tokenizer"
    big = tiny("llama")
    big.resize_token_embeddings(Chat(folder).vocabulary)
    config = prompt(init="text", init_text=text, num_virtual_tokens=tokens).tokenized(Chat(folder).encode)
    wanted = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(folder),
    )
    theirs = peft.get_peft_model(copy.deepcopy(big), wanted)
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(METHOD.attach(big, config).tensors()["prompt"], expected)
    assert len(config.ids) == tokens and len(set(config.ids)) > 2


def test_a_run_starts_at_its_text(tmp_path: Path) -> None:
    text = {"init": "text", "init_text": "Be brief.", "num_virtual_tokens": 4}
    runs.train(tmp_path / "run", runs.document("prompt", method=text, train={"learning_rate": 1e-12, "max_steps": 1}))
    found = runs.adapter(tmp_path / "run")["prompt_embeddings"]
    ids = Chat(CONFIGS / "tokenizer").encode("Be brief.")[:4]
    embeddings = load_file(tmp_path / "run" / "base" / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(found, embeddings[list(ids)], atol=1e-6, rtol=0)


def test_starts_at_random_as_the_paper_does() -> None:
    _, attachment = contract.attached(prompt(init="random", num_virtual_tokens=100), "llama")
    rows = attachment.tensors()["prompt"].detach()
    assert -0.5 <= float(rows.min()) < -0.45 and 0.45 < float(rows.max()) < 0.5


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    start, *ends = (torch.randint(5, 100, (n,), generator=generator).tolist() for n in (7, 3, 12, 9))
    ids = [start + ends[0], start + ends[1], start + ends[1] + ends[2], ends[2]]
    # the first token counts as well, which nothing predicts
    return [Row(tuple(i), (1.0,) * len(i)) for i in ids]


def policy(name: str, layout: str | None = None) -> Policy:
    model, attachment = contract.attached(prompt(), name)
    contract.disturb(attachment)
    with attachment.disabled():
        found = choose(model, skeleton(model).dimensions.layers)
    head = None if name in ENCODERS else head_of(model)
    return Policy(model, attachment, Layout(layout, found.first_position) if layout else found, head)


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED)
def test_each_row_answers_as_behind_the_embeddings_alone(name: str) -> None:
    found = policy(name)
    together = found.row_hidden(build(rows()))
    virtual = found.attachment.virtual()
    assert virtual is not None and virtual.embeds is not None
    for row, hidden in zip(rows(), together, strict=True):
        real = found.model.get_input_embeddings()(torch.tensor([row.ids]))
        alone = last_hidden(found.trunk(inputs_embeds=torch.cat([virtual.embeds[None], real], dim=1)))[0, TOKENS:]
        torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_all_layouts_give_the_same_labels_and_gradients(name: str) -> None:
    answers = {}
    for layout in ("shared", "joined", "padded"):
        found = policy(name, layout)
        stats = found.tokens(build(rows()))
        (stats.logprob * torch.arange(len(stats.logprob))).sum().backward()
        answers[layout] = (stats.logprob.detach(), found.attachment.trainable()["prompt"].grad)
    labels = build(rows()).labels
    assert len(answers["shared"][0]) == len(labels.target) == sum(len(row.ids) - 1 for row in rows())
    for layout in ("joined", "padded"):
        for ours, theirs in zip(answers["shared"], answers[layout], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ENCODERS])
def test_generates_from_a_primed_cache_what_whole_rows_say(name: str) -> None:
    found = policy(name)
    ids = rows()[0].ids
    assert generate(found, ids, max_new_tokens=6, end=()) == generate_plainly(found, ids, 6, ())


def test_what_all_rows_share_is_run_once_behind_one_prompt() -> None:
    batch = build(rows()[:3]).behind(TOKENS)
    assert len(batch) == len(build(rows()[:3])) + TOKENS and batch.ids[:TOKENS].tolist() == [0] * TOKENS
    apart = build(rows()).behind(TOKENS)
    assert len(apart) == len(build(rows())) + TOKENS and (apart.parent == -1).sum() == 1


def test_serves_a_bf16_base_in_bf16() -> None:
    virtual = METHOD.attach(tiny("llama").bfloat16(), prompt()).virtual()
    assert virtual is not None and virtual.embeds is not None and virtual.embeds.dtype == torch.bfloat16


def test_refuses_an_encoder_beside_by_name() -> None:
    with pytest.raises(TargetError, match="T5ForConditionalGeneration has 2 stacks"):
        METHOD.count(skeleton(tiny("t5")), prompt())
    table = skeleton(tiny("llama"))
    bare = table._replace(modules=tuple(m for m in table.modules if m.kind != "Embedding"))
    with pytest.raises(TargetError, match="LlamaForCausalLM has no embedding of its 128 tokens"):
        METHOD.count(bare, prompt())


@pytest.mark.parametrize(
    "keys",
    [
        {"num_virtual_tokens": 0},
        {"init": "text"},
        {"init_text": "a"},
        {"init": "text", "init_text": ""},
        {"init": "text", "init_text": "a", "init_from": "b"},
    ],
)
def test_refuses_impossible_blocks(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        prompt(**keys)


def test_a_text_without_tokens_is_refused() -> None:
    text = prompt(init="text", init_text=" ")
    with pytest.raises(InputError, match=r"method\.init_text: ' ' has no tokens"):
        text.tokenized(lambda words: ())
    with pytest.raises(InputError, match="a tokenizer has to encode it first"):
        METHOD.attach(tiny("llama"), text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "gemma3", "phi3", "bloom"])
def test_peft_computes_the_same_from_our_files(name: str, tmp_path: Path) -> None:
    oracle.reads_what_we_wrote(prompt(), name, tmp_path)
    oracle.comes_back(prompt(), name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_pefts_files_compute_the_same_here(name: str, tmp_path: Path) -> None:
    theirs = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    oracle.wrote_what_we_read(theirs, "prompt", name, tmp_path)


def test_refuses_a_prompt_for_another_base() -> None:
    with pytest.raises(FormatError, match="the embeddings of LlamaForCausalLM are 32 wide"):
        EXCHANGE.read({}, skeleton(tiny("llama")), {"prompt_embeddings": torch.zeros(5, 64)})
    with pytest.raises(FormatError, match="prompt_embeddings alone"):
        EXCHANGE.read({}, skeleton(tiny("llama")), {})
    with pytest.raises(FormatError, match="num_transformer_submodules"):
        EXCHANGE.read(
            {"num_transformer_submodules": 2}, skeleton(tiny("llama")), {"prompt_embeddings": torch.zeros(5, 32)}
        )
