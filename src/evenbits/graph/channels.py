"""Follows per-channel scale factors through a forward: which values carry the channels of which sources.

While the model runs, every value gets *labels*: for each element the variable (variables.py) of the factor it would be
multiplied by if its source were scaled. They are kept in broadcast form: a [N, C, H, W] value whose channels come from
a convolution has labels of shape [1, C, 1, 1]. The rules per operation are in rules.py; an operation without a rule
fixes what it reads. Values without labels are not scaled by anything.

A matrix that belongs to no layer but is used as one, x @ W.T (a router's weight under F.linear), is a *reader*: like a
layer's, its columns can be multiplied by what its input was divided by, if nothing else reads it.

Nothing here knows an architecture. Repeated heads (grouped-query attention), flattened pictures, concatenations,
residual additions and slices of fused projections come out of running the rearranging operations on the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from evenbits.graph.rules import MATRIX_AT, RULES, base_name, hands_on, is_exact, turns_matrix
from evenbits.graph.variables import ONE, Opaque, Source, Variables
from evenbits.nn.layout import Layout

_READS_NOTHING = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like new_zeros new_empty new_ones new_full "
    "new_empty_strided sym_size size".split()
)
_ZEROS = frozenset("zeros zeros_like new_zeros".split())


@dataclass(frozen=True)
class Reader:
    """A parameter that is used as a matrix outside every layer: the variables of the channels it reads, int64 [I], and
    the dimension along which it has them."""

    channels_I: torch.Tensor
    dim: int


class ChannelFlow:
    """Labels of the values of one forward. layers: the matrix layers whose weights may be scaled (name → layout)."""

    def __init__(self, layers: Mapping[str, Layout], owned: Mapping[int, str]) -> None:
        self.layers = layers
        self.variables = Variables()
        self.labels: dict[int, torch.Tensor] = {}
        self.sources: list[Source] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.readers: dict[str, Reader] = {}
        self.touched: dict[str, str] = {}
        self._scopes: dict[str, set[int]] = {}
        self._owned = owned  # parameter value → layer that owns it
        self._parameters: dict[int, str] = {}
        self._matrices: dict[int, tuple[str, bool]] = {}  # value → parameter with two dimensions, and whether turned
        self._read_otherwise: dict[str, str] = {}
        self._sources: dict[tuple[str, bool, float], Source] = {}
        self._by_first: dict[int, list[Source]] = {}
        self._opaque: set[int] = set()
        self._derived: dict[int, Source] = {}  # values that are a parameter's elements, at most with a number added
        self._uses: dict[str, set[float]] = {}  # parameter → numbers with which it is used
        self._inside: list[str] = []
        self._zeros: set[int] = set()
        self._lost: dict[int, str] = {}  # value without labels → what no factor passed through

    def add_parameter(self, value: int, name: str, shape: Sequence[int]) -> None:
        """Names a parameter's value; what belongs to a layer is not a source of its own."""
        if value not in self._owned:
            self._parameters[value] = name
            if len(shape) == 2 and min(shape) > 1:
                self._matrices[value] = (name, False)

    def enter(self, name: str, value: int, shape: Sequence[int]) -> None:
        """A layer is called on a value."""
        self._inside.append(name)
        layout = self.layers[name]
        labels = self.labels.get(value)
        if labels is None:
            labels = torch.full((1,) * len(shape), ONE)
        along = [1] * len(shape)
        along[layout.channel_dim] = layout.in_channels
        if labels.shape[layout.channel_dim] == layout.in_channels > 1:
            labels = self._one_per_channel(labels, layout)
        if any(size not in (1, wanted) for size, wanted in zip(labels.shape, along, strict=True)):
            self.variables.fix(labels, f"its factors do not lie along the channels of {name}")
            labels = torch.full((1,) * len(shape), ONE)
        channels_I = labels.expand(along).flatten()
        if name in self.inputs:
            self.variables.unify(self.inputs[name], channels_I)
        self.inputs[name] = channels_I

    def _one_per_channel(self, labels: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Where a channel has several factors over its positions (pixels that were shuffled), they must be equal. That
        is asked of them if no channel shares a factor with another; else the labels are returned as they are."""
        rows_CP = self.variables.find(labels).movedim(layout.channel_dim, 0).flatten(1)
        channels_CP = torch.arange(len(rows_CP)).unsqueeze(1).expand_as(rows_CP)
        pairs = torch.stack([rows_CP.flatten(), channels_CP.flatten()]).unique(dim=1)
        if rows_CP.shape[1] == 1 or len(pairs[0].unique()) < pairs.shape[1]:
            return labels
        self.variables.unify(rows_CP, rows_CP[:, :1])
        return layout.on_activation(rows_CP[:, 0], labels.ndim)

    def leave(self, name: str, outputs: Sequence[tuple[int, Sequence[int]]]) -> None:
        """A layer returned values (with their shapes)."""
        self._inside.pop()
        layout = self.layers[name]
        rows = self.source(name, True, 0.0, layout.out_channels).variables
        for value, shape in outputs:
            if shape[layout.channel_dim] == layout.out_channels:
                self.labels[value] = layout.on_activation(rows, len(shape))

    def source(self, name: str, rows: bool, offset: float, size: int) -> Source:
        """The source of a layer's rows or a parameter, the same one each time it is used."""
        key = (name, rows, offset)
        if key not in self._sources:
            self._sources[key] = Source(name, rows, offset, self.variables.new(size), size)
            self.sources.append(self._sources[key])
            self._by_first.setdefault(self._sources[key].first, []).append(self._sources[key])
        return self._sources[key]

    def parameter_of(self, labels: torch.Tensor) -> str | None:
        """The parameter whose elements these labels are, one by one (offset 0), or None."""
        source = self.source_of(labels)
        return source.name if source is not None and source.offset == 0 else None

    def source_of(self, labels: torch.Tensor) -> Source | None:
        """The parameter's source whose variables these labels are, one by one, or None."""
        if not labels.numel():
            return None
        for source in self._by_first.get(int(labels.flatten()[0]), ()):
            if not source.rows and torch.equal(labels.flatten(), source.variables):
                return source
        return None

    def step(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        value_of: Callable[[torch.Tensor], int],
        place: str,
        read: Mapping[int, int],
        sharing: set[int],
    ) -> None:
        """One operation. read: tensor id → value before the operation; value_of: the value a tensor holds now; place:
        the module it runs in; sharing: values in the memory that it writes to."""
        name = base_name(func)
        self._zeros -= sharing
        if name in _ZEROS:
            self._zeros |= {value_of(leaf) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        if name in _READS_NOTHING:
            return
        values = [read[id(leaf)] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for value in values:
            owner = self._owned.get(value)
            if owner is not None and owner not in self._inside:
                self.touched[owner] = f"its parameters are also read by {name} in {place or 'the model'}"
        where = f" in {place or 'the model'}"
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self._follow_matrices(name, args, values, [value_of(tensor) for tensor in outputs], where)
        if self._inside:
            return
        look = _Look(self, read, where)
        exact = is_exact(func, len(values))
        found: Any = None
        try:
            if name not in RULES or "out" in kwargs:
                raise Opaque
            found = RULES[name](look, func, args, dict(kwargs), output)
        except Opaque:
            for value in {*values, *sharing}:
                self._close(value, f"its tensor is also read by {name}{where}")
        # A parameter that a rule did not follow is used in a way that no factor of its would survive.
        self._opaque.update(value for value in values if value in self._parameters and value not in self.labels)
        for value in values:
            self._follow_parameter(value, exact, found, [value_of(tensor) for tensor in outputs])
        self.see(place, (value_of(tensor) for tensor in outputs))
        for tensor, labels in zip(outputs, found if isinstance(found, list) else [found], strict=False):
            if labels is not None:
                self.labels[value_of(tensor)] = labels
        cause = self._cause(name, values)
        self._lost |= {value: cause for tensor in outputs if (value := value_of(tensor)) not in self.labels}

    def _cause(self, name: str, values: Sequence[int]) -> str:
        """Why what an operation made of these values would carry no factor: what it read had none, or it is the
        operation itself."""
        if hands_on(name):
            before = [self.why_lost(value) for value in values if value not in self.labels]
            if told := next(filter(None, before), ""):
                return told
            if len(before) == len(values) > 0:
                return ""
        return f"computed by {name}, through which no factor passes"

    def why_lost(self, value: int) -> str:
        """What no factor passed through on the way to a value without labels; "" if it comes from outside."""
        return self._lost.get(value, "")

    def is_zeros(self, value: int) -> bool:
        """Whether a value was made as zeros and holds nothing else."""
        return value in self._zeros

    def _follow_matrices(
        self, name: str, args: tuple[Any, ...], values: Sequence[int], outputs: Sequence[int], where: str
    ) -> None:
        """What becomes of matrices that are parameters of no layer: turned, converted, multiplied or anything else."""
        for value in set(values) & self._matrices.keys():
            parameter, turned = self._matrices[value]
            turns = turns_matrix(name, args)
            if turns is not None and len(outputs) == len(values) == 1:
                self._matrices[outputs[0]] = (parameter, turned != turns)
            elif self._inside or name not in MATRIX_AT or values.count(value) > 1 or values[MATRIX_AT[name]] != value:
                self._read_otherwise[parameter] = f"{parameter} is also read by {name}{where}"

    def read_by_matrix(self, value: int, labels: torch.Tensor | None, ndim: int, size: int, *, turned: bool) -> bool:
        """Notes that a tensor with these labels is multiplied by the matrix `value`; False if that is none.

        turned: the operation itself multiplies by the matrix transposed.
        """
        if value not in self._matrices:
            return False
        name, dim = self._matrices[value][0], int(self._matrices[value][1] != turned)
        if labels is None:
            labels = torch.full((1,) * ndim, ONE)
        if any(length != 1 for length in labels.shape[:-1]):
            self.variables.fix(labels, f"its factors do not lie along the columns of {name}")
            labels = torch.full((1,) * ndim, ONE)
        channels_I = labels.flatten().expand(size)
        known = self.readers.setdefault(name, Reader(channels_I, dim))
        if known.dim == dim:
            self.variables.unify(known.channels_I, channels_I)
        else:
            self._read_otherwise[name] = f"{name} is also read the other way round"
            self.variables.fix(channels_I, self._read_otherwise[name])
        return True

    def _close(self, value: int, reason: str) -> None:
        if value in self._parameters:
            self._opaque.add(value)
        if value in self.labels:
            self.variables.fix(self.labels[value], reason)

    def _follow_parameter(self, value: int, exact: bool, found: Any, outputs: list[int]) -> None:
        """Notes what is made of a parameter: (offset + parameter) again, or a use of it."""
        if not self.is_derived(value):
            return
        if exact and isinstance(found, torch.Tensor) and found.numel():
            at = int(found.flatten()[0])
            self._derived |= {out: s for out in outputs for s in self.sources if s.first <= at < s.first + s.size}
        else:
            source = self._derived.get(value)
            name = self._parameters[value] if source is None else source.name
            self._uses.setdefault(name, set()).add(0.0 if source is None else source.offset)

    def is_derived(self, value: int) -> bool:
        """Whether a value is a parameter, rearranged or with a number added at most."""
        return value in self._parameters or value in self._derived

    def see(self, scope: str, values: Iterable[int]) -> None:
        """Values that the code of a module's forward has in its hands."""
        self._scopes.setdefault(scope, set()).update(values)

    def finish(self, escaped: set[int], shapes: Mapping[int, Sequence[int]]) -> None:
        """Fixes what leaves the model, what belongs to layers whose parameters others read, too, and what a layer that
        did not run this time (an expert nothing was routed to) could read when it does."""
        for value in escaped & set(self.labels):
            self.variables.fix(self.labels[value], "its tensor is an output of the model")
        for name, reason in self.touched.items():
            if (name, True, 0.0) in self._sources:
                self.variables.fix(self._sources[name, True, 0.0].variables, reason)
            if name in self.inputs:
                self.variables.fix(self.inputs[name], reason)
        for (name, rows, _), source in self._sources.items():
            if not rows and len(self._uses.get(name, ())) > 1:
                self.variables.fix(source.variables, f"{name} is used in more than one way")
        for value in escaped & self._matrices.keys():
            self._read_otherwise[self._matrices[value][0]] = f"what is made of {self._matrices[value][0]} is kept"
        for name in self.readers.keys() & self._read_otherwise.keys():
            self.variables.fix(self.readers[name].channels_I, self._read_otherwise[name])
        for name in self.layers.keys() - self.inputs.keys():
            above = name
            while above and above not in self._scopes:
                above = above.rpartition(".")[0]
            for value in self._scopes.get(above, set()) & set(self.labels):
                if self.layers[name].fits(shapes[value]):
                    self.variables.fix(self.labels[value], f"{name}, which did not run, may read it")

    def parameter_labels(self, value: int, shape: torch.Size) -> torch.Tensor | None:
        """Labels of a parameter that varies along one dimension at most, or None."""
        name = self._parameters.get(value)
        size = max(shape, default=1)
        if name is None or shape.numel() != size or size == 1:
            return None
        if value not in self.labels:
            source = self.source(name, False, 0.0, size)
            self.labels[value] = source.variables.view(shape)
        if value in self._opaque:
            self.variables.fix(self.labels[value], f"{name} is used in more than one way")
        return self.labels[value]


class _Look:
    """What a rule may ask and do."""

    def __init__(self, flow: ChannelFlow, read: Mapping[int, int], place: str) -> None:
        self._flow, self._read, self.place = flow, read, place
        self.variables = flow.variables

    def labels(self, tensor: Any) -> torch.Tensor | None:
        """The labels of an argument, or None if it carries none (numbers, too)."""
        return self._flow.labels.get(self._read[id(tensor)]) if isinstance(tensor, torch.Tensor) else None

    def parameter(self, tensor: Any) -> torch.Tensor | None:
        """The labels of an argument if it is a parameter, or derived from one element by element."""
        if not isinstance(tensor, torch.Tensor):
            return None
        found = self._flow.parameter_labels(self._read[id(tensor)], tensor.shape)
        return self.labels(tensor) if found is None and self.derived(tensor) else found

    def is_zeros(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made as zeros and holds nothing else."""
        return self._flow.is_zeros(self._read[id(tensor)])

    def derived(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter, rearranged or with a number added at most."""
        return self._flow.is_derived(self._read[id(tensor)])

    def reads(self, x: torch.Tensor, weight: Any, *, turned: bool = False) -> bool:
        """Whether `weight` is a matrix that belongs to no layer; if so, that it reads x's channels is noted."""
        if not isinstance(weight, torch.Tensor):
            return False
        value, size = self._read[id(weight)], x.shape[-1]
        return self._flow.read_by_matrix(value, self.labels(x), x.ndim, size, turned=turned)

    def shifted(self, labels: torch.Tensor, offset: float) -> torch.Tensor | None:
        """Labels of (offset + parameter), which is scaled by changing the parameter; None if it is no parameter."""
        name = self._flow.parameter_of(labels)
        if name is None:
            return None
        self.fix(labels, f"{name} is used as {offset:g} + {name}")
        return self._flow.source(name, False, offset, labels.numel()).variables.view(labels.shape)

    def fix(self, labels: torch.Tensor | None, reason: str) -> None:
        """Fixes labels at one."""
        if labels is not None:
            self._flow.variables.fix(labels, reason)
