"""What each command does, between the command line and the modules that do the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftctl import compute, threads
from peftctl import recipe as recipes
from peftctl.errors import InputError
from peftctl.waiting import counting, doing, libraries, loading, tokenising

if TYPE_CHECKING:
    from peftctl.base import Base
    from peftctl.opened import Opened
    from peftctl.schema import Recipe


def train(
    path: Path,
    overrides: Sequence[str],
    own: Mapping[str, str],
    smoke: bool,
    dry_run: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, or only check what can be checked before."""
    from peftctl.plan import Options, plan

    wanted, chosen = recipes.load(path, overrides, smoke, own), Options(**options)
    if dry_run:
        planned = plan(wanted, chosen)
        return {"run": wanted.output, "steps": planned.steps, **planned.counts.document(by_module=False)}
    with libraries(chosen.quiet):
        from peftctl.run import train as run

    return run(wanted, chosen)


def validate(path: Path, overrides: Sequence[str], smoke: bool, show: int, quiet: bool = False) -> dict[str, Any]:
    """Check recipe and data; `show` rows are printed on stderr as the loss will see them."""
    from peftctl import functions, objectives, standin
    from peftctl.data.dataset import prepare
    from peftctl.data.shown import show as print_rows
    from peftctl.plan import asked, base_and_chat, fit

    wanted = recipes.load(path, overrides, smoke)
    objective = objectives.get(wanted.objective.name)
    functions.checked(objective.code(wanted.objective))
    base, chat = base_and_chat(wanted, with_weights=False)
    if not quiet and (told := standin.note(wanted, base)) is not None:
        print(f"peftctl: {told}", file=sys.stderr)
    wanted, base = asked(wanted, base)
    vocabulary = base.vocabulary
    with tokenising(quiet) as shown:
        data = prepare(wanted, chat, objective, vocabulary, shown, every_row=True)
    positions = fit(data, base, wanted)
    print_rows(data.train.examples[:show], data.train.places[:show], chat, sys.stderr)
    return {**data.document(), "positions": positions, "pad_is_eos": chat.pad_is_eos}


def count_params(
    path: Path | None,
    overrides: Sequence[str],
    base: str | None,
    method: str | None,
    by: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Count for a recipe, or for a base and a method named on the command line."""
    from peftctl import base as bases
    from peftctl import methods
    from peftctl.counting import count
    from peftctl.plan import asked

    if by not in (None, "module"):
        raise InputError(f"--by {by}: only module is known")
    if path is not None and (base is not None or method is not None):
        raise InputError("count-params: --base and --method stand in for a RECIPE; with one, use --set model.name=...")
    if path is not None:
        wanted = recipes.load(path, overrides)
        resolved = asked(wanted, _counted_base(wanted, trust_remote_code))[1]
        config = wanted.method
    elif base is not None and method is not None:
        resolved = bases.resolve(base, need="config", trust_remote_code=trust_remote_code)
        config = recipes.method_block(method, overrides)
    else:
        raise InputError("count-params: give a RECIPE, or --base and --method")
    counts = count(resolved, methods.get(config.name), config, trust_remote_code=trust_remote_code)
    return counts.document(by is not None)


def _counted_base(wanted: Recipe, trust_remote_code: bool) -> Base:
    """The base that training the recipe would load, as far as counting needs it."""
    from peftctl import base as bases
    from peftctl.plan import base_and_chat, suited

    if wanted.model.shrink or wanted.model.add_tokens:
        return base_and_chat(wanted, with_weights=False)[0]
    name, revision = wanted.model.name, wanted.model.revision
    return suited(bases.resolve(name, revision, need="config", trust_remote_code=trust_remote_code), wanted)


def merge(
    adapters: Sequence[str],
    output: Path,
    base: str | None,
    dtype: str | None,
    verify: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> dict[str, Any]:
    with libraries(quiet):
        from peftctl.merging import merge as run

    with counting("bytes of weights merged:", quiet) as progress:
        return run(
            adapters,
            output,
            base=base,
            dtype=dtype,
            verify=verify,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )


def export(
    adapter: str,
    output: Path,
    to: str,
    server: str | None,
    name: str,
    base: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> dict[str, Any]:
    with libraries(quiet):
        from peftctl.exporting import export as run

    return run(adapter, output, to=to, server=server, name=name, base=base, trust_remote_code=trust_remote_code)


class ModelOptions(NamedTuple):
    """How a command without a recipe loads a model."""

    base: str | None = None  # in place of the one that an adapter names
    device: str = "auto"
    compute_dtype: str = "auto"
    trust_remote_code: bool = False
    quiet: bool = False


def opened(path: str, options: ModelOptions) -> Opened:
    """The policy that a path means, loaded."""
    if options.compute_dtype not in compute.NAMES:
        raise InputError(f"--compute-dtype: {options.compute_dtype!r} is not known; {', '.join(compute.NAMES)} are")
    with libraries(options.quiet):
        from peftctl import model as models
        from peftctl import opened as places

    found = places.find(path, options.base, trust_remote_code=options.trust_remote_code)
    with threads.bind_main(models.device(options.device)), doing(loading(found.base.name), options.quiet):
        return places.open(
            found,
            device=options.device,
            precision=compute.Precision(compute=options.compute_dtype),
            trust_remote_code=options.trust_remote_code,
            notice=lambda text: None if options.quiet else print(f"peftctl: {text}", file=sys.stderr),
        )


def evaluate(
    path: str,
    data: Path,
    given: Mapping[str, Any],
    output: Path | None,
    options: ModelOptions,
) -> dict[str, Any]:
    """What lies at a path, measured on a file; `given`: options as `reading_of` takes them."""
    from peftctl.reading import reading_of

    reading = reading_of(path, data, **given)  # what is wrong there is told before a model is loaded
    found = opened(path, options)
    from peftctl.evaluation import evaluate as measure

    with counting("examples evaluated:", options.quiet) as progress:
        return measure(found, data, reading, progress, output)


def generate(
    opened: Opened, prompt: str, system: str | None, raw: bool, sampling: Mapping[str, Any], stream: bool
) -> dict[str, Any]:
    """Answer a prompt; with `stream` the text goes to stdout as it comes."""
    from peftctl.generation import generate as run
    from peftctl.row import Message
    from peftctl.surgery import device_of

    chat = opened.chat
    messages = [*([Message("system", system)] if system else []), Message("user", prompt)]
    plain = raw or chat.template is None
    ids = chat.prompt(prompt) if plain else chat.render_prompt(messages)
    printer = _Printer(chat.decode) if stream else None
    with threads.bind_main(device_of(opened.policy.model).type):
        new = run(opened.policy, ids, end=chat.eos_ids, on_token=printer or (lambda token: None), **sampling)
    text = chat.decode(new)
    if printer is not None:
        print(text[printer.printed :], flush=True)
    return {"prompt": prompt, "text": text, "tokens": len(new), "prompt_tokens": len(ids)}


class _Printer:
    """Prints a growing answer: what decoding more tokens adds, held back while a character is still incomplete."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.printed = 0

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        text = self.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


def methods() -> list[dict[str, Any]]:
    from peftctl import methods as package

    return [_entry(package.get(name)) for name in package.names()]


def objectives() -> list[dict[str, Any]]:
    from peftctl import objectives as package

    return [_entry(package.get(name)) | {"data": sorted(package.get(name).kinds)} for name in package.names()]


def _entry(found: Any) -> dict[str, Any]:
    return {"name": found.name, "summary": found.summary, "paper": found.paper}


def init(path: Path) -> str:
    """A starter recipe. Refuses to replace a file."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipes.starter())
    except FileExistsError:
        raise InputError(f"{path} exists already: name another file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    return f"wrote {path}; next: peftctl train {path}"


def described(result: Mapping[str, Any]) -> str:
    """A result as lines to read."""
    width = max(map(len, result), default=0)
    return "\n".join(f"{name:<{width}}  {_readable(value)}" for name, value in result.items() if value is not None)


def described_rows(result: Mapping[str, Any]) -> str:
    """What `validate` found as lines to read."""
    from peftctl.data.preflight import bars

    listed = ("faults", "warnings", "histogram", "validation")
    lines = [described({name: value for name, value in result.items() if name not in listed and value != []})]
    lines += ["tokens a sequence", *bars(result["histogram"])]
    if result["validation"] is not None:
        lines += ["validation", "  " + described(_told(result["validation"])).replace("\n", "\n  ")]
    for name in ("faults", "warnings"):
        lines += [name, *(f"  {text}" for text in result[name])] if result[name] else []
    return "\n".join(lines)


def _told(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "rows", "kept", "refused", "tokens", "labelled_tokens", "p50", "p90", "longest", "truncated")
    return {name: report[name] for name in names}


def described_counts(result: Mapping[str, Any]) -> str:
    """Counts as lines to read, those by module as a tree."""
    from peftctl.counting import tree

    lines = [described({name: value for name, value in result.items() if name != "by_module"})]
    return "\n".join(lines + tree(result["by_module"]) if "by_module" in result else lines)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    width = max(len(entry["name"]) for entry in entries)
    return "\n".join(f"{entry['name']:<{width}}  {entry['summary']}  {entry['paper']}".rstrip() for entry in entries)


def _readable(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | dict | list):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "".join(f"\n  {name}  {_readable(inner)}" for name, inner in value.items())
    return "".join(f"\n  {inner}" for inner in value) or "none"
