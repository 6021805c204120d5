"""Dialogues to labelled tokens: equal to transformers, the right labels, and no more than one BOS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peftctl.data.chat import Chat
from peftctl.errors import DataError, FormatError
from peftctl.row import Message
from tests.data.labelled import labelled, spans

TEMPLATES = ["chatml", "default_system", "llama3", "zephyr", "gemma", "generation", "generation_inside", "closing"]
TEMPLATES.append("marked_thinking")
SIMPLE = (Message("user", "the cat?"), Message("assistant", "sat on the mat"))
LONG = (*SIMPLE, Message("user", "And the dög \U0001f436?"), Message("assistant", "  on the log\n"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [SIMPLE, LONG], ids=["simple", "long"])
def test_ids_equal_transformers(made, name, messages):
    from transformers import PreTrainedTokenizerFast

    folder = made(name, adds_bos=name in ("llama3", "gemma"))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    chat = Chat(folder)
    plain = [message._asdict() for message in messages]
    assert list(chat.dialogue(messages)[0]) == theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    asked = theirs.apply_chat_template(plain[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert list(chat.render_prompt(messages[:-1])) == asked
    assert list(chat.prompt("the cat")) == theirs("the cat")["input_ids"]


GOLDEN = {
    "chatml": "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n[[sat on the mat<|im_end|>]]\n",
    "default_system": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
        "<|im_start|>assistant\n[[sat on the mat<|im_end|>]]\n"
    ),
    "llama3": (
        "<|bos|><|start|>user<|stop|>\n\nthe cat?<|turn|><|start|>assistant<|stop|>\n\n[[sat on the mat<|turn|>]]"
    ),
    "zephyr": "<|user|>\nthe cat?<|eos|>\n<|assistant|>\n[[sat on the mat<|eos|>]]\n",
    "gemma": "<|bos|><|start|>user\nthe cat?<|turn|>\n<|start|>model\n[[sat on the mat<|turn|>]]\n",
    "generation": "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n[[sat on the mat<|im_end|>]]\n",
    "generation_inside": (
        "<|start|>user<|stop|>the cat?<|turn|>\n<|start|>assistant<|stop|>[[sat on the mat<|turn|>]]\n"
    ),
    "closing": "<|user|>\nthe cat?<|turn|>\n<|assistant|>\n[[sat on the mat<|turn|>]]\n<|eos|>",
    "plain": "user: the cat?\nassistant: [[sat on the mat\n]]",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_row_in_labelled_text_out(made, name):
    chat = Chat(made(name, merges=False))
    assert labelled(chat, chat.dialogue(SIMPLE)) == GOLDEN[name]


CONTENT = st.text(st.characters(exclude_categories=("Cs", "Cn")), min_size=1, max_size=12).filter(str.strip)
MARKS = st.sampled_from(["<|im_end|>", "think", "im", "<|turn|>\n", "peftctl", "[INST]", "assistant: "])
TURNS = st.lists(st.tuples(CONTENT | MARKS, CONTENT | MARKS), min_size=1, max_size=3)


ENDS = {"chatml": "<|im_end|>", "default_system": "<|im_end|>", "generation": "<|im_end|>", "zephyr": "<|eos|>"}


@pytest.fixture(scope="module")
def letters(made):
    """Chats over a tokenizer without merges, where every boundary of characters is one of tokens."""
    return {name: Chat(made(name, merges=False)) for name in GOLDEN}


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "plain"])
@pytest.mark.parametrize("trained", ["assistant", "last"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=TURNS)
def test_labels_are_the_answers_and_their_ends(letters, name, trained, turns):
    chat = letters[name]
    messages = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    ids, weights = chat.dialogue(messages, trained)
    trims, end = name in ("llama3", "gemma"), ENDS.get(name, "<|turn|>")
    answers = [(answer.strip() if trims else answer) + end for _, answer in turns]
    learnt = chat.decode([i for i, w in zip(ids, weights, strict=True) if w], special=True)
    assert learnt == "".join(answers if trained == "assistant" else answers[-1:])
    assert chat.decode(ids, special=True) == chat.template.render(messages).text
    assert ids.count(chat.tokenizer.token_to_id("<|bos|>")) == trims


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(question=CONTENT, answer=CONTENT)
@example(question="0", answer="[[")
def test_with_merges_too(made, question, answer):
    chat = CACHE.get("merges") or CACHE.setdefault("merges", Chat(made("generation_inside")))
    encoded = chat.dialogue([Message("user", question), Message("assistant", answer)])
    assert spans(chat, encoded) == [answer + "<|turn|>"]
    assert chat.decode(encoded[0], special=True).endswith(f"<|stop|>{answer}<|turn|>\n")


CACHE: dict[str, Chat] = {}


def test_last_turn_alone(letters):
    for name in ("chatml", "generation", "closing"):
        everything = letters[name].dialogue(LONG, "assistant")
        last = letters[name].dialogue(LONG, "last")
        assert everything[0] == last[0]
        assert len(spans(letters[name], everything)) == 2
        assert spans(letters[name], last) == ["  on the log\n" + ENDS.get(name, "<|turn|>")]


def test_a_template_that_drops_thinking_is_refused_unless_the_last_turn_is_learnt(made):
    chat = Chat(made("thinking", merges=False))
    said = Message("assistant", "<think>hm</think>yes")
    with pytest.raises(DataError, match=r"message 2 inconsistently.*objective\.trained: last"):
        chat.dialogue((LONG[0], said, *LONG[2:]))
    assert spans(chat, chat.dialogue((*LONG[:3], said), "last")) == ["<think>hm</think>yes<|im_end|>"]
    assert spans(chat, chat.dialogue((*SIMPLE, LONG[2], said))) == [
        "sat on the mat<|im_end|>", "<think>hm</think>yes<|im_end|>"
    ]  # fmt: skip


def test_generation_marks_need_no_consistent_beginnings(made):
    chat = Chat(made("marked_thinking", merges=False))
    said = Message("assistant", "<think>hm</think>yes")
    encoded = chat.dialogue((LONG[0], said, LONG[2], said))
    assert spans(chat, encoded) == ["yes<|turn|>", "<think>hm</think>yes<|turn|>"]
    assert spans(chat, chat.dialogue((LONG[0], said, LONG[2], said), "last")) == ["<think>hm</think>yes<|turn|>"]


def test_a_prompt_that_is_not_how_the_answer_begins_is_refused(made):
    source = (
        "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 2 inconsistently.*the prompt for it"):
        Chat(made(None), source).dialogue(SIMPLE)


def test_an_answer_that_the_template_leaves_out_is_refused(made):
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        Chat(made(None), "{{ messages[0].content }}").dialogue(SIMPLE)


CALLS = (("tool_calls", [{"function": {"name": "add", "arguments": {"a": 1}}}]),)


def test_a_template_that_leaves_out_tools_or_calls_is_refused(letters):
    chat = letters["chatml"]
    with pytest.raises(DataError, match="leaves out the tools of this row"):
        chat.dialogue(SIMPLE, tools=[{"name": "add"}])
    with pytest.raises(DataError, match="leaves out the tool calls of this row"):
        chat.dialogue((*SIMPLE, SIMPLE[0], Message("assistant", "", None, CALLS)))


def test_tools_equal_transformers(made):
    from transformers import PreTrainedTokenizerFast

    folder = made("tools")
    theirs, chat = PreTrainedTokenizerFast.from_pretrained(folder), Chat(folder)
    tools = [{"type": "function", "function": {"name": "add", "description": "ä <b>"}}]
    messages = (SIMPLE[0], Message("assistant", "", None, CALLS), Message("tool", "2"), SIMPLE[1])
    plain = [message.document() for message in messages]
    expected = theirs.apply_chat_template(plain, tools=tools, tokenize=True, return_dict=False)
    assert list(chat.dialogue(messages, tools=tools)[0]) == expected


@pytest.mark.parametrize("name", ["chatml", "generation", "generation_inside", "closing", "llama3"])
def test_a_messages_own_weight_goes_first(letters, name):
    chat, end = letters[name], ENDS.get(name, "<|turn|>")
    first, second = (Message("assistant", said) for said in ("sat", "mat"))
    for weights, expected in [
        ((0.0, None), [f"mat{end}"]), ((None, 0.0), [f"sat{end}"]), ((0.5, 2.0), [f"0.5|sat{end}", f"2|mat{end}"])
    ]:  # fmt: skip
        said = [turn._replace(weight=weight) for turn, weight in zip((first, second), weights, strict=True)]
        encoded = chat.dialogue((SIMPLE[0], said[0], SIMPLE[0], said[1]))
        assert spans(chat, encoded) == expected
    asked = SIMPLE[0]._replace(weight=1.0)
    assert spans(chat, chat.dialogue((asked, first)))[0] == "the cat?" + end
    with pytest.raises(DataError, match=r"weight 0 \(or train: false\)"):
        chat.dialogue((SIMPLE[0], first._replace(weight=0.0)))
    with pytest.raises(DataError, match="message 1 has a weight of its own"):
        chat.dialogue((asked._replace(weight=0.0), first), "all")
    with pytest.raises(DataError, match="no tool turn"):
        chat.dialogue(SIMPLE, ["tool"])


def test_no_assistant_turn(letters):
    with pytest.raises(DataError, match="no assistant turn"):
        letters["chatml"].dialogue(SIMPLE[:1])


def test_the_template_may_refuse(letters):
    with pytest.raises(DataError, match="refuses this dialogue: System role not supported"):
        letters["gemma"].dialogue((Message("system", "x"), *SIMPLE))


def test_without_a_template_messages_are_refused(made):
    chat = Chat(made(None))
    for call in (chat.dialogue, chat.render_prompt):
        with pytest.raises(DataError, match=r"has no chat template.*put a chat_template\.jinja"):
            call(SIMPLE)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FormatError, match=r"has no tokenizer\.json"):
        Chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="is not a tokenizer"):
        Chat(tmp_path)


def test_the_template_may_stand_in_the_config(made):
    source = (Path(__file__).parent / "templates" / "chatml.jinja").read_text()
    expected = Chat(made("chatml")).dialogue(SIMPLE)
    assert Chat(made(None, chat_template=source)).dialogue(SIMPLE) == expected
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    assert Chat(made(None, chat_template=several)).dialogue(SIMPLE) == expected
    assert Chat(made("zephyr"), source).dialogue(SIMPLE) == expected


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_has_one_bos_and_ends(made, adds_bos):
    chat = Chat(made(None, adds_bos=adds_bos))
    bos = "<|bos|>" if adds_bos else ""
    assert labelled(chat, chat.completion("the cat", " sat")) == f"{bos}the cat[[ sat<|eos|>]]"
    assert labelled(chat, chat.completion("<|bos|>the cat", " sat<|eos|>")) == "<|bos|>the cat[[ sat<|eos|>]]"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_raw_text_is_learnt_whole(made, adds_bos):
    chat = Chat(made(None, adds_bos=adds_bos))
    bos = "<|bos|>" if adds_bos else ""
    assert labelled(chat, chat.text("the cat")) == f"[[{bos}the cat<|eos|>]]"
    assert labelled(chat, chat.text("<|bos|>the cat<|eos|>")) == "[[<|bos|>the cat<|eos|>]]"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=CONTENT, answer=CONTENT)
def test_plain_answers_are_learnt_whole(made, prompt, answer):
    chat = CACHE.get("plain") or CACHE.setdefault("plain", Chat(made(None)))
    ids, weights = chat.completion(prompt, answer)
    before = chat.prompt(prompt)
    assert ids[: len(before)] == before and weights == (0.0,) * len(before) + (1.0,) * (len(ids) - len(before))
    assert chat.decode(ids, special=True) == prompt + answer + "<|eos|>"
    assert chat.decode(ids[len(before) :], special=True) == answer + "<|eos|>"


def test_a_tokenizer_that_puts_a_space_first(metaspace):
    chat = Chat(metaspace)
    assert labelled(chat, chat.completion("the cat", " sat on")).endswith("[[sat on<|eos|>]]")
    # "assistant: " ends in the space that begins the token of "sat": a token belongs to where it starts
    assert spans(chat, chat.dialogue(SIMPLE)) == ["on the mat\n"]
    with pytest.raises(DataError, match="begin the completion with the space"):
        chat.completion("the cat s", "at")


def test_an_answer_cannot_end_without_eos(made):
    with pytest.raises(DataError, match=r"no eos_token.*tokenizer_config"):
        Chat(made(None, eos_token=None)).completion("a", "b")


@pytest.mark.fault(38)
def test_pad_may_be_eos(made):
    chat = Chat(made("zephyr", merges=False, pad_token="<|eos|>"))
    assert labelled(chat, chat.dialogue(SIMPLE)) == GOLDEN["zephyr"]


def test_eos_ids_hold_the_end_of_turn(made):
    folder = made("chatml", eos_token={"content": "<|eos|>"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    chat = Chat(folder)
    assert chat.eos_ids == (1, 7, chat.tokenizer.token_to_id("<|im_end|>"))
    assert Chat(made("plain")).eos_ids == (1,)


def test_a_limit_in_the_tokenizers_file_cuts_nothing(made):
    folder = made("chatml")
    tokenizer = Chat(folder).tokenizer
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=900)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Chat(folder).dialogue(SIMPLE) == Chat(made("chatml")).dialogue(SIMPLE)


def test_saved_is_the_same(made, tmp_path):
    chat = Chat(made(None, chat_template="unused"), (Path(__file__).parent / "templates" / "zephyr.jinja").read_text())
    chat.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    again = Chat(tmp_path / "adapter")
    assert again.dialogue(LONG) == chat.dialogue(LONG) and again.eos_ids == chat.eos_ids
    assert "chat_template" not in json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    again.save(tmp_path / "adapter")  # onto itself


def test_vocabulary_and_tokens(letters):
    chat = letters["chatml"]
    assert chat.vocabulary == chat.tokenizer.get_vocab_size()
    assert chat.token(0) == "<|bos|>" and chat.decode([0, *chat.prompt("a")]) == "a"
