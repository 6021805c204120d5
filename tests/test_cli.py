"""The command line: one JSON document on stdout, one line for an error, and the exit codes of the contract."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from peftctl import __version__, cli, methods, objectives
from peftctl.errors import PeftctlError
from peftctl.report import read
from peftctl.schema import Recipe

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
TINY = str(ROOT / "configs" / "models" / "tiny-llama.json")
ROWS = str(ROOT / "configs" / "data" / "messages.jsonl")
PAIRS = str(ROOT / "configs" / "data" / "preference.jsonl")


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout, strictly read."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=refuse)

    @property
    def refusal(self) -> str:
        """The line that a refused command leaves, without its head; before it may stand what was being loaded."""
        (line,) = (line for line in self.err.splitlines() if not line.startswith("peftctl: loading "))
        assert self.code == 2 and self.out == "" and line.startswith("peftctl: error: ")
        return line.removeprefix("peftctl: error: ")


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return Answer(end.value.code if isinstance(end.value.code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished smoke run; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCTL_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as end:
            cli.main(["--quiet", "train", SMOKE, "--output", str(folder / "run")])
    assert end.value.code == 0
    yield folder / "run"


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"peftctl {__version__}\n", "")


@pytest.mark.parametrize(("command", "package"), [("methods", methods), ("objectives", objectives)])
def test_what_there_is(call: Call, command: str, package: Any) -> None:
    entries = call(command, "--json").document
    assert [entry["name"] for entry in entries] == list(package.names())
    assert all(entry["summary"] and "paper" in entry for entry in entries)
    lines = call(command).out.splitlines()
    assert [line.split()[0] for line in lines] == list(package.names()) and not any("()" in line for line in lines)


def test_schema_is_one_document(call: Call) -> None:
    assert set(Recipe.model_fields) <= set(call("schema").document["properties"])


def test_every_command_has_an_example_or_needs_none(call: Call) -> None:
    shown = call("--help").out
    for command in ("train", "validate", "count-params", "merge", "generate", "eval", "init"):
        assert command in shown
        assert "Example: peftctl" in call(command, "--help").out


def test_init_writes_a_recipe_that_trains_as_it_is(call: Call, tmp_path: Path) -> None:
    assert "peftctl train my.yaml" in call("init", "my.yaml").out
    before = Path("my.yaml").read_text()
    assert call("init", "my.yaml").refusal == "my.yaml exists already: name another file"
    assert call("init", "none/my.yaml").refusal == "none/my.yaml cannot be written: No such file or directory"
    assert Path("my.yaml").read_text() == before
    assert call("--quiet", "train", "my.yaml", "--json", "--set", "train.max_steps=2").document["steps"] == 2


def test_train_prints_one_document_and_its_progress_on_stderr(call: Call, tmp_path: Path) -> None:
    answer = call("train", SMOKE, "--json", "--output", "12")  # a folder's name that YAML takes for a number
    result = answer.document
    assert result.keys() >= {
        *("run", "adapter", "steps", "tokens", "train_loss", "validation_loss"),
        *("tokens_per_s", "seconds", "peak_memory_bytes"),
    }
    assert result["run"] == "12" and result["adapter"] == "12/adapter" and result["steps"] == 4
    events = read(Path("12/metrics.jsonl"))
    assert result["train_loss"] == [e["loss"] for e in events if e["event"] == "step"][-1]
    assert result["validation_loss"] == [e["validation_loss"] for e in events if e["event"] == "evaluation"][-1]
    assert "training" in answer.err
    again = call("train", SMOKE, "--output", "12", "--quiet")
    assert again.code == 0 and again.err == ""  # a random base's run is nothing precious
    resumed = call("train", SMOKE, "--json", "--output", "12", "--resume").document
    assert resumed["steps"] == 4


def test_a_run_on_a_real_base_is_not_trained_over(call: Call, trained: Path) -> None:
    arguments = ["train", SMOKE, "--set", f"model.name={trained / 'base'}", "--set", "train.max_steps=1"]
    arguments += ["--output", "real"]
    assert call("--quiet", *arguments).code == 0
    before = {path: path.read_bytes() for path in Path("real").rglob("*") if path.is_file()}
    said = call("--quiet", *arguments).refusal
    assert said == "output: real holds a run already: --resume goes on with it, --output DIR starts another"
    assert {path: path.read_bytes() for path in Path("real").rglob("*") if path.is_file()} == before


def test_dry_run_trains_nothing(call: Call) -> None:
    result = call("train", SMOKE, "--dry-run", "--json").document
    assert result["steps"] == 4 and result["trainable"] > 0
    assert not Path("runs").exists()


def test_resume_needs_a_run(call: Call) -> None:
    said = call("--quiet", "train", SMOKE, "--resume").refusal
    assert said == "--resume: there is no run in runs/smoke; without --resume one is started there"
    assert call("--quiet", "train", SMOKE, "--resume-from", "nowhere").refusal


def test_count_params_says_what_the_built_model_says(call: Call) -> None:
    result = call("count-params", "--base", TINY, "--method", "lora", "--set", "method.rank=4", "--json").document
    by_hand = 2 * 4 * ((128 + 128) * 2 + (128 + 64) * 2 + (128 + 256) * 3)  # layers * rank * (in + out)
    assert result.keys() >= {"adapter", "saved_modules", "trainable", "base", "total", "percent"}
    assert result["adapter"] == result["trainable"] == by_hand and result["saved_modules"] == 0
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copy(TINY, "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("."))
    base = sum(parameter.numel() for parameter in model.parameters())
    assert result["base"] == base and result["total"] == base + by_hand
    assert result["percent"] == pytest.approx(100 * by_hand / (base + by_hand))
    recipe = call("count-params", SMOKE, "--by", "module", "--json").document
    assert sum(recipe["by_module"].values()) == recipe["adapter"] == by_hand


def test_validate_reads_recipe_and_data_and_no_weights(call: Call) -> None:
    answer = call("validate", SMOKE, "--show", "1", "--json")
    result = answer.document
    rows = len(Path(ROWS).read_text().splitlines())
    assert result.keys() >= {"rows", "kept", "refused", "labelled_tokens"}
    assert result["rows"] == result["kept"] == rows and result["refused"] == 0
    assert result["train_examples"] + result["validation_examples"] == rows
    assert "<|im_end|>" in answer.err
    Path("bad.jsonl").write_text('{"messages": []}\n')
    assert "bad.jsonl" in call("validate", SMOKE, "--set", "data.train=bad.jsonl").err


def test_validate_tells_figures_and_warnings(call: Call) -> None:
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [said, said, {"messages": []}, {**said, "id": 1}])))
    options = ("--set", "data.train=rows.jsonl", "--set", "data.validation=null", "--set", "train.eval_every=null")
    options += ("--set", "data.on_bad_row=skip", "--set", "method={name: prefix, num_virtual_tokens: 20}")
    told = call("validate", SMOKE, *options, "--json").document
    assert (told["rows"], told["kept"], told["refused"], told["repeated"], told["positions"]) == (4, 3, 1, 2, 1004)
    assert told["faults"] == ["rows.jsonl:3: messages must be a list of messages {role, content}; found an empty list"]
    assert told["warnings"] == ["training examples that stand in the data more than once: 2"]
    text = call("validate", SMOKE, *options).out
    assert re.search(r"^rows +4$", text, re.M) and re.search(r"^tokens a sequence\n +1 to", text, re.M)
    assert "warnings\n  training examples that stand" in text and "faults\n  rows.jsonl:3: " in text
    held = call("validate", SMOKE, *options, "--set", f"data.validation={ROWS}")
    assert re.search(r"^validation\n  name +.*messages\.jsonl\n  rows +12$", held.out, re.M)


def test_rows_longer_than_the_positions_beside_virtual_tokens(call: Call) -> None:
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a" * 999, "completion": "b"}) + "\n")
    options = ("--set", "data.train=rows.jsonl", "--set", "data.validation=null", "--set", "train.eval_every=null")
    assert call("validate", SMOKE, *options, "--json").document["longest"] == 1001
    refused = call("validate", SMOKE, *options, "--set", "method={name: prefix, num_virtual_tokens: 24}").refusal
    assert refused.startswith(
        "rows.jsonl: the longest row has 1001 tokens, the base has positions for 1024, 24 of them"
    )


def test_validate_needs_no_torch() -> None:
    code = (
        "import sys; from peftctl import cli\n"
        f"try: cli.main(['--quiet', 'validate', {SMOKE!r}, '--show', '1', '--json'])\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(code or ('torch' in sys.modules) or ('transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_generate(call: Call, trained: Path) -> None:
    arguments = [str(trained), "--prompt", "What is two and three?", "--max-new-tokens", "5"]
    result = call("generate", *arguments, "--json").document
    assert result["prompt"] == "What is two and three?" and 1 <= result["tokens"] <= 5
    assert call("generate", *arguments).out == result["text"] + "\n"
    adapter = call("generate", str(trained / "adapter"), *arguments[1:], "--json").document
    assert adapter == result


def test_eval(call: Call, trained: Path) -> None:
    result = call("eval", str(trained), "--data", ROWS, "--json").document
    assert result.keys() >= {"loss", "perplexity", "tokens"} and result["tokens"] > 0
    assert result["perplexity"] == pytest.approx(torch.tensor(result["loss"]).exp().item(), rel=1e-4)
    base = call("eval", str(trained / "base"), "--data", ROWS, "--json").document
    assert base["loss"] > result["loss"] and base["tokens"] == result["tokens"]
    assert "preference" in call("eval", str(trained), "--data", PAIRS).refusal
    assert "none.jsonl" in call("eval", str(trained), "--data", "none.jsonl").refusal


def test_merge_answers_as_base_and_adapter_do(call: Call, trained: Path) -> None:
    result = call("merge", str(trained), "--output", "merged", "--json").document
    assert result.keys() >= {"output", "seconds", "peak_memory_bytes", "max_logit_difference"}
    assert result["max_logit_difference"] < 1e-4
    both = call("eval", str(trained), "--data", ROWS, "--json").document
    merged = call("eval", "merged", "--data", ROWS, "--json").document
    assert merged["loss"] == pytest.approx(both["loss"], rel=1e-5)
    assert "is a model, not an adapter" in call("merge", "merged", "--output", "twice").refusal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "none.yaml"], "none.yaml: cannot be read: No such file or directory"),
        (
            ["train", SMOKE, "--set", "train.keep=0"],
            "--set train.keep=0: train.keep is 0; a number at least 1 is meant",
        ),
        (["train", SMOKE, "--device", "abacus"], "--device abacus: train.device.*"),
        (["train", SMOKE, "--output", ""], "--output : output is a folder"),
        (["train", SMOKE, "--set", "method.target_modules=[q_prj]"], "method.target_modules: .*q_proj"),
        (["train", SMOKE, "--set", "data.train=none.jsonl"], ".*none.jsonl"),
        (
            ["train", SMOKE, "--set", "model.name=org/none"],
            "model.name: there is no folder 'org/none', and as a hub model it is not on this machine",
        ),
        (["count-params"], "count-params: give a RECIPE, or --base and --method"),
        (["count-params", "--base", TINY, "--method", "lroa"], "--method lroa: .*did you mean lora"),
        (["count-params", "--base", "org/none", "--method", "lora"], "there is no folder 'org/none', and as a hub"),
        (["count-params", SMOKE, "--base", TINY], "count-params: --base and --method stand in for a RECIPE"),
        (["generate", "./none", "--prompt", "x"], ".*none"),
        (["generate", TINY, "--prompt", "x"], ".*tokenizer"),
        (["eval", "org/none", "--data", ROWS], "there is no folder 'org/none', and as a hub model"),
        (["eval", "~/none", "--data", ROWS], "there is no folder ~/none"),
        (["merge", "./none", "--output", "x"], ".*none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call: Call, arguments: list[str], said: str) -> None:
    assert re.match(said, call("--quiet", *arguments).refusal)
    assert not Path("runs").exists() or not list(Path("runs").rglob("run.json"))


@pytest.mark.parametrize("arguments", [["train"], ["bake"], ["train", SMOKE, "--colour"], ["merge", "x"]])
def test_a_command_line_that_is_none_ends_with_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).code == 2


def test_debug_shows_the_traceback(call: Call) -> None:
    with pytest.raises(PeftctlError):
        cli.main(["--debug", "train", "none.yaml"])
    assert call("train", "none.yaml").refusal  # and the next command does not
