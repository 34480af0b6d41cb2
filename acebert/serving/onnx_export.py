"""The query side of a dual encoder as ONNX, in fp32 and with its matrices in 8 bits.

Inputs `input_ids` int64 and `attention_mask` bool, [B, L] of any B and L; output `vectors`
float32 [B, d] of length 1. The hot-query segment is part of the graph, for queries have no other.
"""

import logging
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acebert.config import Settings
from acebert.data.tokens import backbone_digest
from acebert.models.dual import DualEncoder, Tower
from acebert.models.encoder import HOT_QUERY, TextInputs
from acebert.serving.query_encoder import ONNX_FILES
from acebert.workdir import STAGE_FILE, Stage, digest_of, run_stage

log = logging.getLogger(__name__)

VERSION = 1
OPSET = 18


class _Graph(nn.Module):
    """A tower on plain tensors, without branches on the batch's size."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        segments = torch.full_like(input_ids, HOT_QUERY)
        state = self.tower.encoder.pooled(TextInputs(input_ids, attention_mask, segments))
        return F.normalize(self.tower.projection(state), dim=-1)


def export(settings: Settings, model: Path, alias: str | None = None) -> Stage:
    """The 'query_encoder' stage: a model directory with both ONNX files in it, for any runtime of
    `QueryEncoder`.

    Args:
        model: directory of a dual encoder or of a student
        alias: where it is given, the directory becomes an MLflow model, and a version of
            `tracking.register_as` under this alias
    """
    key = {"version": VERSION, "model": digest_of(backbone_digest(str(model)))}

    def build(out: Path) -> None:
        from acebert.tracking import log_model, start_run

        ignored = shutil.ignore_patterns(STAGE_FILE, "*.onnx")
        shutil.copytree(model, out, dirs_exist_ok=True, ignore=ignored)
        write_onnx(out)
        if alias is not None:
            named = settings.tracking.model_copy(update={"alias": alias})
            own = settings.model_copy(update={"tracking": named})
            with start_run(own, "query_encoder", digest_of(key), name=alias) as run:
                log_model(own, run, out)

    return run_stage(settings.workdir, "query_encoder", key, build)


def write_onnx(directory: Path) -> None:
    """Write both ONNX files of the dual encoder in `directory` into it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = DualEncoder.load(directory)
    graph = _Graph(model.query_tower or model.tower).eval()
    fp32, int8 = (directory / ONNX_FILES[name] for name in ("onnx", "onnx_int8"))
    example = torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.bool)
    dynamic = {0: torch.export.Dim("B"), 1: torch.export.Dim("L")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter, about its own internals
        torch.onnx.export(
            graph,
            example,
            fp32,
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    exported = onnx.load(fp32)
    del exported.graph.value_info[:]  # of weights before they were folded; inferred anew
    quantize_dynamic(
        exported,
        int8,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    log.info(
        "onnx: %s, %.0f MB in fp32, %.0f MB in int8",
        directory,
        *(path.stat().st_size / 1e6 for path in (fp32, int8)),
    )
