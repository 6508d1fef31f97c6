"""What a training run is: a recipe of the package or a YAML file, changed by the options of the command.

    task: cifar10                       # cifar10, cola, rte
    weights: mobilenetv2_imagenet/model.safetensors    # below the data folder; of text tasks, a folder
    cuts: [block6]                      # names of parts; the model is cut after each
    batch: 32                           # per step, of all replicas together
    microbatches: 4
    steps: 300
    optimizer: sgd                      # sgd (momentum 0.9), adamw
    rate: 0.01                          # falls to zero along a cosine
    decay: 0.0001
    size: 96                            # pixels, or tokens

Every key can be left out; an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from evenbits.comms.codecs import get
from evenbits.comms.wire import Edge
from evenbits.errors import EvenbitsError, unknown_name

TASKS = ("cifar10", "cola", "rte")
SCHEDULES = ("1f1b", "gpipe")
GUARDS = ("", "warn", "raise")
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Recipe:
    """One run. forward, backward: codecs of every cut, each direction on its own; data_parallel: codec of gradients
    between replicas, "+ef" for error feedback, empty for none. epochs: instead of steps, 0 for none. guard: warn, or
    raise to climb ladders such as "int4:g128>int8:g128" (comms/guard.py), empty for none. prune_embeddings: whether a
    codec that prunes may cut right behind an embedding (comms/embeddings.py).
    """

    task: str = "cifar10"
    weights: str = ""
    cuts: tuple[str, ...] = ()
    forward: str = "raw"
    backward: str = "raw"
    guard: str = ""
    prune_embeddings: bool = False
    schedule: str = "1f1b"
    data_parallel: str = ""
    batch: int = 32
    microbatches: int = 4
    steps: int = 300
    epochs: int = 0
    optimizer: str = "sgd"
    rate: float = 0.01
    decay: float = 0.0
    size: int = 96
    train: int = 0
    test: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {"task": TASKS, "schedule": SCHEDULES, "optimizer": OPTIMIZERS}
        for key, names in allowed.items():
            if getattr(self, key) not in names:
                raise unknown_name(key, str(getattr(self, key)), names)
        low = [key for key in ("batch", "microbatches", "steps", "size") if getattr(self, key) < 1]
        low += [key for key in ("epochs", "train", "test", "seed", "decay") if getattr(self, key) < 0]
        if low:
            raise EvenbitsError(f"{low[0]} is too small: {getattr(self, low[0])}.")
        if self.batch % self.microbatches:
            raise EvenbitsError(
                f"a batch of {self.batch} cannot be cut into {self.microbatches} microbatches of one size."
            )
        if self.guard not in GUARDS:
            raise unknown_name("guard", self.guard, [name for name in GUARDS if name])
        if self.guard and self.data_parallel:
            raise EvenbitsError(
                "a guard watches cuts, and replicas would decide each for itself; leave one of them out."
            )
        get(self.replica_codec)
        ladder = next((rungs for rungs in (self.edge.forward, self.edge.backward) if len(rungs) > 1), None)
        if ladder is not None and self.guard != "raise":
            raise EvenbitsError(f"nothing climbs the ladder {'>'.join(ladder)} without --guard raise.")

    @property
    def edge(self) -> Edge:
        """The codecs of every cut. Raises EvenbitsError for unknown ones."""
        both = Edge.of(f"{self.forward}/{self.backward}")
        return replace(both, prune_embeddings=self.prune_embeddings)

    @property
    def replica_codec(self) -> str:
        """data_parallel without "+ef", "raw" if there is none."""
        return self.data_parallel.removesuffix("+ef") or "raw"

    @property
    def feedback(self) -> bool:
        """Whether replicas keep the errors of their gradients."""
        return self.data_parallel.endswith("+ef")


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("evenbits.training") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the package by name, or a YAML file, with some values replaced. Raises EvenbitsError naming what is
    wrong with it.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvenbitsError(f"the recipe {path} cannot be read: {error}") from error
    elif name in shipped():
        text = (resources.files("evenbits.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe", name, shipped())
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvenbitsError(f"the recipe {name} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise EvenbitsError(f"the recipe {name} must hold keys and values; given {type(data).__name__}.")
    recipe = Recipe(**_checked(data, name))
    return replace(recipe, **(changes or {}))


def _checked(data: dict[Any, Any], source: str) -> dict[str, Any]:
    kinds = {entry.name: type(entry.default) for entry in fields(Recipe)}
    made: dict[str, Any] = {}
    for key, value in data.items():
        if key not in kinds:
            raise unknown_name(f"key in {source}:", str(key), kinds)
        kind = kinds[key]
        if kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
            made[key] = tuple(value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            made[key] = float(value)
        elif type(value) is kind and kind is not tuple:
            made[key] = value
        else:
            wanted = "a list of names" if kind is tuple else kind.__name__
            raise EvenbitsError(f"{source}: {key!r} must be {wanted}; given {value!r}.")
    return made
