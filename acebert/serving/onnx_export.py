"""The query side of a dual encoder as ONNX, in fp32 and with its matrices in 8 bits.

Inputs `input_ids` int64 and `attention_mask` bool, [B, L] of any B and L; output `vectors`
float32 [B, d] of length 1. The hot-query segment is part of the graph, for queries have no other.
"""

import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acebert.models.dual import DualEncoder, Tower
from acebert.models.encoder import HOT_QUERY, TextInputs
from acebert.serving.query_encoder import ONNX_FILES

log = logging.getLogger(__name__)

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


def write_onnx(directory: Path) -> None:
    """Write both ONNX files of the dual encoder in `directory` beside it."""
    model = DualEncoder.load(directory)
    graph = _Graph(model.query_tower or model.tower).eval()
    fp32, int8 = (directory / ONNX_FILES[name] for name in ("onnx", "onnx_int8"))
    example = torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.bool)
    B, L = torch.export.Dim("B"), torch.export.Dim("L")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            example,
            fp32,
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_shapes={"input_ids": {0: B, 1: L}, "attention_mask": {0: B, 1: L}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported = onnx.load(fp32)
    del exported.graph.value_info[:]  # of weights before they were folded; inferred anew
    quantize_dynamic(
        exported,
        int8,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
