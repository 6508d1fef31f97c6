"""What a command line can name as a model: a Hugging Face folder, a hub id, FILE.py:factory, or a folder of ours.

A Python file is run only if the user names it on the command line, never because a checkpoint does.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.checkpoints import native
from evenbits.checkpoints import transformers as hf
from evenbits.checkpoints.files import CONFIG
from evenbits.errors import EvenbitsError, unknown_name

_PYTHON = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """An opened model. quantized: it is one of our checkpoints."""

    model: nn.Module
    tokenizer: Any
    quantized: bool


def is_python(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:name."""
    return _PYTHON.fullmatch(spec) is not None


def open_model(spec: str, *, factory: str | None = None, dtype: str = "float32") -> Source:
    """Opens what `spec` names. factory: FILE.py:factory for a checkpoint whose model is not a Hugging Face one.

    Raises EvenbitsError (CheckpointError for a damaged checkpoint) naming what is wrong with it.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if is_python(spec):
        return Source(_module(spec).to(DTYPES[dtype]), None, False)
    if (Path(spec) / CONFIG).exists():
        model = native.load(spec, None if factory is None else _module(factory))
        return Source(model, hf.load_tokenizer(spec), True)
    if Path(spec).exists() and not (Path(spec) / "config.json").exists():
        raise EvenbitsError(
            f"{spec} is neither a Hugging Face folder (no config.json) nor an evenbits checkpoint (no {CONFIG}). "
            "A model that is plain Python is named FILE.py:factory."
        )
    model, tokenizer = hf.load_pretrained(spec, DTYPES[dtype])
    return Source(model, tokenizer, False)


def load_object(spec: str) -> Any:
    """The object `name` of FILE.py:name. Raises EvenbitsError if the file or the name is missing or fails to load."""
    match = _PYTHON.fullmatch(spec)
    if match is None:
        raise EvenbitsError(f"{spec!r} is not of the form FILE.py:name.")
    path, name = Path(match[1]), match[2]
    if not path.is_file():
        raise EvenbitsError(f"{path} does not exist.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise EvenbitsError(f"{path} cannot be loaded as a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise EvenbitsError(f"{path} failed while it was loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not hasattr(module, name):
        raise EvenbitsError(f"{path} has no {name!r}.")
    return getattr(module, name)


def _module(spec: str) -> nn.Module:
    made = load_object(spec)
    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            raise EvenbitsError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise EvenbitsError(f"{spec} gave a {type(made).__name__}; it must give a torch.nn.Module.")
    return made.eval()
