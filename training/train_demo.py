"""Trains the demo model from nothing to weights/8songs/, in stages that resume.

scripts/train_demo                      # everything; somewhat more than three hours on two cores
scripts/train_demo --work DIR           # where the stages keep what is done
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
    parser = argparse.ArgumentParser(
        prog="scripts/train_demo", description="Trains the demo model in stages; what is done is kept."
    )
    parser.add_argument(
        "--target", type=Path, default=ROOT / "weights" / "8songs", help="where the checkpoint goes"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "train_demo", help="where the stages keep what is done"
    )
    parser.add_argument(
        "--effort", type=float, default=1.0, help="the part of all steps to take, to try things out"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="of the CPU; the same number gives the same weights"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    # audiocraft builds its convolutions with the older of torch's two weight norms.
    warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
    Stages(given.work, given.effort).run(given.target)
    plot_losses(given.work, given.work / "losses.png")
    print(f"{given.target} is written; losses: {given.work / 'losses.png'}")


if __name__ == "__main__":
    main()
