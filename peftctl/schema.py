"""The blocks of a recipe that are not a method's or an objective's: each key with its type, range and meaning."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from peftctl.composed import is_template_name, templates
from peftctl.errors import suggest
from peftctl.methods.base import MethodConfig
from peftctl.objectives.base import ObjectiveConfig
from peftctl.row import FORMATS


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Block):
    name: str = Field(min_length=1, description="hub id, local folder, .gguf file, or a bare config.json")
    revision: str | None = Field(None, description="commit, tag or branch of a hub model")
    task: Literal["causal-lm", "seq2seq-lm", "sequence-classification", "token-classification"] = Field(
        "causal-lm",
        description="the head that is used: that of tokens (seq2seq-lm: of an encoder-decoder), or a new one that "
        "scores rows or tokens",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what weights are stored in; auto: as in the base's files"
    )
    quantize: str | None = Field(None, description="null")
    layout: Literal["auto", "shared", "joined", "padded"] = Field("auto", description="how batches are laid out")
    tokenizer: str | None = Field(None, min_length=1, description="a tokenizer's folder, if not the model's own")
    add_tokens: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = Field(
        None, description="new tokens, whose rows of the embeddings and the head are trained beside the adapter"
    )
    shrink: bool = Field(False, description="a tiny random model of the same architecture instead; for smoke runs")


def _format(name: str) -> str:
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"{name!r} is not known{suggest(name, FORMATS)}; auto, {', '.join(FORMATS)} are")
    return name


def _template(name: str) -> str:
    if is_template_name(name) and name not in templates():
        known = ", ".join(templates())
        raise ValueError(f"{name!r} is not known{suggest(name, templates())}; {known}, or a file as ./{name}.jinja")
    return name


class SourceConfig(Block):
    """One source of rows, by `path` or by `hub`. What it leaves out is as `data` has it."""

    path: str | None = Field(None, min_length=1, description="a data file, a folder or a pattern of files")
    hub: str | None = Field(None, min_length=1, description="a data set of a hub: owner/name")
    split: str | None = Field(None, min_length=1, description="of a data set of a hub: train, if not given")
    config: str | None = Field(None, min_length=1, description="of a data set of a hub, where it has several")
    revision: str | None = Field(None, min_length=1, description="commit, tag or branch of a data set of a hub")
    weight: float | None = Field(None, gt=0, description="its share of an epoch, beside the other sources' weights")
    format: Annotated[str, AfterValidator(_format)] | None = Field(None, description="as data.format")
    columns: dict[str, str] | None = Field(None, description="as data.columns")
    limit: int | None = Field(None, ge=1, description="the first rows only")

    @model_validator(mode="after")
    def _named(self) -> SourceConfig:
        if self.path is None and self.hub is None:
            raise ValueError("path is missing: a data file, a folder or a pattern of files; or hub: a data set's name")
        if self.path is not None and self.hub is not None:
            raise ValueError("path and hub are both given: a source is one of them")
        given = [key for key in ("split", "config", "revision") if getattr(self, key) is not None]
        if given and self.hub is None:
            raise ValueError(f"{given[0]} is of a data set of a hub, and a path is given")
        return self


Source = Annotated[str, Field(min_length=1)] | SourceConfig
Sources = Source | Annotated[list[Source], Field(min_length=1)]


class DataConfig(Block):
    train: Sources = Field(description="a data file, a folder or a pattern of files; or several")
    validation: Annotated[float, Field(gt=0, lt=1)] | Sources | None = Field(
        None, description="a share to hold out (in streaming, of each source's first rows), or what train may be"
    )
    max_length: int = Field(1024, ge=2, description="longest row in tokens")
    truncate: Literal["refuse", "left", "right", "split"] = Field(
        "refuse",
        description="longer rows are bad ones; or are cut, left keeps the answer; raw text may be split into pieces",
    )
    format: Annotated[str, AfterValidator(_format)] = Field(
        "auto", description="auto: by the columns", json_schema_extra={"enum": ["auto", *FORMATS]}
    )
    chat_template: Annotated[str, AfterValidator(_template)] | None = Field(
        None,
        description="in place of the tokenizer's own: chatml, llama3, alpaca, vicuna, or a Jinja file",
    )
    system: str | None = Field(
        None, min_length=1, description="the system prompt of dialogues that have none; becomes part of the template"
    )
    columns: dict[str, str] | None = Field(None, description="our name of a column: the file's")
    on_bad_row: Literal["error", "skip"] = Field("error", description="what to do with a row that cannot be used")
    share_starts: bool = Field(True, description="compute once what rows share at their start")
    limit: int | None = Field(None, ge=1, description="the first rows only, of each source of train")
    streaming: bool = Field(False, description="read rows as training needs them; nothing is kept of them")
    shuffle_buffer: int = Field(10_000, ge=1, description="neighbouring rows that are shuffled together in streaming")
    bucket: int | None = Field(
        None, ge=1, description="optimizer steps whose rows are sorted by length together, cut into steps and shuffled"
    )


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise ValueError(f"{name!r} is no device; auto, cpu, cuda, cuda:1 or mps is meant")
    return name


class TrainConfig(Block):
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; 1 if max_steps is not given either")
    max_time: float | None = Field(None, gt=0, description="minutes after which the run ends as if finished")
    batch_size: int = Field(8, ge=1, description="examples a micro-batch")
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches an optimizer step")
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="most tokens a micro-batch; the step has as many examples as without, a longer one alone",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak of the schedule")
    head_learning_rate: float | None = Field(
        None, gt=0, description="peak for a task's new head; null: learning_rate, as for all that is trained"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after the warm-up")
    warmup: float = Field(0.03, ge=0, description="below 1 a fraction of the steps, from 1 on a number of steps")
    optimizer: Literal["adamw", "sgd", "adafactor"] = Field("adamw", description="sgd's momentum is the first beta")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="decay rates of adamw's averages"
    )
    weight_decay: float = Field(0.0, ge=0, description="spares tensors of one dimension")
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping")
    on_nan: Literal["stop", "skip_step"] = Field(
        "stop", description="a step whose loss or gradient is not finite: end the run, or leave its update out"
    )
    max_skipped: int = Field(3, ge=1, description="steps in a row that skip_step may leave out before the run ends")
    router_loss: float | None = Field(
        None,
        ge=0,
        description="weight of the load-balancing loss of a mixture of experts; null: as the model's config says, "
        "router_aux_loss_coef where output_router_logits is true",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the adapter's start, the data's order and dropout")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; there is one at the end anyway")
    early_stopping: int | None = Field(
        None, ge=1, description="evaluations in a row without a better one after which the run ends"
    )
    keep_best: bool = Field(False, description="the adapter is that of the best evaluation, not of the last step")
    best_by: str = Field("loss", min_length=1, description="the metric on held-out rows that tells what is better")
    best_is: Literal["auto", "lowest", "highest"] = Field(
        "auto", description="of that metric; auto: the lowest loss or error, else the highest"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; there is one at the end anyway")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, slower"
    )
    device: Annotated[str, AfterValidator(_device)] = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="the type that weights are multiplied in, whatever model.dtype stores them in; auto: as stored, "
        "and float32 where the device has no fast bfloat16",
    )
    fuse: bool = Field(True, description="compute linears that share an input together, by kernels of our own")
    pack_weights: bool = Field(False, description="keep copies of the matrices in the order that the CPU multiplies in")
    cache_reference: bool = Field(
        True, description="compute the reference's log-probabilities once, where a run sees rows more than once"
    )
    cache_frozen: bool = Field(
        True,
        description="keep on disk what the blocks below the lowest delta answer, instead of computing it each time",
    )
    compile: bool = Field(False, description="false")


class Recipe(Block):
    model: ModelConfig
    method: SerializeAsAny[MethodConfig]
    objective: SerializeAsAny[ObjectiveConfig]
    data: DataConfig
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    output: str = Field(min_length=1, description="the run's folder, relative to where the command is started")
