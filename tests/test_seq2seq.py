"""Encoder-decoders under the waist: the model's own losses, whatever method, layout of a batch or file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from peftctl import base as bases
from peftctl import commands, evaluation, methods, objectives, opened, recipe, seq2seq
from peftctl import policy as policies
from peftctl.batch import Batch, build
from peftctl.errors import DataError, ModelError, PeftctlError
from peftctl.formats.peft import OWN_TYPE, WEIGHTS, as_peft
from peftctl.generation import generate, generate_plainly
from peftctl.kernels import prefixed
from peftctl.layout import choose
from peftctl.opened import policy_of
from peftctl.plan import Options, plan
from peftctl.policy import Policy, checkpointed
from peftctl.recipe import _unfit
from peftctl.row import Row
from peftctl.surgery import skeleton
from tests import runs
from tests.methods import contract, exchange
from tests.models import inputs, tiny

NAMES = ["t5", "bart"]
CONFIGS = {
    "lora": {"rank": 4},
    "ia3": {},
    "bottleneck": {"preset": "houlsby"},
    "bitfit": {"add_missing": True},
    "prefix": {"num_virtual_tokens": 3},
}
T5 = {"name": str(runs.CONFIGS / "models" / "tiny-t5.json"), "task": "seq2seq-lm"}
TASKS = {"train": str(runs.CONFIGS / "data" / "tasks.jsonl")}


def rows(start: int) -> list[Row]:
    """Prompts and answers of several lengths; two rows share a prompt, and two an answer's beginning."""
    generator = torch.Generator().manual_seed(2)
    one, two, three, long, short = (
        tuple(torch.randint(3, 128, (n,), generator=generator).tolist()) for n in (4, 11, 2, 9, 3)
    )
    sides = [(one, long), (one, short), (two, short), (three, short + long)]
    return [
        Row((*s, start, *a), (0.0,) * (len(s) + 1) + (1.0,) * len(a), n, source=len(s))
        for n, (s, a) in enumerate(sides)
    ]


def attached(name: str, method: str | None) -> Policy:
    """The policy over a tiny model with a disturbed adapter, or none."""
    if method is None:
        model, attachment = tiny(name), None
    else:
        model, attachment = contract.attached(contract.config(method, **CONFIGS[method]), name)
        contract.disturb(attachment)
    return policy_of(model, attachment, skeleton(model).dimensions.layers).eval()


def batch_of(name: str, **how: Any) -> Batch:
    return build(rows(tiny(name).config.decoder_start_token_id), **how)


@pytest.mark.parametrize("method", [None, *CONFIGS])
@pytest.mark.parametrize("name", NAMES)
def test_a_rows_loss_is_the_models_own(name: str, method: str | None) -> None:
    policy = attached(name, method)
    for share in ("all", "none"):
        batch = batch_of(name, share=share)
        logprob = policy.tokens(batch).logprob
        for number, row in enumerate(batch.rows):
            prompt, answer = (torch.tensor([ids]) for ids in (row.ids[: row.source], row.ids[row.source + 1 :]))
            with seq2seq.prefixed(policy.model, policy.attachment.virtual()):
                expected = policy.model(input_ids=prompt, labels=answer).loss
            torch.testing.assert_close(-logprob[batch.labels.row == number].mean(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_half_batches_are_one(name: str) -> None:
    policy, found = attached(name, "lora"), []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        policy.zero_grad()
        for part in parts:
            (-policy.tokens(build(batch_of(name).rows[part])).logprob.sum()).backward()
        found.append([parameter.grad.clone() for parameter in policy.attachment.trainable().values()])
    for whole, halves in zip(*found, strict=True):
        torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("faster", ["fuse", "checkpointed", "fuse, checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_fast_kernels_and_checkpointing_change_no_answer(name: str, faster: str) -> None:
    found = []
    for how in ("", faster):
        policy = attached(name, "lora")
        if "fuse" in how:
            policy.fuse(pack=True)
        if "checkpointed" in how:
            checkpointed(policy.model)
            policy.train()
        logprob = policy.tokens(batch_of(name)).logprob
        (logprob * torch.arange(len(logprob))).sum().backward()
        found.append([logprob.detach(), *(p.grad for p in policy.attachment.trainable().values())])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_without_its_deltas_a_batch_is_the_bases_to_the_bit(name: str) -> None:
    with torch.no_grad():
        base = attached(name, None).tokens(batch_of(name)).logprob
        for method in CONFIGS:
            policy = attached(name, method)
            assert not torch.equal(policy.tokens(batch_of(name)).logprob, base)
            with policy.attachment.disabled():
                assert torch.equal(policy.tokens(batch_of(name)).logprob, base)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prefix_is_what_as_many_tokens_more_would_be(name: str) -> None:
    """Keys and values that the projections themselves make of some states are those of the states put first."""
    policy = attached(name, "prefix")
    virtual = policy.attachment.virtual()
    assert virtual is not None and len(virtual.paths) == len(virtual.keys) == 2 + 3 + 3
    for path, own, other in zip(virtual.paths, virtual.keys, virtual.values, strict=True):
        module = policy.model.get_submodule(path)
        query, keys, values = (torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 6, 7))
        values = values[:, :, :6]
        with prefixed.running(policy.model, {module: (own, other)}):
            found, _ = prefixed.prefixed_attention(module, query, keys, values, None, scaling=0.5)
        whole = [torch.cat([t.expand(2, -1, -1, -1), real], 2) for t, real in ((own, keys), (other, values))]
        expected = torch.softmax(query @ whole[0].mT * 0.5, -1) @ whole[1]
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_prefix_is_saved_under_our_own_name_for_peft_lacks_it() -> None:
    policy, config = attached("bart", "prefix"), contract.config("prefix", **CONFIGS["prefix"])
    keys, tensors = as_peft(methods.get("prefix"), config, skeleton(policy.model), policy.attachment.tensors())
    assert keys["peft_type"] == OWN_TYPE and tensors.keys() == policy.attachment.tensors().keys()


def test_a_prefix_that_an_attention_never_sees_is_told() -> None:
    policy = attached("t5", "prefix")
    virtual = policy.attachment.virtual()
    assert virtual is not None
    with (
        pytest.raises(ModelError, match="no prefix can be put there"),
        prefixed.running(policy.model, {policy.model: (virtual.keys[0], virtual.values[0])}),
    ):
        policy.model(**inputs(policy.model))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_decoding_is_the_plain_recomputation(name: str, method: str) -> None:
    policy = attached(name, method)
    start, prompt, seen, steps = policy.model.config.decoder_start_token_id, (11, 40, 90, 7, 33), [], []
    handle = policy.model.register_forward_hook(lambda module, args, output: steps.append(output.logits[0, -1]))
    answer = generate(policy, prompt, max_new_tokens=7, end=(), on_token=seen.append)
    handle.remove()
    assert answer == seen == generate_plainly(policy, prompt, 7, ()) and len(answer) == len(steps) == 7
    for length, logits in enumerate(steps):  # tokens alone tell little: a random model likes to repeat one
        row = Row((*prompt, start, *answer[:length]), (0.0,) * (len(prompt) + 1 + length), source=len(prompt))
        expected = policy.head(policy.row_hidden(build([row]))[0][-1:])[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert generate(policy, prompt, max_new_tokens=7, end=(answer[0],)) == answer[:1]
    drawn = [generate(policy, prompt, max_new_tokens=7, end=(), temperature=9.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_padded_and_says_why(name: str) -> None:
    model = tiny(name)
    layout = choose(model, 3)
    assert layout.name == "padded" and "two sides" in layout.reason


def _padding_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rectangle = seq2seq.rectangle
    monkeypatch.setattr(seq2seq, "rectangle", lambda *a: (rectangle(*a)[0], torch.ones_like(rectangle(*a)[1])))


def _prompts_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(model: Any, batch: Batch, virtual: None) -> torch.Tensor:
        first = batch.rows[0]
        own = [(first.ids[: first.source] + row.ids[row.source :], first.source) for row in batch.rows]
        return seq2seq.hidden(model, build([Row(ids, (1.0,) * len(ids), source=source) for ids, source in own]))

    monkeypatch.setattr(policies, "both_sides", mixed)


@pytest.mark.parametrize("break_it", [_padding_is_read, _prompts_are_mixed_up])
def test_a_pass_that_lets_rows_meet_is_found_at_start_up(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(ModelError, match=r"BartForConditionalGeneration cannot be served.*rows differ from each row"):
        choose(tiny("bart"), 3, "padded")


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_to_peft_and_back(name: str, kind: str, tmp_path: Path) -> None:
    config = contract.config(kind, **CONFIGS[kind])
    _, logits = exchange.written(tmp_path, config, name)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    torch.testing.assert_close(exchange.theirs(tmp_path, name), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exchange.ours(tmp_path, kind, name), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_come_from_peft(name: str, kind: str, tmp_path: Path) -> None:
    made = {"lora": peft.LoraConfig, "ia3": peft.IA3Config}[kind](task_type="SEQ_2_SEQ_LM")  # peft's own targets
    logits = exchange.saved_by_peft(tmp_path, made, name)
    torch.testing.assert_close(exchange.ours(tmp_path, kind, name), logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("seq2seq") / "run"
    runs.train(output, document(train={"max_steps": 2}), verify=True)
    return output


def document(**blocks: dict[str, Any]) -> dict[str, Any]:
    plain = runs.document("lora", "sft", model=T5, method={"target_modules": ["q", "v"]}, data=TASKS)
    return {key: plain[key] | blocks.get(key, {}) for key in plain}


def test_a_run_ends_in_a_merged_model_whose_embeddings_are_still_one(run: Path) -> None:
    result = json.loads((run / "run.json").read_text())["result"]
    assert result["proof"]["max_difference"] == 0 and result["merged"]["max_logit_difference"] < 1e-4
    merged = AutoModelForSeq2SeqLM.from_pretrained(run / "merged").eval()
    assert merged.lm_head.weight is merged.shared.weight
    policy = opened.open(opened.find(str(run))).policy
    ids = torch.arange(4, 20)[None]
    call = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        torch.testing.assert_close(merged(**call).logits, policy.model(**call).logits, rtol=1e-4, atol=1e-4)


def test_what_is_measured_is_what_the_model_loses(run: Path) -> None:
    found = opened.open(opened.find(str(run)))
    measured = evaluation.evaluate(found, TASKS["train"])
    total, count = 0.0, 0
    for line in Path(TASKS["train"]).read_text().splitlines():
        prompt, answer = (found.chat.encode(json.loads(line)[key]) for key in ("prompt", "completion"))
        labels = torch.tensor([[*answer, found.chat.eos]])
        with torch.no_grad():
            loss = found.policy.model(input_ids=torch.tensor([prompt]), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    assert measured["tokens"] == count
    assert measured["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    contents = document(train={"max_steps": 3, "gradient_accumulation": 1})
    runs.train(whole, contents)
    with runs.stopped_after(1, parts), pytest.raises(PeftctlError):
        runs.train(parts, contents)
    runs.train(parts, contents, resume=True)
    assert (parts / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()
    assert runs.untimed(parts) == runs.untimed(whole)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"task": "causal-lm"}}, r"is an encoder-decoder \(t5\): set model\.task: seq2seq-lm"),
    ({"model": {"name": str(runs.CONFIGS / "models" / "tiny-llama.json")}}, r"seq2seq-lm asks for an encoder-decoder"),
    ({"objective": {"trained": "all"}}, r"set objective\.trained: last"),
    ({"data": {"train": str(runs.CONFIGS / "data" / "preference.jsonl")}}, "objective sft learns from"),
]


@pytest.mark.parametrize(("blocks", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_does_not_go_together_is_refused_in_one_line(blocks: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PeftctlError, match=said) as caught:
        plan(runs.loaded(tmp_path / "run", document(**blocks)), Options())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_virtual_tokens_have_no_place(method: str, tmp_path: Path) -> None:
    contents = document() | {"method": {"name": method}}
    with pytest.raises(PeftctlError, match="T5ForConditionalGeneration has 2 stacks of layers") as caught:
        plan(runs.loaded(tmp_path / "run", contents), Options())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", sorted({*objectives.names()} - {"sft"}))
def test_other_objectives_are_refused(objective: str) -> None:
    assert "which needs" in str(_unfit("seq2seq-lm", SimpleNamespace(name=objective)))


def test_a_base_says_how_its_decoder_begins(tmp_path: Path) -> None:
    config = json.loads((runs.CONFIGS / "models" / "tiny-t5.json").read_text())
    (tmp_path / "t5.json").write_text(json.dumps({k: v for k, v in config.items() if k != "decoder_start_token_id"}))
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        bases.resolve(str(tmp_path / "t5.json")).start()


def test_a_smoke_run_of_a_model_that_is_not_here_takes_a_small_one(tmp_path: Path) -> None:
    contents = (
        document() | {"data": {"train": "not/here.jsonl"}} | {"model": {"name": "a/hub-model", "task": "seq2seq-lm"}}
    )
    path = runs.written(tmp_path / "run", contents)
    planned = plan(recipe.load(path, smoke=True), Options())
    assert planned.skeleton.architecture == "T5ForConditionalGeneration"


def test_counting_needs_no_task(tmp_path: Path) -> None:
    found = commands.count_params(None, ["method.rank=2"], T5["name"], "lora", None, False)
    # query, key, value and output of 6 attentions, and 4 MLPs; width 64, 128 inside
    assert found["adapter"] == 6 * 4 * 2 * 2 * 64 + 4 * 2 * 2 * (64 + 128)


def test_raw_text_has_no_prompt(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "all of it"}\n')
    with pytest.raises(DataError, match="raw text has no prompt for an encoder to read; give prompt and completion"):
        evaluation.evaluate(opened.open(opened.find(str(run))), tmp_path / "rows.jsonl")
