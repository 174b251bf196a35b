"""Training that goes on where it was stopped."""

from pathlib import Path

import torch
from torch import nn


class Resumable:
    """A model and its optimizers, written to a file every so many steps and read back from it.

    What a step draws must come from the step's own seed (`step_seed`): then a run that was stopped ends
    as one that was not.
    """

    EVERY = 200

    def __init__(self, file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._file, self._model, self._optimizers = file, model, optimizers
        self.first_step = 0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.first_step = saved["steps"]

    def done(self, step: int) -> None:
        """To be called after each step."""
        if (step + 1) % self.EVERY == 0:
            saved = {
                "model": self._model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "steps": step + 1,
            }
            temporary = self._file.with_suffix(".partial")
            torch.save(saved, temporary)
            temporary.replace(self._file)


def step_seed(seed: int, step: int) -> int:
    """For torch's generators: another one for each step."""
    return seed * 1_000_003 + step
