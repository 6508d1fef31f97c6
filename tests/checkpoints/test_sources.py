"""What a command line can name as a model, and every way that can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import evenbits
from evenbits.checkpoints import sources
from evenbits.checkpoints import transformers as ours
from evenbits.checkpoints.sources import is_python, load_object, open_model
from evenbits.errors import EvenbitsError, MissingExtraError

BODY = """
import torch
from torch import nn
from neighbour import WIDTH

net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout())
number = 3
def build():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout())
def fails():
    raise OSError("no such weights\\nsecond line")
def wants(argument):
    return net
def gives():
    return [net]
class Net(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, 4)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    (tmp_path / "net.py").write_text(BODY)
    return str(tmp_path / "net.py")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = hf.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=32)  # fmt: skip
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("a.py:f", True), ("dir/a.py:_f1", True), ("a.py", False), ("a.py:", False), ("a.py:1f", False),
     ("org/name", False), ("a.pyc:f", False), ("a.py:f.g", False), ("C:/a.py:f", True),
     ("a.py:f()", False), ("", False)],
)  # fmt: skip
def test_what_is_a_python_source(spec: str, expected: bool) -> None:
    assert is_python(spec) is expected


@pytest.mark.parametrize("name", ["build", "net", "Net"])
def test_a_factory_a_module_and_a_class_give_a_model_in_evaluation_mode(name: str, net: str) -> None:
    source = open_model(f"{net}:{name}")
    assert isinstance(source.model, nn.Module) and source.tokenizer is None and not source.quantized
    assert not any(module.training for module in source.model.modules())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_type_is_given(dtype: str, net: str, bert: Path) -> None:
    for spec in (f"{net}:build", str(bert)):
        assert next(open_model(spec, dtype=dtype).model.parameters()).dtype == getattr(torch, dtype)


def test_an_unknown_type_names_the_nearest(net: str) -> None:
    with pytest.raises(EvenbitsError, match="Did you mean 'float16'"):
        open_model(f"{net}:build", dtype="flaot16")


def test_the_import_path_is_as_before_even_on_failure(net: str, tmp_path: Path) -> None:
    before = list(sys.path)
    open_model(f"{net}:build")
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(EvenbitsError, match=r"failed while it was loaded: ModuleNotFoundError"):
        open_model(f"{tmp_path}/bad.py:x")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "match"),
    [("fails", "OSError: no such weights"), ("wants", "TypeError"), ("gives", "gave a list"), ("number", "gave a int"),
     ("absent", "has no 'absent'")],
)  # fmt: skip
def test_a_factory_that_gives_no_model_is_an_error(name: str, match: str, net: str) -> None:
    with pytest.raises(EvenbitsError, match=match):
        open_model(f"{net}:{name}")


@pytest.mark.parametrize("body", ["x = (", "1 / 0", "raise ValueError('x')", "import sys; sys.modules[None]"])
def test_a_file_that_does_not_load_is_an_error(body: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(body + "\n")
    with pytest.raises(EvenbitsError, match="failed while it was loaded"):
        load_object(f"{tmp_path}/bad.py:x")


def test_a_missing_file_and_a_malformed_name_are_errors(tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match="does not exist"):
        load_object(f"{tmp_path}/none.py:x")
    with pytest.raises(EvenbitsError, match=r"form FILE.py:name"):
        load_object("none")


def test_a_folder_of_nothing_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(EvenbitsError, match=r"neither a Hugging Face folder .* nor an evenbits checkpoint"):
            open_model(str(path))


def test_a_hugging_face_folder_opens_with_its_weights(bert: Path) -> None:
    source = open_model(str(bert))
    expected = load_file(bert / "model.safetensors")
    assert type(source.model).__name__ == "BertForSequenceClassification" and source.tokenizer is None
    assert torch.equal(source.model.state_dict()["classifier.weight"], expected["classifier.weight"])


def test_one_of_ours_opens_quantized(bert: Path, tmp_path: Path) -> None:
    model = open_model(str(bert)).model
    evenbits.quantize(model, method="rtn")
    evenbits.save(model, tmp_path / "out")
    source = open_model(str(tmp_path / "out"))
    assert source.quantized and torch.equal(source.model.state_dict()["classifier.weight"], model.classifier.weight)


def test_one_of_ours_that_is_no_hugging_face_model_needs_its_factory(net: str, tmp_path: Path) -> None:
    model = open_model(f"{net}:build").model
    evenbits.quantize(model, method="rtn")
    evenbits.save(model, tmp_path / "out")
    with pytest.raises(EvenbitsError, match=r"--model FILE.py:factory"):
        open_model(str(tmp_path / "out"))
    assert open_model(str(tmp_path / "out"), factory=f"{net}:build").quantized


def test_missing_weights_are_not_filled_with_random_numbers(bert: Path) -> None:
    """transformers only warns, and the model computes nonsense."""
    tensors = load_file(bert / "model.safetensors")
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest, bert / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EvenbitsError, match=f"lacks 1 tensors .*{name}.*would be random"):
            open_model(str(bert))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_damaged_weights_are_an_evenbits_error(damage: str, bert: Path) -> None:
    path = bert / "model.safetensors"
    data = path.read_bytes()
    changed = {"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff" * 1000}
    path.unlink() if damage == "gone" else path.write_bytes(changed[damage])
    with pytest.raises(EvenbitsError, match="cannot be loaded"):
        open_model(str(bert))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [{"architectures": None}, {"architectures": ["Nothing"]}, {"architectures": ["pipeline"]}, {"model_type": "evil"},
     {"hidden_size": "x"}, {"hidden_size": 24}, {"num_hidden_layers": 2}],
    ids=repr,
)  # fmt: skip
def test_a_config_that_does_not_fit_is_an_evenbits_error(change: dict[str, Any], bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(EvenbitsError):
        open_model(str(bert))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", ["", "{", "null", "[]"])
def test_a_config_that_is_none_is_an_evenbits_error(content: str, bert: Path) -> None:
    (bert / "config.json").write_text(content)
    with pytest.raises(EvenbitsError):
        open_model(str(bert))


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_folder_is_not_run(bert: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    (bert / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((bert / "config.json").read_text())
    table = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    for kind in ("bert", "evil"):
        (bert / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": table}))
        try:
            open_model(str(bert))
        except EvenbitsError:
            assert kind == "evil"
        assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_an_evenbits_error(content: str, bert: Path) -> None:
    (bert / "tokenizer.json").write_text(content)
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(EvenbitsError, match=r"tokenizer of .* cannot be loaded"):
        open_model(str(bert))


def test_without_transformers_the_extra_is_named(bert: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evenbits\[hf\]'"):
        open_model(str(bert))


def test_a_broken_transformers_is_not_called_missing(bert: Path, monkeypatch: Any) -> None:
    def fail(_: str) -> None:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(ours.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):
        ours.library("loading")


def test_a_hub_id_without_a_network_says_what_else_to_do(monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nMore lines follow.")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", fail)
    with pytest.raises(EvenbitsError, match=r"no folder here.*couldn't connect.*evenbits demo") as caught:
        sources.open_model("nobody/nothing")
    assert "\n" not in str(caught.value)
