"""What one process needs to run requests, made once at its start: the device, the loader and the pipeline."""

import gc
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from musicgen_svc.engine.engine import StepError
from musicgen_svc.errors import GenerationError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.pipeline import Pipeline
from musicgen_svc.runtime.device import find_device, is_out_of_memory, set_fp32_precision, use_device
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.threads import use_threads
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.lock_file import check_sizes
from musicgen_svc.weights.paths import Weights, local_path


@dataclass(frozen=True)
class Backend:
    """The device with its queue, and the loader and the pipeline that use it."""

    device: torch.device
    device_queue: FairQueue
    loader: Loader
    pipeline: Pipeline

    @classmethod
    def open(cls, settings: Settings, weights: str | None) -> "Backend":
        """Makes everything for the calling process, and loads no model.

        Args:
            settings: the service's.
            weights: a path or URL of a checkpoint, as in COG_WEIGHTS; None: the one in the weights folder.

        Raises:
            ServiceError: a file is missing or wrong, or the device cannot be used.
        """
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        device = find_device(settings.device)
        use_device(device)
        set_fp32_precision()
        check_sizes(settings.weights_dir)
        given = local_path(weights, settings)
        queue = FairQueue(1)
        loader = Loader(Weights.at(settings.weights_dir, read_catalog(), given), device, settings, queue)
        use_threads(loader.threads.most)
        return cls(device, queue, loader, Pipeline(loader, queue, tag_prompt=settings.tag_prompt))

    def failure(self, exc: Exception) -> GenerationError:
        """Returns the sentence for an error that the service did not raise itself.

        Frees the memory after an out-of-memory error.

        Returns:
            A `DeviceError` if the device failed, and nothing can run on it any more.
        """
        cause = exc.__cause__ if isinstance(exc, StepError) else exc
        assert cause is not None
        if is_out_of_memory(cause):
            exc.__traceback__ = cause.__traceback__ = (
                None  # their frames hold the tensors that filled the memory
            )
            with self.device_queue.acquire_next():
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            return GenerationError(
                "The device ran out of memory: ask for a shorter duration, a shorter clip or a smaller model."
            )
        if isinstance(cause, torch.AcceleratorError):
            return DeviceError("The device failed and the service must be restarted; its log has the cause.")
        return GenerationError(f"The service failed ({type(cause).__name__}); its log has the cause.")


class DeviceError(GenerationError):
    """The device failed permanently: no later request can run in this process."""
