"""Trains the demo model and writes it to weights/8songs/. A run that was stopped can be resumed.

scripts/train_demo                      # all stages; somewhat more than three hours on two cores
scripts/train_demo --work DIR           # keeps the results of the stages in this folder
"""

import argparse
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from training.plots import plot_losses
from training.stages import Stages

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(
        prog="scripts/train_demo", description="Trains the demo model in stages, whose results are kept."
    )
    parser.add_argument(
        "--target", type=Path, default=ROOT / "weights" / "8songs", help="the folder of the checkpoint"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "train_demo", help="the folder of the stages' results"
    )
    parser.add_argument(
        "--effort", type=float, default=1.0, help="the part of all steps to take; below 1 for a trial"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of the CPU; the same number gives the same weights"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    # audiocraft builds its convolutions with the older of torch's two weight norms.
    warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
    Stages(given.work, given.effort).run(given.target)
    plot_losses(given.work, given.work / "losses.png")
    print(f"The checkpoint is {given.target}, the losses are {given.work / 'losses.png'}.")


if __name__ == "__main__":
    main()
