"""Error feedback: what a codec lost of a gradient is added to the next one.

    send   x' = x + e          keep   e = x' − decode(encode(x'))

Over many steps everything arrives, only late, so that even biased codecs (top-k, signs, low rank) train. It is for
gradients that are summed into the same parameter step after step. For activations between stages it is not: each step
has other samples, and the error of one says nothing about the next (delta.py compares a sample with itself).

Errors are kept by the parameter's name, not by its place in a bucket: buckets are rebuilt after the first step and
after a restart. `state_dict` holds plain tensors, so a checkpoint can carry them; without them a restart loses one
step's worth of error. Memory: one tensor of the parameter's size per parameter.

Source: F. Seide et al., Interspeech 2014; S. P. Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evenbits.errors import EvenbitsError


class ErrorFeedback:
    """The errors of the last step, by name.

    decay: what an error is multiplied by before it is added; 1 keeps all of it, less forgets old errors.
    """

    def __init__(self, decay: float = 1.0) -> None:
        if not 0 <= decay <= 1:
            raise EvenbitsError(f"an error feedback's decay lies between 0 and 1; given {decay}.")
        self.decay = decay
        self._errors: dict[str, torch.Tensor] = {}

    def compensate(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x + the error of `name`; x's shape, in float32 at least, so that a small error is not rounded away.

        Raises EvenbitsError if the error that is kept has another shape.
        """
        if not x.is_floating_point():
            raise EvenbitsError(f"error feedback is for floating-point tensors; {name!r} is {x.dtype}.")
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        error = self._errors.get(name)
        if error is None:
            return wide.clone() if wide.data_ptr() == x.data_ptr() else wide
        if error.shape != x.shape:
            raise EvenbitsError(
                f"the error kept for {name!r} has shape {list(error.shape)}; given a tensor of shape {list(x.shape)}. "
                "Use one name for each parameter, and forget() it where its shape changes."
            )
        return wide.add(error.to(wide.device, wide.dtype), alpha=self.decay)

    def update(self, name: str, compensated: torch.Tensor, decoded: torch.Tensor) -> None:
        """Keeps compensated − decoded as the error of `name`. Raises EvenbitsError if the shapes differ."""
        if compensated.shape != decoded.shape:
            raise EvenbitsError(
                f"{name!r}: what was sent has shape {list(compensated.shape)}, what was decoded {list(decoded.shape)}."
            )
        kept = self._errors.get(name)
        if kept is not None and kept.shape == compensated.shape and kept.dtype == compensated.dtype:
            torch.sub(compensated.detach(), decoded.detach(), out=kept)
        else:
            self._errors[name] = compensated.detach() - decoded.detach()

    def forget(self, name: str | None = None) -> None:
        """Drops the error of `name`, or all of them."""
        if name is None:
            self._errors.clear()
        else:
            self._errors.pop(name, None)

    def __len__(self) -> int:
        return len(self._errors)

    @property
    def nbytes(self) -> int:
        """Bytes of all errors."""
        return sum(error.nbytes for error in self._errors.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the errors, by name: plain tensors."""
        return {name: error.clone() for name, error in self._errors.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces all errors by those of a `state_dict`. Raises EvenbitsError for what is not one."""
        for name, error in state.items():
            fine = isinstance(error, torch.Tensor) and error.is_floating_point() and bool(error.isfinite().all())
            if not isinstance(name, str) or not fine:
                raise EvenbitsError(f"the state of an error feedback maps names to finite tensors; {name!r} does not.")
        self._errors = {name: error.detach().clone() for name, error in state.items()}
