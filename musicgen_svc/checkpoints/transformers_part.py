"""A folder of one model that transformers saved, such as T5 or EnCodec."""

from pathlib import Path

from musicgen_svc.checkpoints.base import TransformersPart
from musicgen_svc.checkpoints.tensor_files import (
    CONFIG,
    TRANSFORMERS_FILES,
    read_json,
    read_tensors,
    tensor_files,
)


def read_transformers_part(folder: Path) -> TransformersPart:
    """Reads the configuration of a folder that `save_pretrained` wrote, and maps its tensors from disk.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    config = read_json(folder / CONFIG)
    files = tensor_files(folder, TRANSFORMERS_FILES)
    return TransformersPart(config, read_tensors(files), str(folder), (folder / CONFIG, *files))
