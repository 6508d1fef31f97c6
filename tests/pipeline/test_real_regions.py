"""Regions of two real transformers, found without naming an architecture: every one of every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import evenbits


def smoothed(model: Any, batch: Any) -> dict[str, tuple[str, str]]:
    """Region → (status, reason) of SmoothQuant on one batch."""
    result = evenbits.quantize(model, scheme="W8A8", method="smoothquant", data=[batch])
    assert {name for row in result.regions for name in row.layers} == {row.name for row in result.quantized}
    return {row.name: (row.status, row.reason) for row in result.regions}


def ids() -> torch.Tensor:
    return torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.data
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_region_of_minilm(test_data: Path, dtype: str) -> None:
    """BERT norms after the residual addition: nothing but v → o and the pooler can be folded. 26 regions."""
    transformers = pytest.importorskip("transformers")
    folder = test_data / "minilm_glue" / "sst2"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    expected = {}
    for i in range(6):
        at = f"bert.encoder.layer.{i}"
        read = "its tensor is also read by layer_norm in "
        expected |= {
            f"{at}.attention.self.{{query,key,value}}": ("multiplied", f"{read}{at}.attention.output.LayerNorm"),
            f"{at}.attention.output.dense": ("folded", f"into the rows of {at}.attention.self.value"),
            f"{at}.intermediate.dense": ("multiplied", f"{read}{at}.output.LayerNorm"),
            f"{at}.output.dense": ("multiplied", "computed by gelu, through which no factor passes"),
        }
    expected["bert.pooler.dense"] = ("folded", "into bert.encoder.layer.5.output.LayerNorm")
    expected["classifier"] = ("multiplied", "computed by tanh, through which no factor passes")
    assert smoothed(model, {"input_ids": ids(), "attention_mask": torch.ones(2, 24)}) == expected
    assert len(expected) == 26


@pytest.mark.data
def test_every_region_of_stories260k_is_folded(test_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(test_data / "stories260k_llama").eval()
    expected = {}
    for i in range(5):
        at = f"model.layers.{i}"
        expected |= {
            f"{at}.self_attn.{{q_proj,k_proj,v_proj}}": ("folded", f"into {at}.input_layernorm"),
            f"{at}.self_attn.o_proj": ("folded", f"into the rows of {at}.self_attn.v_proj"),
            f"{at}.mlp.{{gate_proj,up_proj}}": ("folded", f"into {at}.post_attention_layernorm"),
            f"{at}.mlp.down_proj": ("folded", f"into the rows of {at}.mlp.up_proj"),
        }
    assert smoothed(model, ids()) == expected
    assert len(expected) == 20
