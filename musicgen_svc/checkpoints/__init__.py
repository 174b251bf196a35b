"""One file per on-disk format: a path in, a configuration and a state dict out.

opening.py               a path -> the format, by what is inside; the only entry
torch_file.py            which of these wrote a torch.save file:
  audiocraft_export.py     state_dict.bin and compression_state_dict.bin
  dora.py                  checkpoint.th of a training
  cog_trainer.py           trained_model.tar, which is no tar
  lightning.py             last.ckpt
  bare.py                  a language model's state dict and nothing else
transformers_folder.py   config.json and safetensors
lora.py                  adapter_config.json: PEFT's adapter on a base model
archives.py              a tar or zip around any of them
unpacking.py             where an archive's files go, and how long they stay there

All of it is a stranger's, and is opened in a bounded time and memory, or refused in one sentence:

pickle_scan.py           what a pickle would make, counted before anything is made
expansion.py             a configuration's references and aliases, counted while they are resolved
known_fields.py          every field that is used, its kind (fields.py) and its range
agreement.py             numbers of a configuration against the tensors, before anything is built
soundness.py             tensors that are all in the file, and finite
"""

from musicgen_svc.checkpoints.base import Checkpoint, CodecPointer, OpenedCheckpoint, TransformersPart
from musicgen_svc.checkpoints.detect import open_checkpoint

__all__ = ["Checkpoint", "CodecPointer", "OpenedCheckpoint", "TransformersPart", "open_checkpoint"]
