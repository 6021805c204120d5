"""What is no GGUF model is refused by name and leaves nothing behind; a real one is converted by the demo."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from peftctl.errors import ModelError
from peftctl.formats.gguf import convert, unmarked
from tests.models import tiny


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(60), b"\0" * 100])
def test_what_is_no_gguf_is_refused_and_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf cannot be read"):
        convert(tmp_path / "x.gguf", tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_model_without_its_marks_can_be_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    unmarked(model).save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()
