"""The one place that chooses how a model is decoded, by its device and by what was asked for."""

from contextlib import nullcontext

from musicgen_svc.compat import LMModel
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.choice import operations_for
from musicgen_svc.engine.decoder import Decoder, Lend
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.engine.state import Capacity
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.engine.trial import keep_graphs_that_work


def batch_for(
    lm: LMModel,
    *,
    slots: int = 1,
    precision: Precision = "reference",
    static: bool | None = None,
    graphs: bool | None = None,
    kernels: bool | None = None,
    lend: Lend = nullcontext,
) -> Batch:
    """A batch that decodes with the weights of one language model.

    slots: how many requests decode at once
    precision: see `projections.py`
    static: keep every slot's state on the device, and draw there, as a GPU wants it; None: on a GPU.
        Forced off there only greedy requests run
    graphs: on a GPU, record the step and replay it; off, the same step runs operation by operation. None:
        where that draws the same tokens. True: or fail
    kernels: decode with Triton kernels of our own; None: on a GPU, where they work. True: or fail.
        Only where the state is static
    lend: gives the model its weights, see `Decoder`

    Raises:
        WeightsError: the model is built in a way that no released MusicGen is.
        ImportError: kernels were asked for, and there is no Triton.
        GenerationError: graphs were not turned off, and there can be none, see `trial.py`.
    """
    assert slots >= 1 and not lm.training, (slots, lm.training)
    if static is None:
        static = lm.emb[0].weight.device.type == "cuda"
    decoder = Decoder(lm, precision, operations_for(lm, kernels if static else False), lend)
    if static:
        batch = StaticBatch(decoder, Capacity(slots), graphs=graphs is not False)
        if graphs is None:
            keep_graphs_that_work(batch, batch.graphed)
        return batch
    return RaggedBatch(decoder, slots)
