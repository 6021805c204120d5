"""Each layout answers as each row alone does, on every architecture; which layout serves which is found, not listed."""

import pytest
import torch

from peftctl.batch import build
from peftctl.errors import ModelError
from peftctl.layout import choose
from peftctl.methods.attachment import Attachment
from peftctl.policy import Layout, Policy, last_hidden
from peftctl.row import Row
from peftctl.surgery import skeleton
from tests.models import tiny

SHARED = ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "phi3"]
JOINED = ["bert", "roberta"]  # attention looks both ways, so a start depends on what follows it
PADDED = ["bloom", "falcon", "mpt"]  # they never ask the attention interface
EXPECTED = dict.fromkeys(SHARED, "shared") | dict.fromkeys(JOINED, "joined") | dict.fromkeys(PADDED, "padded")


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    start, *ends = (torch.randint(5, 100, (n,), generator=generator).tolist() for n in (7, 3, 12, 9))
    ids = [start + ends[0], start + ends[1], start + ends[1] + ends[2], ends[2]]
    return [Row(tuple(i), (0.0,) + (1.0,) * (len(i) - 1)) for i in ids]


def layers(model: torch.nn.Module) -> int:
    return skeleton(model).dimensions.layers


@pytest.mark.parametrize("name", EXPECTED)
def test_the_layout_found_serves(name: str) -> None:
    model = tiny(name)
    layout = choose(model, layers(model))
    assert layout.name == EXPECTED[name]
    policy = Policy(model, Attachment(), layout, None)
    with torch.no_grad():
        together = policy.row_hidden(build(rows()))
        for row, hidden in zip(rows(), together, strict=True):
            alone = last_hidden(model.base_model(input_ids=torch.tensor([row.ids])))[0]
            torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("share", ["all", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "mixtral"])
def test_what_follows_the_last_source_is_of_no_use(name: str, share: str) -> None:
    from peftctl.head import head_of

    model = tiny(name)
    uneven = [Row(row.ids, (0.0,) * 3 + (1.0,) * (len(row.ids) - 3 - n) + (0.0,) * n) for n, row in enumerate(rows())]
    uneven.append(Row((7, 8, 9), (0.0, 0.0, 0.0)))  # nothing to learn from
    found, computed = [], []
    for trim in (False, True):
        bias = torch.nn.Parameter(torch.zeros(skeleton(model).dimensions.hidden))
        handle = model.get_input_embeddings().register_forward_hook(lambda m, a, y, bias=bias: y + bias)
        batch = build(uneven, share=share, trim=trim)
        stats = Policy(model, Attachment(), Layout("shared"), head_of(model)).tokens(batch)
        (stats.logprob * torch.arange(len(stats.logprob))).sum().backward()
        handle.remove()
        found.append((stats.logprob.detach(), bias.grad))
        computed.append(len(batch))
        assert batch.real_tokens == sum(len(row.ids) for row in uneven)
    assert computed[0] - computed[1] >= sum(n + 1 for n in range(len(rows()))) - (2 if share == "all" else 0)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_all_layouts_give_the_same_labels_and_gradients(name: str) -> None:
    from peftctl.head import head_of

    model = tiny(name)
    found = {}
    for layout in ("shared", "joined", "padded"):
        bias = torch.nn.Parameter(torch.zeros(skeleton(model).dimensions.hidden))
        handle = model.get_input_embeddings().register_forward_hook(lambda m, a, y, bias=bias: y + bias)
        stats = Policy(model, Attachment(), Layout(layout), head_of(model)).tokens(build(rows()))
        (stats.logprob * torch.arange(len(stats.logprob))).sum().backward()
        handle.remove()
        found[layout] = (stats.logprob.detach(), bias.grad)
    for layout in ("joined", "padded"):
        for ours, theirs in zip(found["shared"], found[layout], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_label_logprobs_are_the_models_own() -> None:
    from peftctl.head import head_of

    for name in ("llama", "gemma2"):
        model = tiny(name)
        batch = build(rows())
        stats = Policy(model, Attachment(), Layout("shared"), head_of(model)).tokens(batch)
        for r, row in enumerate(rows()):
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(stats.logprob[batch.labels.row == r], expected, rtol=1e-4, atol=1e-4)


def test_a_layout_that_does_not_serve_is_refused_by_name() -> None:
    model = tiny("bloom")
    with pytest.raises(
        ModelError, match=r"BloomForCausalLM cannot be served.*shared: attention was dispatched 0 times"
    ):
        choose(model, layers(model), "shared")


def test_the_base_keeps_its_own_attention_outside() -> None:
    model = tiny("llama")
    ids = torch.tensor([rows()[0].ids])
    before, kind = model(input_ids=ids).logits, model.config._attn_implementation
    Policy(model, Attachment(), Layout("shared"), None).row_hidden(build(rows()))
    assert model.config._attn_implementation == kind
    assert torch.equal(model(input_ids=ids).logits, before)
