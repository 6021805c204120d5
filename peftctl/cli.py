"""The command line: parse, call, print. Everything heavy is imported inside a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftctl import __version__, functions, signals
from peftctl.errors import PeftctlError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune Hugging Face models with small adapters, from a YAML recipe.",
)
debug = False
quiet = False
words: list[str] = []  # of the command line

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe", show_default=False)]
PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="a run, an adapter or a model", show_default=False)]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key: train.max_steps=10")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
ComputeType = Annotated[str, typer.Option(help="what weights are multiplied in: auto, float32, bfloat16 or float16")]
BaseOption = Annotated[str | None, typer.Option("--base", help="the base, if not the one the adapter names")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"peftctl {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    quiet_: Annotated[bool, typer.Option("--quiet", help="no progress on stderr")] = False,
    debug_: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    global debug, quiet
    debug, quiet = debug_, quiet_


@app.command(epilog="Example: peftctl train recipes/smoke.yaml --set train.max_steps=4")
def train(
    path: RecipeArgument,
    set_: Set = [],  # noqa: B006  (typer reads the default, nothing writes it)
    output: Annotated[str | None, typer.Option(help="the run's folder, in place of the recipe's")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    resume_from: Annotated[str | None, typer.Option(help="go on from this checkpoint")] = None,
    device: Annotated[str | None, typer.Option(help="in place of train.device")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, train nothing")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="2 steps on a tiny random model, no downloads")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="tell where the time went; write RUN/trace.json")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="skip the proof after training")] = False,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="processes on this machine that share each step")] = 1,
    trust_recipe_code: Annotated[
        bool, typer.Option(functions.FLAG, help="run the Python functions that the recipe names")
    ] = False,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Train a recipe; the run's folder holds the adapter and what proves it."""
    from peftctl import commands

    if nproc > 1 and not dry_run:
        from peftctl.launch import launch

        raise typer.Exit(launch(nproc, words))

    own = {key: value for key, value in (("output", output), ("train.device", device)) if value is not None}
    options = {"resume": resume, "resume_from": resume_from, "verify": not no_verify, "quiet": quiet}
    options |= {"profile": profile, "trust_remote_code": trust_remote_code, "trust_recipe_code": trust_recipe_code}
    result = commands.train(path, set_, own, smoke, dry_run, options)
    _print(result, json_, commands.described)


@app.command(epilog="Example: peftctl validate recipes/smoke.yaml --show 2")
def validate(
    path: RecipeArgument,
    set_: Set = [],  # noqa: B006
    show: Annotated[int, typer.Option(help="print this many rows, token by token, labels in colour")] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="as train --smoke would run it")] = False,
    json_: Json = False,
) -> None:
    """Check a recipe and its data; no weights are loaded."""
    from peftctl import commands

    _print(commands.validate(path, set_, smoke, show, quiet), json_, commands.described_rows)


@app.command(epilog="Example: peftctl count-params recipes/smoke.yaml --by module")
def count_params(
    path: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="a YAML recipe", show_default=False)] = None,
    set_: Set = [],  # noqa: B006
    base: Annotated[str | None, typer.Option(help="without a recipe: a model, or a bare config.json")] = None,
    method: Annotated[str | None, typer.Option(help="without a recipe: the method's name")] = None,
    by: Annotated[str | None, typer.Option(help="module: also a tree of the places")] = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Count what would be trained, exactly, without reading a weight."""
    from peftctl import commands

    result = commands.count_params(path, set_, base, method, by, trust_remote_code)
    _print(result, json_, commands.described_counts)


@app.command(epilog="Example: peftctl merge runs/smoke/adapter --output merged")
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="adapters or runs of one base", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="the folder of the merged model")],
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="stored type of the result, if not the base's")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare the logits")] = False,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Fold an adapter, or the sum of several, into their base, shard by shard, and compare the logits."""
    from peftctl import commands

    result = commands.merge(adapters, output, base, dtype, not no_verify, trust_remote_code, quiet)
    _print(result, json_, commands.described)


@app.command(epilog="Example: peftctl export runs/smoke/adapter --to gguf --output adapter.gguf")
def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter or a run", show_default=False)],
    to: Annotated[str, typer.Option(help="peft, adapterhub or gguf")],
    output: Annotated[Path, typer.Option(help="the folder to write; of gguf, the file")],
    server: Annotated[str | None, typer.Option("--for", help="vllm: check its own rules as well")] = None,
    name: Annotated[str, typer.Option(help="the adapter's name, where the form has one")] = "peftctl",
    base: BaseOption = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Write an adapter in the form that another program loads."""
    from peftctl import commands

    result = commands.export(adapter, output, to, server, name, base, trust_remote_code, quiet)
    _print(result, json_, commands.described)


@app.command(epilog="Example: peftctl generate runs/smoke --prompt 'What is an adapter?' --max-new-tokens 20")
def generate(
    path: PathArgument,
    prompt: Annotated[str, typer.Option(help="what the user says")],
    system: Annotated[str | None, typer.Option(help="a system message before it")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: continue the prompt as it is")] = False,
    base: BaseOption = None,
    device: Device = "auto",
    compute_dtype: ComputeType = "auto",
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Answer a prompt with a model, an adapter or a run."""
    from peftctl import commands

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    options = commands.ModelOptions(base, device, compute_dtype, trust_remote_code, quiet)
    opened = commands.opened(path, options)
    result = commands.generate(opened, prompt, system, raw, sampling, stream=not json_)
    _print(result, json_, lambda answer: "")


@app.command("eval", epilog="Example: peftctl eval runs/smoke --data configs/data/messages.jsonl --metrics rougeL,bleu")
def evaluate(
    path: PathArgument,
    data: Annotated[Path, typer.Option(help="a data file, a folder or a pattern of files")],
    metrics: Annotated[list[str], typer.Option(help="of generated answers: exact_match,rougeL,bleu; or none")] = [],  # noqa: B006
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="most tokens of a generated answer")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="of the rows, as data.format")] = None,
    column: Annotated[list[str], typer.Option(metavar="OURS=THEIRS", help="as data.columns")] = [],  # noqa: B006
    max_length: Annotated[int | None, typer.Option(min=2, help="longest row in tokens")] = None,
    truncate: Annotated[str | None, typer.Option(help="longer rows, as data.truncate")] = None,
    output: Annotated[Path | None, typer.Option(help="a file for each row's scores or generated answer")] = None,
    base: BaseOption = None,
    device: Device = "auto",
    compute_dtype: ComputeType = "auto",
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Loss and perplexity on a file, weighted by token; answers compared; or what a task's head is worth on it.

    A run reads the file as its recipe read its data, where no option says otherwise.
    """
    from peftctl import commands

    given = {"asked": metrics, "max_new_tokens": max_new_tokens, "format": format_, "columns": column}
    given |= {"max_length": max_length, "truncate": truncate}
    options = commands.ModelOptions(base, device, compute_dtype, trust_remote_code, quiet)
    result = commands.evaluate(path, data, given, output, options)
    _print(result, json_, commands.described)


@app.command()
def methods(json_: Json = False) -> None:
    """The methods there are."""
    from peftctl import commands

    _print(commands.methods(), json_, commands.table)


@app.command()
def objectives(json_: Json = False) -> None:
    """The objectives there are."""
    from peftctl import commands

    _print(commands.objectives(), json_, commands.table)


@app.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from peftctl.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command(epilog="Example: peftctl init my.yaml")
def init(path: Annotated[Path, typer.Argument(help="where to write the recipe")] = Path("recipe.yaml")) -> None:
    """Write a starter recipe that runs as it is."""
    from peftctl import commands

    typer.echo(commands.init(path))


def _print(result: Any, as_json: bool, readable: Any) -> None:
    """The result on stdout: one JSON document, or text."""
    text = json.dumps(result, indent=2) if as_json else readable(result)
    if text:
        typer.echo(text)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error of ours is one line on stderr and an exit code."""
    global words
    words = sys.argv[1:] if arguments is None else arguments
    # --quiet and --debug count before and after the command alike
    anywhere = [word for word in words if word in ("--quiet", "--debug")]
    try:
        with signals.terminable():
            app(args=anywhere + [word for word in words if word not in anywhere], prog_name="peftctl")
    except PeftctlError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"peftctl: error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
