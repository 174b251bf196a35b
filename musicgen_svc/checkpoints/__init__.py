"""Opens checkpoints: finds the configuration and the state dict at a path. No code in a file is run.

detect.py                what format a path has, by its content: `open_checkpoint`, the only entry
base.py                  what every format provides
torch_file.py            torch.save files
torch_packages.py        which tool wrote one: audiocraft's export or training, a Cog trainer, Lightning, or
                         `torch.save` of a bare state dict
transformers_folder.py   config.json and safetensors; transformers_names.py: its names -> audiocraft's
lora.py                  adapter_config.json: PEFT's adapter, merged into its base model
archives.py              a tar or zip around any of these; unpacking.py: the folder that it is unpacked to

Configurations:

infer_config.py          a configuration from tensors, for formats without one
configs.py               audiocraft's configurations; part_configs.py: those of the other models
field_types.py           the types of fields; field_tables.py, part_field_tables.py: every field and its range

Readers, each within stated bounds of time and memory:

unpickle.py              torch.save files; pickle_scan.py: what a pickle would make, counted beforehand
tensor_files.py          JSON, safetensors and shards
expansion.py             a configuration's references and aliases, counted while they are resolved
key_names.py             names that differ between versions of a tool
tensor_checks.py         whether tensors are complete, fit their configuration and module, and are finite
damage.py                why a file cannot be read
"""

from musicgen_svc.checkpoints.base import Checkpoint, CodecPointer, OpenedCheckpoint, TransformersPart
from musicgen_svc.checkpoints.detect import open_checkpoint

__all__ = ["Checkpoint", "CodecPointer", "OpenedCheckpoint", "TransformersPart", "open_checkpoint"]
