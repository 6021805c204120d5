"""Folders of adapter-hub's `adapters` package: its own adapter_config.json, and adapter.safetensors under its names.

Bottlenecks and compacters alone. The schema is that of adapters 1.3.0 (its `BnConfig` and presets); what a file of
another version leaves out has the default of that one. https://docs.adapterhub.ml/loading.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftctl.errors import FormatError, InputError, several
from peftctl.formats.shards import read as read_header
from peftctl.methods._blocks import blocks
from peftctl.methods._places import places
from peftctl.methods.base import MethodConfig
from peftctl.methods.bottleneck import PRESETS as OWN_PRESETS
from peftctl.methods.bottleneck import BottleneckConfig
from peftctl.methods.compacter import CompacterConfig
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
VERSION = "adapters.1.3.0"
METHODS = ("bottleneck", "compacter")


class Layout(NamedTuple):
    """Where an architecture holds the small networks: the modules of a block after attention and after the MLP."""

    stack: str  # the blocks, from the bare model on
    attention: str
    output: str


_HELD_BY_BLOCK = ("attention_adapters", "output_adapters")
_HELD_BY_PARTS = ("attention.output", "output")
LAYOUTS = {
    "llama": Layout("layers", *_HELD_BY_BLOCK),
    "mistral": Layout("layers", *_HELD_BY_BLOCK),
    "gpt2": Layout("h", *_HELD_BY_BLOCK),
    "bert": Layout("encoder.layer", *_HELD_BY_PARTS),
    "roberta": Layout("encoder.layer", *_HELD_BY_PARTS),
}
# what decides where a network sits and what it reads
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "is_parallel": False, "original_ln_before": False, "scaling": 1.0},
    "pfeiffer": {"mh_adapter": False, "is_parallel": False, "original_ln_before": True, "scaling": 1.0},
    "parallel": {"mh_adapter": False, "is_parallel": True, "original_ln_before": False, "scaling": 4.0},
}
# what no method here computes in another way
FIXED: dict[str, Any] = {
    "output_adapter": True,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "stochastic_depth": 0.0,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "learn_phm": True,
    "phm_bias": True,
}
# what matters before training alone, or to networks of products alone
OTHER: dict[str, Any] = {
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "phm_rank": 1,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "hypercomplex_nonlinearity": "glorot-uniform",
}
_PLAIN = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
}
_PRODUCTS = {
    "down.s": "adapter_down.0.W_left",
    "down.t": "adapter_down.0.W_right",
    "down.bias": "adapter_down.0.b",
    "up.s": "adapter_up.W_left",
    "up.t": "adapter_up.W_right",
    "up.bias": "adapter_up.b",
}
_COMPACTERS = {"compacter": "houlsby", "compacter++": "pfeiffer"}


def write(
    folder: Path,
    config: MethodConfig,
    skeleton: Skeleton,
    tensors: Mapping[str, Tensor],
    base: str,
    name: str,
) -> None:
    """Write both files into an existing folder; `name` is the adapter's. Raises InputError, FormatError, OSError."""
    from safetensors.torch import save_file

    keys = _keys(config, skeleton.dimensions.hidden)
    if config.save_modules:
        raise InputError(f"adapter-hub's form has no place for saved modules ({', '.join(config.save_modules)})")
    theirs = _names(skeleton, _preset(keys), name, keys["phm_layer"])
    document = {
        "config": keys,
        "hidden_size": skeleton.dimensions.hidden,
        "model_class": skeleton.architecture,
        "model_name": base,
        "model_type": skeleton.model_type,
        "name": name,
        "version": VERSION,
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
    # contiguous and apart: the format stores neither strides nor shared memory
    stored = {theirs[ours]: tensor.detach().cpu().clone().contiguous() for ours, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def _keys(config: MethodConfig, hidden: int) -> dict[str, Any]:
    """The whole `config` of adapter_config.json."""
    if isinstance(config, BottleneckConfig):
        preset: str = config.preset
        width = config.width_in(hidden)
        asked = config.reduction_factor or OWN_PRESETS[preset].reduction_factor
        special: dict[str, Any] = {"non_linearity": config.activation or OWN_PRESETS[preset].activation}
        special |= {"init_weights": "mam_adapter"} if preset == "parallel" else {}
    elif isinstance(config, CompacterConfig):
        preset, width = _COMPACTERS[config.preset], config.width_in(hidden)
        asked = config.reduction_factor
        special = {"non_linearity": "gelu", "phm_layer": True, "phm_dim": config.phm_dim, "phm_rank": config.rank}
    else:
        served = " and ".join(METHODS)
        raise InputError(f"adapter-hub's form is written of {served} adapters; {config.name} is none of these")
    reduction = {"reduction_factor": _reduction(hidden, width, asked)}
    return FIXED | OTHER | PRESETS[preset] | special | reduction


def _reduction(hidden: int, width: int, asked: float) -> float | int:
    """A factor of which adapter-hub makes the width, as int(hidden // factor): the one asked for, if it will do."""
    for factor in (asked, hidden / width, math.nextafter(hidden / width, 0)):
        if int(hidden // factor) == width:
            return int(factor) if factor == int(factor) else factor
    raise AssertionError(f"no factor makes {width} of {hidden}")


def read(folder: Path, document: Mapping[str, Any], skeleton: Skeleton) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The method block and the tensors, under our names, of a folder. Raises FormatError with what is wrong.

    A head beside the adapter is not read.
    """
    path = folder / CONFIG
    keys, name = document["config"], document.get("name")
    if not isinstance(keys, dict) or not isinstance(name, str):
        raise FormatError(f"{path} is adapter-hub's, but has no config and name")
    if keys.get("architecture") is not None:
        raise FormatError(f"{path}: adapter-hub's {keys['architecture']} is not read; its bottlenecks are")
    try:
        preset, products = _preset(keys), bool(keys.get("phm_layer", False))
        names = {theirs: ours for ours, theirs in _names(skeleton, preset, name, products).items()}
    except InputError as error:
        raise FormatError(f"{path}: {error}") from None
    tensors = _renamed(folder, names, skeleton)
    return _block(keys, preset, products, tensors), tensors


def _preset(keys: Mapping[str, Any]) -> str:
    """Which of our presets a config is. Raises FormatError where it is none."""
    for key, wanted in FIXED.items():
        found = keys.get(key)
        if found is not None and found != wanted:
            raise FormatError(f"{key} is {found!r}, which no method here computes")
    usual = PRESETS["pfeiffer"] | {"original_ln_before": False}  # BnConfig's own defaults
    chosen = {key: keys.get(key, default) for key, default in usual.items()}
    for preset, values in PRESETS.items():
        if chosen == values:
            return preset
    shown = ", ".join(f"{key} {value!r}" for key, value in chosen.items())
    raise FormatError(f"no preset here has {shown}; adapter-hub's double_seq_bn, seq_bn and par_bn are read")


def _names(skeleton: Skeleton, preset: str, name: str, products: bool) -> dict[str, str]:
    """Our name of each tensor -> adapter-hub's. Raises FormatError, TargetError."""
    layout = LAYOUTS.get(skeleton.model_type)
    if layout is None:
        known = ", ".join(LAYOUTS)
        raise FormatError(f"adapter-hub's form of {skeleton.architecture} is not known here; those of {known} are")
    found = blocks(skeleton)
    parts = [layout.attention, layout.output] if preset == "houlsby" else [layout.output]
    held = [f"{block.path}.{part}.adapters.{name}." for block in found for part in parts]
    names = {
        f"{place.path}.{ours}": prefix + theirs
        for place, prefix in zip(places(skeleton, preset), held, strict=True)
        for ours, theirs in (_PRODUCTS if products else _PLAIN).items()
    }
    rule = {"rule": f"{_root(skeleton)}shared_parameters.{name}.phm_rule"} if products else {}
    return names | rule


def _root(skeleton: Skeleton) -> str:
    """What stands before the names of the bare model: `model.` of LlamaForCausalLM."""
    return blocks(skeleton)[0].path.removesuffix(f"{LAYOUTS[skeleton.model_type].stack}.0")


def _renamed(folder: Path, names: Mapping[str, str], skeleton: Skeleton) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, root = folder / WEIGHTS, _root(skeleton)
    if not path.is_file():
        pickled = (folder / "pytorch_adapter.bin").is_file()
        found = "only pytorch_adapter.bin, a pickle, which is never read" if pickled else f"no {WEIGHTS}"
        raise FormatError(f"{folder} holds {found}: save it again with use_safetensors=True")
    read_header(path)  # refused here before anything of the size that it claims is made
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    # a bare model saves without the root
    full = {key if key in names else root + key: tensor for key, tensor in stored.items()}
    wrong = [f"{key} {tuple(tensor.shape)} has no place" for key, tensor in full.items() if key not in names]
    wrong += [f"{key} is missing" for key in names if key not in full]
    if wrong:
        raise FormatError(f"{path} does not fit {skeleton.architecture}: {several(wrong)}")
    return {names[key]: tensor for key, tensor in full.items()}


def _block(keys: Mapping[str, Any], preset: str, products: bool, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The method block. Widths are those of the tensors."""
    activation = str(keys.get("non_linearity", "")).lower()
    down = next(tensor for name, tensor in tensors.items() if name.endswith("down.bias"))
    if not products:
        return {"name": "bottleneck", "preset": preset, "width": len(down), "activation": activation}
    own = next((own for own, other in _COMPACTERS.items() if other == preset), None)
    if own is None or activation != "gelu":
        raise FormatError(
            f"a {preset} network of products with {activation} is not read; compacter and compacter++ are"
        )
    s = next(tensor for name, tensor in tensors.items() if name.endswith("down.s"))
    return {"name": "compacter", "preset": own, "phm_dim": len(s), "rank": s.shape[-1], "width": len(down)}
