"""The chat templates that ship: what is learnt, one BOS, equal to transformers; templates of files; data.system."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings

from peftctl import recipe
from peftctl.composed import templates
from peftctl.data.chat import Chat
from peftctl.data.encoding import Job, Written, job_of
from peftctl.data.templates import Chosen, chosen
from peftctl.errors import DataError, InputError, RecipeError, Stopped
from peftctl.objectives import get
from peftctl.row import Message
from tests import runs
from tests.data.labelled import labelled, spans
from tests.data.test_chat import LONG, SIMPLE, TURNS

SYSTEM = Message("system", "Purr.")
GOLDEN = {
    "chatml": "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n[[sat on the mat<|im_end|>]]\n",
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nthe cat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[sat on the mat<|eot_id|>]]"
    ),
    "alpaca": "### Instruction:\nthe cat?\n\n### Response:\n[[sat on the mat<|eos|>]]\n\n",
    "vicuna": "USER: the cat?\nASSISTANT:[[ sat on the mat<|eos|>]]\n",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": "<|eos|>", "vicuna": "<|eos|>"}


@pytest.fixture(scope="module")
def folders(made):
    """Tokenizers with and without merges that have Llama 3's tokens too; with `adds_bos`, that open a text."""
    from tokenizers import Tokenizer

    def make(merges: bool, adds_bos: bool = False):
        folder = made(None, merges=merges, adds_bos=adds_bos)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return {(merges, bos): make(merges, bos) for merges in (True, False) for bos in (True, False)}


def test_every_template_is_among_them():
    assert set(GOLDEN) == set(templates())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_dialogue_in_labelled_text_out(folders, name, merges, bos):
    chat = Chat(folders[merges, bos], chosen(name))
    opening = "<|bos|>" if bos else ""
    assert labelled(chat, chat.dialogue(SIMPLE)) == opening + GOLDEN[name]
    assert spans(chat, chat.dialogue((SYSTEM, *SIMPLE))) == spans(chat, chat.dialogue(SIMPLE))
    assert "Purr." in labelled(chat, chat.dialogue((SYSTEM, *SIMPLE)))
    assert chat.tokenizer.token_to_id(ENDS[name]) in chat.eos_ids


@pytest.mark.parametrize("name", GOLDEN)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=TURNS)
def test_labels_are_the_answers_and_their_ends(folders, name, turns):
    chat = KNOWN.setdefault(name, Chat(folders[False, False], chosen(name)))
    messages = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    ids, weights = chat.dialogue(messages)
    said = [{"llama3": answer.strip(), "vicuna": f" {answer}"}.get(name, answer) + ENDS[name] for _, answer in turns]
    assert chat.decode([i for i, w in zip(ids, weights, strict=True) if w], special=True) == "".join(said)
    assert chat.decode(ids, special=True) == chat.template.render(messages).text
    asked = chat.render_prompt(messages[:-1])
    assert ids[: len(asked)] == asked and not weights[len(asked) - 1] and weights[len(asked)]


KNOWN: dict[str, Chat] = {}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_saved_gives_transformers_the_same_ids_system_prompt_and_all(folders, name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    chat = Chat(folders[True, True], chosen(name), system='Say "{{ purr }}", %}\nwith ä \U0001f436.')
    chat.save(tmp_path)
    theirs, again = PreTrainedTokenizerFast.from_pretrained(tmp_path), Chat(tmp_path)
    for messages in (SIMPLE, LONG, (SYSTEM, *SIMPLE)):
        plain = [message.document() for message in messages]
        expected = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
        assert list(chat.dialogue(messages)[0]) == list(again.dialogue(messages)[0]) == expected
    told = labelled(again, again.dialogue(SIMPLE))
    assert 'Say "{{ purr }}", %}\nwith ä \U0001f436.' in told and told.count("<|bos|>") == 1
    assert "purr" not in labelled(again, again.dialogue((SYSTEM, *SIMPLE)))


def test_tokens_that_a_template_needs(made):
    with pytest.raises(DataError, match=r"the chat template llama3 needs <\|start_header_id\|>, .*does not have"):
        Chat(made(None), chosen("llama3"))
    with pytest.raises(DataError, match="the chat template alpaca needs eos_token"):
        Chat(made(None, eos_token=None), chosen("alpaca"))


def test_a_role_that_has_no_place(folders):
    for name in ("alpaca", "vicuna"):
        with pytest.raises(DataError, match="it has no place for the role tool"):
            Chat(folders[False, False], chosen(name)).dialogue((*SIMPLE, Message("tool", "2"), *SIMPLE))


def test_a_system_prompt_needs_a_template(made):
    with pytest.raises(DataError, match=r"data\.system: the tokenizer .* has no chat template"):
        Chat(made(None), system="Purr.")
    chat = Chat(made("chatml"), system="Purr.")
    for call in (lambda: chat.completion("a", "b"), lambda: chat.text("a")):
        with pytest.raises(DataError, match=r"data\.system has no place in"):
            call()


@pytest.mark.parametrize(
    ("content", "said"), [(b" \n", "is empty"), (b"\xff", "is no UTF-8 at byte 1"), (None, "cannot be read")]
)
def test_a_file_that_is_no_template(tmp_path, content, said):
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"data.chat_template: .*own.jinja {said}"):
        chosen(str(path))


def test_a_recipe_names_one_or_a_file_beside_it(tmp_path, monkeypatch):
    def load(wanted):
        return runs.loaded(tmp_path / "run", runs.document(data={"chat_template": wanted})).data.chat_template

    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.chdir(tmp_path.parent)
    assert load("chatml") == "chatml" and load("own.jinja") == str(tmp_path / "own.jinja")
    assert chosen(load("own.jinja")) == Chosen("{{ messages[0].content }}", "the chat template own.jinja")
    with pytest.raises(RecipeError, match=r"data\.chat_template: 'chatlm' is not known; did you mean chatml"):
        load("chatlm")
    assert recipe.json_schema()["properties"]["data"]["properties"]["system"]


def test_a_run_saves_the_template_with_its_system_prompt(tmp_path):
    runs.train(
        tmp_path / "run", runs.document(data={"system": "Purr.", "chat_template": "chatml"}, train={"max_steps": 1})
    )
    again = Chat(tmp_path / "run" / "adapter")
    assert labelled(again, again.dialogue(SIMPLE)).startswith("<|im_start|>system\nPurr.<|im_end|>\n")
    assert Chat(again.folder, again.template.source, system="Purr.").template.source == again.template.source


def test_another_process_gets_the_same_template(folders):
    sft = get("sft")
    config = sft.config(name="sft")
    for chat in (Chat(folders[True, True], chosen("chatml"), system="Purr."), Chat(folders[True, True])):
        written = Written("rows", ("prompt", "completion"), "auto", None, sft.kinds)
        job = Job(chat, sft, config, written, written.decide(), 99, None)
        again = job_of(json.loads(json.dumps(job.document()))).chat
        assert (again.system, again.fingerprint()) == (chat.system, chat.fingerprint())
        assert chat.template is None or again.template.name == chat.template.name


def test_a_template_that_was_changed_meanwhile_is_refused(tmp_path):
    own, output = tmp_path / "own.jinja", tmp_path / "run"
    own.write_text(templates()["chatml"].read_text())
    contents = runs.document(data={"chat_template": str(own)})
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, contents)
    own.write_text("{{- 'Well.' -}}" + own.read_text())
    with pytest.raises(InputError, match=r"the data's content\.chat_template"):
        runs.train(output, contents, resume=True)
