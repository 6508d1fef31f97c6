"""Classification: metrics against hand values, every kind of data, faults, and the numbers of a real model."""

from __future__ import annotations

import json
import math
import pathlib
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evenbits.data.arrays import Arrays
from evenbits.data.labelled import Labelled
from evenbits.errors import EvenbitsError
from evenbits.evaluation.classification import classification
from evenbits.evaluation.intervals import wilson
from evenbits.evaluation.tasks import evaluate


class Echo(torch.nn.Module):
    """Answers its inputs [N, classes] as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.batches.append(len(inputs))
        return inputs


def one_hot(classes: list[int], of: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), of).to(torch.float32)


def test_binary_metrics_by_hand() -> None:
    # tp 6, fp 1, fn 2, tn 3: matthews = (6*3 - 1*2) / sqrt(7*8*4*5), f1 = 12 / 15
    predicted = [1] * 7 + [0] * 5
    true = torch.tensor([1] * 6 + [0] + [1] * 2 + [0] * 3)
    result = classification(Echo(), Arrays(one_hot(predicted), true), progress=False)
    assert result.metrics == pytest.approx({"accuracy": 0.75, "matthews": 16 / math.sqrt(1120), "f1": 0.8})
    assert result.interval == wilson(9, 12)
    assert result.n == 12
    assert result.items == (1,) * 6 + (0, 0, 0) + (1,) * 3
    assert result.outcomes == tuple(zip(predicted, true.tolist(), strict=True))
    assert json.loads(json.dumps(result.to_json()))["interval"] == list(wilson(9, 12))


def test_multi_class_matthews_by_hand() -> None:
    # true 0 0 1 1 2 2, predicted 0 1 1 1 2 0: c 4, s 6, p (2, 3, 1), t (2, 2, 2); (24 - 12) / sqrt(22 * 24)
    true = torch.tensor([0, 0, 1, 1, 2, 2])
    result = classification(Echo(), Arrays(one_hot([0, 1, 1, 1, 2, 0], 3), true), progress=False)
    assert set(result.metrics) == {"accuracy", "matthews"}
    assert result.metrics["matthews"] == pytest.approx(12 / math.sqrt(22 * 24))


def test_one_class_only_is_noted() -> None:
    result = classification(Echo(), Arrays(one_hot([0, 0]), torch.tensor([0, 1])), progress=False)
    assert result.metrics == {"accuracy": 0.5, "matthews": 0.0, "f1": 0.0}
    assert "by convention" in result.notes[0]


def test_batch_size() -> None:
    model = Echo()
    classification(model, Arrays(one_hot([0, 1, 0, 1, 0]), torch.tensor([0, 1, 0, 1, 0])), batch_size=2, progress=False)
    assert model.batches == [2, 2, 1]


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
def test_batches_of_tensors_and_mappings(labels: torch.dtype) -> None:
    first = (one_hot([0, 1]), torch.tensor([0, 1], dtype=labels))
    second = ({"inputs": one_hot([1])}, torch.tensor([0], dtype=labels))
    assert classification(Echo(), iter([first, second]), progress=False).items == (1, 1, 0)


def test_files_of_arrays(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=one_hot([0, 1, 1]).numpy(), y=np.array([0, 1, 0]))
    result = evaluate(Echo(), task="classification", data=tmp_path / "a.npz", progress=False)
    assert result.items == (1, 1, 0)
    np.save(tmp_path / "a.npy", one_hot([0]).numpy())
    with pytest.raises(EvenbitsError, match="no labels"):
        classification(Echo(), tmp_path / "a.npy")


class Marks(torch.nn.Module):
    """Class 1 for a sentence whose ids hold the letter b; answers an object with .logits."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        found = ((input_ids == ord("b")) & (attention_mask == 1)).any(dim=1).long()
        return SimpleNamespace(logits=one_hot(found.tolist()))


class LetterTokenizer:
    """Pads to the longest of the batch; keeps what it was asked."""

    pad_token: str | None = "b"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, text: list[str], pair: list[str] | None = None, **options: Any) -> UserDict[str, torch.Tensor]:
        self.asked.append(options)
        joined = [a + b for a, b in zip(text, pair or [""] * len(text), strict=True)]
        cut = [sentence[: options["max_length"]] for sentence in joined]
        longest = max(map(len, cut))
        ids = [[*map(ord, sentence), *[ord("b")] * (longest - len(sentence))] for sentence in cut]
        mask = [[1] * len(sentence) + [0] * (longest - len(sentence)) for sentence in cut]
        return UserDict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def test_sentences_are_padded_and_truncated() -> None:
    data, tokenizer = Labelled(("ab", "a", "aaaab"), (1, 0, 1)), LetterTokenizer()
    result = classification(Marks(), data, tokenizer=tokenizer, batch_size=2, max_length=4, progress=False)
    assert result.items == (1, 1, 0)
    assert tokenizer.asked[0] == {
        "padding": True,
        "truncation": True,
        "max_length": 4,
        "return_tensors": "pt",
        "verbose": False,
    }


def test_sentence_pairs_and_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t1\na\ta\t1\n")
    result = classification(Marks(), str(tmp_path / "a.tsv"), tokenizer=LetterTokenizer(), progress=False)
    assert result.items == (1, 0)


def test_a_tokenizer_without_padding() -> None:
    tokenizer = LetterTokenizer()
    tokenizer.pad_token = None
    data = Labelled(("ab", "a"), (1, 0))
    with pytest.raises(EvenbitsError, match="give batch_size=1"):
        classification(Marks(), data, tokenizer=tokenizer)
    assert classification(Marks(), data, tokenizer=tokenizer, batch_size=1, progress=False).metrics["accuracy"] == 1
    assert tokenizer.asked[0]["padding"] is False


def arrays(labels: list[int], inputs: torch.Tensor | None = None) -> Arrays:
    return Arrays(one_hot([0] * len(labels)) if inputs is None else inputs, torch.tensor(labels))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (arrays([0, 0, 2]), "input 3 has label 2; the model has 2 classes, so labels go from 0 to 1"),
        (arrays([0, -1]), "input 2 has label -1"),
        (arrays([0, 0], torch.tensor([[0.0, 1.0], [math.nan, 1.0]])), "logits of input 2 are NaN"),
        (arrays([0], torch.zeros(1, 1)), r"shape \(1, 1\); a classifier gives"),
        (arrays([0], torch.zeros(1, 2, 2)), r"shape \(1, 2, 2\)"),
        (Labelled(("a",), (0,)), "give tokenizer="),
        ([], "no batches"),
        ([torch.zeros(2)], "batch 1 is a Tensor"),
        ([(one_hot([0, 1]), torch.tensor([0]))], "a batch of 1 labels gave logits for 2 inputs"),
        ([(one_hot([0]), torch.tensor([0.0]))], "labels of batch 1 are torch.float32"),
        ([(one_hot([0]), torch.tensor([[0]]))], r"\(1, 1\); give integers"),
        ([(["text"], torch.tensor([0]))], "the inputs are a list"),
        ("no/such/file.tsv", "there is no file"),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        classification(Echo(), data, progress=False)


def test_faults_count_inputs_across_batches() -> None:
    with pytest.raises(EvenbitsError, match="input 5 has label 7"):
        classification(Echo(), arrays([0, 0, 0, 0, 7]), batch_size=2, progress=False)
    with pytest.raises(EvenbitsError, match="batch_size=0"):
        classification(Echo(), arrays([0]), batch_size=0)


@pytest.mark.data
def test_sst2_dev(test_data: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = test_data / "minilm_glue" / "sst2"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result = classification(model, test_data / "sst2" / "dev.tsv", tokenizer=tokenizer, progress=False)
    assert result.n == 872
    assert result.metrics["accuracy"] == pytest.approx(0.8739, abs=1e-4)
    assert result.metrics["matthews"] == pytest.approx(0.7477, abs=1e-4)
