"""Saves a training run regularly, and resumes it after it was stopped."""

from pathlib import Path

import torch
from torch import nn


class Resumable:
    """Saves a model and its optimizers to a file every `EVERY` steps, and restores them from it.

    If all draws of a step come from the step's own seed (`step_seed`), a run that was stopped and resumed
    gives the same weights as one that was not.
    """

    EVERY = 200

    def __init__(self, file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Restores the run if `file` exists. `first_step` is the step to begin with."""
        self._file, self._model, self._optimizers = file, model, optimizers
        self.first_step = 0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.first_step = saved["steps"]

    def done(self, step: int) -> None:
        """Must be called after each step; saves the run if it is time."""
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
    """Returns the seed of a step for torch's generators."""
    return seed * 1_000_003 + step
