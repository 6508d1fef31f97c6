"""Loading and running a packed checkpoint never holds a float copy of its weights: measured, in a fresh process.

The model is large enough to stand out from the noise of an allocator: 134 million weights, packed in 69 MB; as float32
they would take 537 MB, as int8 134 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
import sys, torch, evenbits
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2,
                     num_attention_heads=16, max_position_embeddings=64)
model = LlamaForCausalLM(config).eval()
evenbits.quantize(model, scheme={"weights": sys.argv[2], "input_activations": "int8:row"}, method="rtn")
evenbits.save(model, sys.argv[1])
"""

RUN = """
import json, sys, torch, evenbits, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from evenbits.evaluation.memory import peak_bytes
from evenbits.nn.linear import QLinear
# What runs only once is paid before: libraries, kernels, thread pools.
small = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=4)).eval()
evenbits.quantize(small, scheme={"weights": sys.argv[2], "input_activations": "int8:row"}, method="rtn")
ids = torch.randint(64, (1, 32))
with torch.inference_mode():
    small(ids)
    before = peak_bytes()
    model = evenbits.load(sys.argv[1])
    loaded = peak_bytes()
    model(ids)
layers = [m for m in model.modules() if isinstance(m, QLinear)]
inner = {id(b) for m in layers for b in m.buffers()}
tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
rest = sum(t.nbytes for key, t in tensors.items() if key not in inner)
print(json.dumps({"loaded": loaded - before, "peak": peak_bytes() - before, "float": rest,
                  "packed": all(m.is_packed for m in layers), "layers": len(layers)}))
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4:row", "ovp4-i8:row"])
def test_a_packed_checkpoint_takes_no_more_than_its_bytes(weights: str, tmp_path: Path) -> None:
    python(BUILD, str(tmp_path / "out"), weights)
    disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    found = json.loads(python(RUN, str(tmp_path / "out"), weights))
    assert found["packed"] and found["layers"] == 14 and 60e6 < disk < 90e6
    assert found["peak"] <= 1.15 * disk + found["float"], found
