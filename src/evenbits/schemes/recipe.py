"""A recipe: one model, one task, and the runs that make a table. Another model is a change of names.

    title: …
    model: minilm_glue/sst2          # a folder below the data folder, an absolute one, or a hub id
    task: classification
    metric: matthews                 # optional: the task's first (accuracy) otherwise; F1 is f1
    reference: int4                  # optional: the run whose divergence from float the others' is compared with
    evaluation: sst2/dev.tsv
    calibration: sst2/train.tsv      # optional
    samples: 128                     # optional
    runs:
      - {name: int4, scheme: W4A4, method: rtn}
      - {name: OliVe, scheme: W4A4_OVP, options: {weighted: false}, published: 92.43}

`published` is a figure from a paper, shown beside ours. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.schemes.scheme import Scheme, resolve

# What a key holds, where it is not text. Runs and schemes are checked by those who read them.
_VALUES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "calibration": ("text", (str, NoneType)),
    "metric": ("text", (str, NoneType)),
    "method": ("text", (str, NoneType)),
    "options": ("keys and values", (dict,)),
    "reference": ("the name of a run", (str, NoneType)),
    "published": ("a number", (int, float, NoneType)),
    "runs": ("a list", (object,)),
    "samples": ("a whole number", (int,)),
    "scheme": ("a scheme", (object,)),
}


@dataclass(frozen=True)
class RecipeRun:
    """One line of the table."""

    name: str
    scheme: Scheme
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    published: float | None = None


@dataclass(frozen=True)
class Recipe:
    """What to load, how to score it, and what to compare."""

    title: str
    model: str
    task: str
    evaluation: str
    runs: tuple[RecipeRun, ...]
    calibration: str | None = None
    samples: int = 128
    published: float | None = None
    metric: str | None = None
    reference: str | None = None


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("evenbits.schemes") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str | Path) -> Recipe:
    """A recipe of the package by name, or a YAML file. Raises EvenbitsError naming what is wrong with it."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvenbitsError(f"the recipe {path} cannot be read: {error}") from error
    else:
        if str(name) not in shipped():
            raise unknown_name("recipe", str(name), shipped())
        text = (resources.files("evenbits.schemes") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvenbitsError(f"the recipe {name} is not YAML: {error}") from error
    return _recipe(data, str(name))


def _recipe(data: Any, source: str) -> Recipe:
    keys = _checked(data, Recipe, source, ("title", "model", "task", "evaluation", "runs"))
    if not isinstance(keys["runs"], list) or not keys["runs"]:
        raise EvenbitsError(f"{source}: 'runs' must be a list with at least one run.")
    runs = []
    for entry in keys["runs"]:
        run = _checked(entry, RecipeRun, f"{source}, runs", ("name", "scheme"))
        try:
            runs.append(RecipeRun(**{**run, "scheme": resolve(run["scheme"])}))
        except EvenbitsError as error:
            raise EvenbitsError(f"{source}, run {run['name']!r}: {error}") from error
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvenbitsError(f"{source}: two runs are called {twice!r}; give each its own name.")
    if keys.get("reference") not in (None, *names):
        raise unknown_name(f"reference in {source}: a run", keys["reference"], names)
    return Recipe(**{**keys, "runs": tuple(runs)})


def _checked(data: Any, kind: type, source: str, needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise EvenbitsError(f"{source} must hold keys and values; given {type(data).__name__}.")
    allowed = [entry.name for entry in fields(kind)]
    for key in data:
        if key not in allowed:
            raise unknown_name(f"key in {source}:", str(key), allowed)
    missing = [key for key in needed if key not in data]
    if missing:
        raise EvenbitsError(f"{source} lacks the key {missing[0]!r}; it needs: {', '.join(needed)}.")
    for key, value in data.items():
        words, types = _VALUES.get(key, ("text", (str,)))
        if not isinstance(value, types) or (isinstance(value, bool) and object not in types):
            raise EvenbitsError(f"{source}: {key!r} must be {words}; given {value!r}.")
    return dict(data)
