"""All settings of the service, which are read once from the environment when the server starts."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from musicgen_svc.errors import ServiceError

PREFIX = "MUSICGEN_"


@dataclass(frozen=True)
class Settings:
    """The settings. Field `x` is read from the variable `MUSICGEN_X`, or from one of Cog's own variables."""

    weights_dir: Path = Path("weights")
    """The folder of checkpoints, which `scripts/download_weights` fills."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:<number>`, or `auto`: the first GPU, else the CPU."""
    max_duration_s: int = 600
    """The longest `duration` that is accepted; the schema's own maximum is 600."""
    max_request_s: float = 1800.0
    """The longest running time of a prediction, without the time in which it waits for others."""
    work_dir: Path | None = None
    """Where output files are kept until Cog has sent them; None: in the system's temporary folder."""
    output_grace_s: float = 30.0
    """How long an output file is kept after `run()` returned it, so that Cog can read or upload it."""
    diffusion_window_s: float = 60.0
    """The longest piece that MultiBand Diffusion decodes at once; windows of a longer one are crossfaded."""
    lora_strength: float = 1.0
    """The factor with which a LoRA adapter is merged into its base model; 1: as it was trained."""
    precision: str = field(
        default="reference", metadata={"choices": ("reference", "float16", "bfloat16", "int8")}
    )
    """The precision of the language model's matrices, see `engine/projections.py`."""
    cuda_graphs: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """On a GPU: whether to record the decoding step as a CUDA graph. `auto`: if a test at load draws the same
    tokens with it."""
    gpu_kernels: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """On a GPU: whether to decode with Triton kernels. `auto`: if a test at load finds that they agree with
    PyTorch's operations."""
    tag_prompt: bool = False
    """Whether the output's tags include the prompt."""
    slots: int = 0
    """How many requests are decoded at once; 0: as many as the device's memory holds."""
    max_concurrency: int = field(default=1, metadata={"variable": "COG_MAX_CONCURRENCY"})
    """How many predictions Cog runs at once, those that wait for a slot included. It refuses more."""
    omp_num_threads: str = field(default="", metadata={"variable": "OMP_NUM_THREADS"})
    """If it is set, every model computes with this number of threads; PyTorch itself reads the number."""
    memory_budget_gb: float = 0.0
    """How much of the device's memory models may use, in units of 10^9 bytes; 0: all but working space."""
    weights_hosts: str = "replicate.delivery,huggingface.co,hf.co"
    """The hosts from which a URL in COG_WEIGHTS may be fetched, separated by commas; subdomains included."""
    weights_max_gb: float = 32.0
    """The largest file that a URL in COG_WEIGHTS may give, in units of 10^9 bytes."""
    drain_file: Path | None = None
    """When this file exists, requests that wait and new requests are refused. It is removed at the start."""
    drain_grace_s: float = 30.0
    """How long running requests may take to end when the server is told to stop."""
    metrics_port: int = 0
    """Where metrics are served in Prometheus' format; 0: nowhere."""
    metrics_host: str = "127.0.0.1"
    """The address of this port. 0.0.0.0: any, which a container needs."""
    log_format: str = field(default="console", metadata={"variable": "LOG_FORMAT"})
    """`json`: each stage of a request is logged as a JSON object. Cog reads the variable too."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Reads the settings. A variable that is unset or empty keeps its default.

        Raises:
            ServiceError: a variable cannot be parsed, a limit is not positive, or a choice does not exist.
        """
        values: dict[str, object] = {}
        for setting in fields(cls):
            name = variable(setting)
            text = environment.get(name, "")
            if text:
                values[setting.name] = _parse(name, text, setting)
        return cls(**values)  # type: ignore[arg-type]


def variable(setting: Field[object]) -> str:
    """Returns the name of the environment variable of a field of `Settings`."""
    return str(setting.metadata.get("variable", PREFIX + setting.name.upper()))


def _parse(name: str, text: str, setting: Field[object]) -> object:
    """Parses the text of the variable `name` as the type of the setting's default."""
    wanted = type(setting.default)
    choices = setting.metadata.get("choices", (text,))
    if text not in choices:
        raise ServiceError(f"{name} is {text!r}; it must be {' or '.join(choices)}.")
    if wanted is bool:
        try:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        except KeyError:
            raise ServiceError(f"{name} is {text!r}; it must be true or false.") from None
    if wanted in (int, float):
        try:
            number = wanted(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ServiceError(f"{name} is {text!r}; it must be a number.")
        if number <= 0 and number != setting.default:
            least = "0 or above" if setting.default == 0 else "above 0"
            raise ServiceError(f"{name} is {text}; it must be {least}.")
        return number
    return text if wanted is str else Path(text)
