"""Checkpoints that were damaged, exchanged or made to harm: each one is refused with one clear error, and a model that
was passed to `load` stays as it was. Where only later checks can catch a forgery, hashes and checksum are made right.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import evenbits
from evenbits.checkpoints.describe import describe
from evenbits.checkpoints.files import CONFIG, WEIGHTS
from evenbits.checkpoints.sources import open_model
from evenbits.errors import CheckpointError

D = 16


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.act = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, 4), nn.GELU()
        self.conv, self.table = nn.Conv2d(2, 3, 3, padding=1), nn.Embedding(100, D)
        self.tied = nn.Embedding(100, D)
        self.tied.weight = self.table.weight
        self.table.weight.data = self.table.weight.data.half().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(self.norm(x))))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Plain()
    result = evenbits.quantize(model, scheme="W8A8", data=[torch.randn(3, D)])
    return evenbits.save(model, tmp_path_factory.mktemp("plain") / "out", result=result)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=32)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    evenbits.quantize(model, data=[{"input_ids": torch.arange(10)[None]}])
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(19)} | {"[UNK]": 19}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    return evenbits.save(model, tmp_path_factory.mktemp("bert") / "out", tokenizer=tokenizer)


@pytest.fixture
def here(plain_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_folder, tmp_path / "out"))


@pytest.fixture
def bert(bert_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "bert"))


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Writes the config with right lengths, hashes and checksum: everything a forger can do."""
    for name in config.get("files", {}) if isinstance(config.get("files"), dict) else ():
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            config["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    config.pop("checksum", None)
    config["checksum"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def forge(
    folder: Path,
    edit: Callable[[dict[str, Any]], Any] = lambda c: None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda t: None,
) -> None:
    loaded = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors(loaded)
    save_file(loaded, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    edit(config)
    seal(folder, config)


def refused(folder: Path, match: str | None = None, model: nn.Module | None = None) -> str:
    """load(folder, model) is a CheckpointError of one clear message, and the model is as it was."""
    given = Plain().train() if model is None else model
    before = {name: tensor.detach().clone() for name, tensor in given.state_dict().items()}
    facts = [(n, id(m), m.training) for n, m in given.named_modules(remove_duplicate=False)]
    pointers = [(n, id(p)) for n, p in given.named_parameters(remove_duplicate=False)]
    with pytest.raises(CheckpointError, match=match) as caught:
        evenbits.load(folder, given)
    assert facts == [(n, id(m), m.training) for n, m in given.named_modules(remove_duplicate=False)]
    assert pointers == [(n, id(p)) for n, p in given.named_parameters(remove_duplicate=False)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    message = str(caught.value)
    assert 10 < len(message) < 700
    return message


def test_the_untouched_and_the_resealed_folder_load(here: Path, bert: Path) -> None:
    evenbits.load(here, Plain())
    forge(here)
    evenbits.load(here, Plain())
    evenbits.load(bert)


# --------------------------------------------------------------------------------------------------------- damage


def test_a_file_cut_anywhere_is_refused(here: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        whole = (here / name).read_bytes()
        for length in {0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            (here / name).write_bytes(whole[:length])
            if name == CONFIG and length == len(whole) - 1:
                evenbits.load(here, Plain())  # only the last newline is gone
            else:
                refused(here)
        (here / name).write_bytes(whole)
    evenbits.load(here, Plain())


def test_every_file_of_a_hugging_face_checkpoint_is_guarded(bert: Path) -> None:
    names = sorted(path.name for path in bert.iterdir())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", CONFIG, WEIGHTS} <= set(names)
    for name in names:
        whole = (bert / name).read_bytes()
        for damage in (whole[: len(whole) // 2], whole + b"\n ", b""):
            (bert / name).write_bytes(damage)
            if name == CONFIG and damage == whole + b"\n ":
                continue
            with pytest.raises(CheckpointError):
                evenbits.load(bert)
        (bert / name).unlink()
        with pytest.raises(CheckpointError):
            evenbits.load(bert)
        (bert / name).write_bytes(whole)
    evenbits.load(bert)


def test_one_flipped_bit_anywhere_is_refused(bert: Path) -> None:
    dice = random.Random(1)
    for path in sorted(bert.iterdir()):
        whole = path.read_bytes()
        positions = {0, 1, len(whole) - 1} | {dice.randrange(len(whole)) for _ in range(60)}
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                evenbits.load(bert)
        path.write_bytes(whole)
    evenbits.load(bert)


def test_bytes_added_at_the_end_are_refused(here: Path) -> None:
    (here / WEIGHTS).write_bytes((here / WEIGHTS).read_bytes() + b"\0")
    refused(here, "instead of")


def test_renamed_and_exchanged_files_are_refused(here: Path, bert_folder: Path) -> None:
    (here / WEIGHTS).rename(here / "model.safetensors")
    refused(here, "removed or renamed")
    (here / "model.safetensors").rename(here / WEIGHTS)
    shutil.copy(bert_folder / WEIGHTS, here / WEIGHTS)
    refused(here)
    (here / CONFIG).rename(here / "config.json")
    refused(here, f"no {CONFIG}")


def test_the_config_of_one_with_the_weights_of_another_is_refused(here: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = Plain()
    evenbits.quantize(other, data=[torch.randn(3, D)])
    evenbits.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, here / WEIGHTS)
    refused(here, "SHA-256 differs")


def test_links_are_refused(here: Path, tmp_path: Path) -> None:
    (here / WEIGHTS).rename(tmp_path / "weights")
    (here / WEIGHTS).symlink_to(tmp_path / "weights")
    refused(here, "not a plain file")


# ------------------------------------------------------------------------------------------------------- forgeries

LAYER = {"kind": "linear", "shape": [D, D], "weight": "int8:row", "input": "int8:row", "static": False,
         "multiplier": 0, "bias": True}  # fmt: skip


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["layers"]["a"].update(changes)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["layers"]["a"].pop(key)


def geometry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["layers"]["conv"]["geometry"].update(changes)


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version 2": put(format_version=2),
    "version text": put(format_version="1"),
    "no version": lambda c: c.pop("format_version"),
    "other format": put(format="gguf"),
    "no layers": put(layers={}),
    "layers a list": put(layers=[LAYER]),
    "layers null": put(layers=None),
    "layer null": lambda c: c["layers"].update(a=None),
    "layer a number": lambda c: c["layers"].update(a=3),
    "layer a list": lambda c: c["layers"].update(a=[1, 2]),
    "layer of the root": lambda c: c["layers"].update({"": LAYER}),
    "layer that does not exist": lambda c: c["layers"].update({"ghost": LAYER}),
    "layer below a layer": lambda c: c["layers"].update({"a.weight": LAYER}),
    "layer with a strange name": lambda c: c["layers"].update({"__class__": LAYER}),
    "a norm as linear": lambda c: c["layers"].update({"norm": LAYER}),
    "a relu as linear": lambda c: c["layers"].update({"act": LAYER}),
    "an embedding as linear": lambda c: c["layers"].update({"table": {**LAYER, "shape": [100, D]}}),
    "a convolution as linear": lambda c: c["layers"].update({"conv": {**LAYER, "shape": [3, 18]}}),
    "a linear as convolution": lambda c: c["layers"].update({"a": {**c["layers"]["conv"], "shape": [D, D, 1, 1]}}),
    "kind unknown": entry(kind="__import__"),
    "kind a list": entry(kind=["linear"]),
    "kind null": entry(kind=None),
    "no kind": without("kind"),
    "no shape": without("shape"),
    "no weight": without("weight"),
    "no input": without("input"),
    "no bias": without("bias"),
    "negative": entry(shape=[-D, D]),
    "zero": entry(shape=[0, D]),
    "huge": entry(shape=[2**62, 2**62]),
    "beyond int64": entry(shape=[10**30, 4]),
    "huge but one dimension": entry(shape=[2**40, D]),
    "three dimensions": entry(shape=[D, D, 1]),
    "no dimension": entry(shape=[]),
    "shape text": entry(shape="16"),
    "shape of texts": entry(shape=["a", "b"]),
    "shape nested": entry(shape=[[D], [D]]),
    "shape null": entry(shape=None),
    "shape another": entry(shape=[D, D + 1]),
    "shape turned": lambda c: c["layers"]["b"].update(shape=[D, 4]),
    "format unknown": entry(weight="int99:row"),
    "format text": entry(weight="os.system:x"),
    "format null": entry(weight=None),
    "format number": entry(weight=8),
    "format narrower": entry(weight="int4:row"),
    "format grouped": entry(weight="int8:g4"),
    "format tensor": entry(weight="int8:tensor"),
    "format affine with quantized input": entry(weight="int8:row:affine"),
    "input unknown": entry(input="int8"),
    "input a list": entry(input=["int8:row"]),
    "input nonsense": entry(input="int8:row:mse:mse2"),
    "input 16 bits": entry(input="int16:row"),
    "static without scale": entry(static=True),
    "multiplier without tensor": lambda c: c["layers"]["a"].update(multiplier=D),
    "multiplier wrong": lambda c: c["layers"]["b"].update(multiplier=D + 1),
    "multiplier negative": entry(multiplier=-1),
    "multiplier huge": entry(multiplier=2**70),
    "multiplier text": entry(multiplier="many"),
    "bias away": entry(bias=False),
    "geometry missing": lambda c: c["layers"]["conv"].pop("geometry"),
    "geometry null": lambda c: c["layers"]["conv"].update(geometry=None),
    "stride": geometry(stride=[2, 2]),
    "stride zero": geometry(stride=[0, 0]),
    "stride text": geometry(stride="ab"),
    "groups": geometry(groups=0),
    "groups negative": geometry(groups=-1),
    "groups text": geometry(groups="x"),
    "padding": geometry(padding=[10**9] * 4),
    "padding mode": geometry(padding_mode="reflect"),
    "dilation": geometry(dilation=[3, 3]),
    "aliases a list": put(aliases=["a"]),
    "aliases null": put(aliases=None),
    "alias to nothing": put(aliases={"tied.weight": "ghost"}),
    "alias to a list": put(aliases={"tied.weight": ["table.weight"]}),
    "alias to a dict": put(aliases={"tied.weight": {}}),
    "alias of nothing": lambda c: c["aliases"].update({"ghost": "table.weight"}),
    "alias into a layer": lambda c: c["aliases"].update({"a.ghost": "table.weight"}),
    "alias forgotten": put(aliases={}),
    "alias of another shape": lambda c: c["aliases"].update({"tied.weight": "norm.weight"}),
    "widened text": put(widened="float32"),
    "widened null": put(widened=None),
    "widened to nothing": put(widened={"table.weight": "float99"}),
    "widened to an attribute": put(widened={"table.weight": "load"}),
    "widened a number": put(widened={"table.weight": 3}),
    "widened a ghost": put(widened={"ghost": "float32"}),
    "widened codes": lambda c: c["widened"].update({"a.weight": "float32"}),
    "files null": put(files=None),
    "files without weights": put(files={}),
    "files outside": lambda c: c["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
    "files absolute": lambda c: c["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    "files that lack": lambda c: c["files"].update({"ghost": {"bytes": 1, "sha256": ""}}),
    "file entry null": lambda c: c["files"].update({"ghost": None}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_forged_config_is_refused(case: str, here: Path) -> None:
    forge(here, CONFIGS[case])
    refused(here)


@pytest.mark.parametrize("case", CONFIGS)
def test_inspecting_a_forged_config_is_an_answer_or_a_checkpoint_error(case: str, here: Path) -> None:
    """`describe` builds nothing, so it may not notice; it must not fall over, and what it says must be JSON."""
    forge(here, CONFIGS[case])
    try:
        found = describe(here)
    except CheckpointError as error:
        assert 10 < len(str(error)) < 700
    else:
        json.dumps(found, allow_nan=False)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = edit(tensors[name]).contiguous()

    return apply


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "one missing": lambda t: t.pop("a.bias"),
    "codes missing": lambda t: t.pop("a.weight"),
    "all missing": lambda t: t.clear(),
    "one more": lambda t: t.update(ghost=torch.ones(1)),
    "one more in a layer": lambda t: t.update({"a.weight_zero_point": torch.ones(D, 1, dtype=torch.int8)}),
    "renamed": lambda t: t.update({"A.bias": t.pop("a.bias")}),
    "codes int32": change("a.weight", lambda w: w.int()),
    "codes uint8": change("a.weight", lambda w: w.view(torch.uint8)),
    "codes float": change("a.weight", lambda w: w.float()),
    "codes bool": change("a.weight", lambda w: w.bool()),
    "codes turned": change("b.weight", lambda w: w.t()),
    "codes cut": change("a.weight", lambda w: w[:-1]),
    "codes flat": change("a.weight", lambda w: w.reshape(-1)),
    "scales float64": change("a.weight_scale", lambda s: s.double()),
    "scales float16": change("a.weight_scale", lambda s: s.half()),
    "scales int": change("a.weight_scale", lambda s: s.int()),
    "scales nan": change("a.weight_scale", lambda s: s * float("nan")),
    "one scale inf": change("b.weight_scale", lambda s: s.index_fill(0, torch.tensor([1]), float("inf"))),
    "scales wrong shape": change("a.weight_scale", lambda s: s.reshape(1, -1)),
    "multiplier nan": change("b.input_multiplier", lambda m: m * float("nan")),
    "multiplier inf": change("b.input_multiplier", lambda m: m / 0),
    "multiplier integers": change("b.input_multiplier", lambda m: m.int()),
    "bias integers": change("a.bias", lambda b: b.int()),
    "norm integers": change("norm.weight", lambda w: w.int()),
    "norm complex": change("norm.weight", lambda w: w.to(torch.complex64)),
    "norm empty": change("norm.weight", lambda w: w[:0]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_forged_tensors_are_refused(case: str, here: Path) -> None:
    forge(here, tensors=TENSORS[case])
    refused(here)


def header(length: int, text: bytes, data: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + data


BOMB = b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"PK\x03\x04",
        header(2**63, b"{}"),
        header(10**9, b"{}"),
        header(2, b"{}"),
        header(2, b"[]"),
        header(4, b"null"),
        header(len(BOMB), BOMB, b"\0" * 4),
        header(3, b"\xff\xff\xff"),
        header(60_000, b"[" * 60_000),
    ],
)
def test_weights_that_are_no_safetensors_are_refused(content: bytes, here: Path) -> None:
    (here / WEIGHTS).write_bytes(content)
    config = json.loads((here / CONFIG).read_text())
    seal(here, config)
    refused(here)
    with pytest.raises(CheckpointError):
        describe(here)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_config_with_nan_is_refused(constant: str, here: Path) -> None:
    text = (here / CONFIG).read_text()
    (here / CONFIG).write_text(text.replace('"torch_version"', f'"x": {constant}, "torch_version"'))
    refused(here, "is not JSON")


def test_a_key_given_twice_is_no_way_around_the_checksum(here: Path) -> None:
    text = (here / CONFIG).read_text()
    (here / CONFIG).write_text(text.replace('"format_version": 1', '"format_version": 1, "layers": {}', 1))
    try:
        evenbits.load(here, Plain())  # the last one counts, and that is the one that was written
    except CheckpointError:
        pass


# ---------------------------------------------------------------------------------- the shell of a Hugging Face model


def model_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder, json.loads((folder / CONFIG).read_text()))


_MARK = "import pathlib; pathlib.Path({!r}).write_text('run')\nclass Evil: pass\n"

SHELLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no architecture": put(architectures=[]),
    "architectures null": put(architectures=None),
    "architectures text": put(architectures="BertModel"),
    "architecture a number": put(architectures=[3]),
    "architecture unknown": put(architectures=["EvilModel"]),
    "a function": put(architectures=["pipeline"]),
    "a module": put(architectures=["utils"]),
    "a tokenizer": put(architectures=["PreTrainedTokenizerFast"]),
    "a config": put(architectures=["BertConfig"]),
    "an auto class": put(architectures=["AutoModel"]),
    "the trainer": put(architectures=["Trainer"]),
    "the base class": put(architectures=["PreTrainedModel"]),
    "a dunder": put(architectures=["__file__"]),
    "a dotted name": put(architectures=["models.bert.BertModel"]),
    "another model": put(architectures=["BertForQuestionAnswering"]),
    "another family": put(architectures=["LlamaForCausalLM"]),
    "type unknown": put(model_type="evil"),
    "type null": put(model_type=None),
    "hidden text": put(hidden_size="x"),
    "hidden negative": put(hidden_size=-8),
    "hidden zero": put(hidden_size=0),
    "hidden other": put(hidden_size=2 * D),
    "hidden null": put(hidden_size=None),
    "heads": put(num_attention_heads=3),
    "layers": put(num_hidden_layers=2),
    "layers negative": put(num_hidden_layers=-1),
    "activation": put(hidden_act="os.system"),
    "activation null": put(hidden_act=None),
    "vocabulary": put(vocab_size=10**15),
    "dtype": put(dtype="os"),
    "quantization": put(quantization_config={"quant_method": "evil"}),
}


@pytest.mark.filterwarnings("ignore")  # what transformers says about strange configs
@pytest.mark.parametrize("case", SHELLS)
def test_a_forged_model_config_is_refused(case: str, bert: Path) -> None:
    model_config(bert, SHELLS[case])
    if case in ("dtype", "quantization"):
        try:
            evenbits.load(bert)  # harmless: neither says what the checkpoint holds
        except CheckpointError:
            pass
        return
    with pytest.raises(CheckpointError) as caught:
        evenbits.load(bert)
    assert 10 < len(str(caught.value)) < 1500


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", '"x"', "[" * 100_000])
def test_a_model_config_that_is_none_is_refused(content: str, bert: Path) -> None:
    (bert / "config.json").write_text(content)
    seal(bert, json.loads((bert / CONFIG).read_text()))
    with pytest.raises(CheckpointError):
        evenbits.load(bert)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["known type", "unknown type", "tokenizer"])
def test_code_that_comes_with_a_checkpoint_is_never_run(kind: str, bert: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (bert / name).write_text(_MARK.format(str(mark)))
    table = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    if kind == "tokenizer":
        path = bert / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": table, "trust_remote_code": True}))
        seal(bert, json.loads((bert / CONFIG).read_text()))
    else:
        changed = {"auto_map": table, "trust_remote_code": True}
        model_config(bert, put(**changed, **({"model_type": "evil"} if kind == "unknown type" else {})))
    try:
        open_model(str(bert))
    except evenbits.EvenbitsError as error:
        assert kind != "known type", error
    else:
        assert kind != "unknown type"
    assert not mark.exists()


@pytest.mark.parametrize("source", [None, [], "transformers", {}, {"kind": "python"}, {"kind": ["transformers"]},
                                    {"kind": "module", "class": "os.system"}])  # fmt: skip
def test_a_forged_source_is_refused(source: Any, bert: Path) -> None:
    forge(bert, put(source=source))
    with pytest.raises(CheckpointError, match="pass the float model"):
        evenbits.load(bert)


def test_a_class_named_by_the_checkpoint_is_not_looked_up(bert: Path) -> None:
    """`source.class` is shown to people; the class comes from config.json and must be a transformers model."""
    forge(bert, put(source={"kind": "transformers", "class": "os.system"}))
    assert type(evenbits.load(bert)).__name__ == "BertForSequenceClassification"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"max_length": "x"}', "null"])
def test_a_broken_generation_config_is_refused_or_harmless(content: str, bert: Path) -> None:
    (bert / "generation_config.json").write_text(content)
    try:
        evenbits.load(bert)
    except CheckpointError:
        pass


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_loaders_would_read_and_evenbits_did_not_write_is_refused(tmp_path: Path, name: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    evenbits.quantize(model, method="rtn")
    out = evenbits.save(model, tmp_path / "out")
    (out / "README.md").write_text("mine")
    evenbits.load(out, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))
    (out / name).write_text("{}")
    with pytest.raises(CheckpointError, match="did not write"):
        evenbits.load(out, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))
