"""Every setting of the service, read once from the environment when the server starts."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from musicgen_svc.errors import ServiceError

PREFIX = "MUSICGEN_"


@dataclass(frozen=True)
class Settings:
    """What an operator may choose. Field `x` is read from the variable `MUSICGEN_X`, or from Cog's own."""

    weights_dir: Path = Path("weights")
    """Where `scripts/download_weights` puts checkpoints."""
    device: str = "auto"
    """`cuda`, `cuda:1`, `cpu`, or `auto`: the first GPU, else the CPU."""
    max_duration_s: int = 600
    """Longest `duration` that is accepted; the schema's own maximum is 600."""
    max_request_s: float = 1800.0
    """Wall-clock limit of one prediction, from its start on the device."""
    work_dir: Path | None = None
    """Where outputs are written until Cog has sent them. Default: the system's temporary folder."""
    output_grace_s: float = 30.0
    """How long an output stays after `run()` returned it, so that Cog can read or upload it."""
    diffusion_window_s: float = 60.0
    """Longest piece that MultiBand Diffusion decodes at once; longer ones are crossfaded."""
    lora_strength: float = 1.0
    """How much of a LoRA adapter is merged into its base model; 1: as it was trained."""
    precision: str = field(
        default="reference", metadata={"choices": ("reference", "float16", "bfloat16", "int8")}
    )
    """Of the language model's matrices, see `engine/projections.py`."""
    cuda_graphs: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """On a GPU: record the decoding step and replay it. `auto`: if that draws the same tokens at load."""
    gpu_kernels: str = field(default="off", metadata={"choices": ("auto", "on", "off")})
    """On a GPU: decode with Triton kernels. `auto`: if they agree with the plain operations at load."""
    tag_prompt: bool = False
    """Whether the prompt is written into the output's tags."""
    slots: int = field(default=1, metadata={"variable": "COG_MAX_CONCURRENCY"})
    """How many predictions run at once. Cog reads it too: it sends as many, and refuses more."""
    memory_budget_gb: float = 0.0
    """What models may take of the device's memory; 0: what it has, less working space."""
    weights_hosts: str = "replicate.delivery,huggingface.co,hf.co"
    """From where a URL in COG_WEIGHTS is fetched: names that also stand for their subdomains."""
    weights_max_gb: float = 32.0
    """The largest file that such a URL may give, in units of 10^9 bytes."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Reads the settings; unset or empty variables keep their defaults.

        Raises:
            ServiceError: a variable does not parse, a limit is not positive, or there is no such choice.
        """
        values: dict[str, object] = {}
        for setting in fields(cls):
            name = variable(setting)
            text = environment.get(name, "")
            if text:
                values[setting.name] = _parse(name, text, setting)
        return cls(**values)  # type: ignore[arg-type]


def variable(setting: Field[object]) -> str:
    """The environment variable that a field of `Settings` is read from."""
    return str(setting.metadata.get("variable", PREFIX + setting.name.upper()))


def _parse(name: str, text: str, setting: Field[object]) -> object:
    kind = type(setting.default)
    choices = setting.metadata.get("choices", (text,))
    if text not in choices:
        raise ServiceError(f"{name} is {text!r}; it must be {' or '.join(choices)}.")
    if kind is bool:
        try:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        except KeyError:
            raise ServiceError(f"{name} is {text!r}; it must be true or false.") from None
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ServiceError(f"{name} is {text!r}; it must be a number.")
        if number <= 0 and number != setting.default:
            raise ServiceError(f"{name} is {text}; it must be above 0.")
        return number
    return text if kind is str else Path(text)
