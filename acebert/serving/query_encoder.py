"""Queries → vectors, by torch or onnxruntime, from one directory.

    encoder = QueryEncoder.load(directory, "onnx_int8", threads=1)
    encoder.encode(["red summer dress"])       # float32 [1, d], length 1

`directory` is what `ray_jobs/finetune.py` or `ray_jobs/distill.py` printed: a model directory,
where the query side may be a tower of its own. `version` names the product side, so query encoders
of one version search one index, a student's and its teacher's alike.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from acebert.config import read_recipe, settings_from
from acebert.data.batches import TextArrays, query_arrays
from acebert.data.schema import normalize_query
from acebert.data.tokens import encode, load_tokenizer
from acebert.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Runtime = Literal["torch", "onnx", "onnx_int8"]
Forward = Callable[[TextArrays], NDArray[np.float32]]
"""tokens [B, L] → vectors [B, d]"""

ONNX_FILES = {"onnx": "query_encoder.onnx", "onnx_int8": "query_encoder.int8.onnx"}
ROWS_OF_ONE_LENGTH = 64  # rows of one forward, so that a long query pads few others


class QueryEncoder:
    """The query side of a dual encoder; see the module's docstring.

    Attributes:
        dim: d, dimensions of a vector
        version: first 16 hex digits of a SHA-256 over the product tower's weights
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_tokens: int,
        dim: int,
        version: str,
    ) -> None:
        self.dim = dim
        self.version = version
        self._forward = forward
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self._cls, self._sep, self._pad = special

    @classmethod
    def load(
        cls, directory: Path, runtime: Runtime = "torch", threads: int | None = None
    ) -> "QueryEncoder":
        """Load the query side of a model directory onto the CPU.

        Args:
            directory: of a dual encoder or of a student; the ONNX runtimes need one that
                `ray_jobs/distill.py` exported
            runtime: what computes, in fp32 or, for `onnx_int8`, with matrices in 8 bits
            threads: of one forward (none: the runtime's own choice, one a core); torch has one
                number for the whole process

        Raises:
            UserError: a file is missing or broken.
        """
        settings = settings_from(read_recipe(str(directory / "settings.yaml")))
        refuse_without_runtime(directory, runtime)
        forward = (
            _torch(directory, threads)
            if runtime == "torch"
            else _onnx(directory / ONNX_FILES[runtime], threads)
        )
        return cls(
            forward,
            load_tokenizer(directory / "tokenizer"),
            max_tokens=settings.text.query_tokens,
            dim=dimensions(directory),
            version=product_side_version(directory),
        )

    def encode(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of n queries, float32 [n, d] of length 1, in their order.

        Queries are normalised, tokenised and cut as in training. A query that is empty then gets
        the vector of no words.
        """
        pieces = encode(
            self._tokenizer, [normalize_query(query) for query in queries], self._max_tokens
        )
        text = query_arrays(pieces, self._cls, self._sep, self._pad)
        n = len(queries)
        if n <= ROWS_OF_ONE_LENGTH:
            return self._forward(text) if n else np.zeros((0, self.dim), np.float32)
        lengths = text.attention_mask.sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        vectors = np.empty((n, self.dim), np.float32)
        for start in range(0, n, ROWS_OF_ONE_LENGTH):
            rows = order[start : start + ROWS_OF_ONE_LENGTH]
            L = int(lengths[rows[-1]])
            vectors[rows] = self._forward(
                TextArrays(
                    text.input_ids[rows, :L],
                    text.attention_mask[rows, :L],
                    text.segment_ids[rows, :L],
                )
            )
        return vectors


def product_side_version(directory: Path) -> str:
    """First 16 hex digits of a SHA-256 over names and values of the product tower's weights: what
    all query encoders have in common that fit one index.

    Raises:
        UserError: the directory has no weights, or broken ones.
    """
    path = directory / "model.safetensors"
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="numpy") as weights:
            for name in sorted(weights.keys()):
                if name.startswith("tower."):
                    digest.update(name.encode())
                    digest.update(np.ascontiguousarray(weights.get_tensor(name)).data)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no weights of a dual encoder can be read there ({error}); it has to be the "
            "directory of a trained model"
        ) from error
    return digest.hexdigest()[:16]


def dimensions(directory: Path) -> int:
    """Of a model directory's vectors.

    Raises:
        UserError: it has no configuration of a dual encoder.
    """
    path = directory / "config.json"
    try:
        return int(json.loads(path.read_text())["embedding_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dual encoder's configuration: {error!r}") from error


def _torch(directory: Path, threads: int | None) -> Forward:
    import torch

    from acebert.models.dual import DualEncoder
    from acebert.training.pairs import as_inputs

    if threads is not None:
        torch.set_num_threads(threads)
    model = DualEncoder.load(directory)
    tower = (model.query_tower or model.tower).eval()

    def forward(text: TextArrays) -> NDArray[np.float32]:
        with torch.inference_mode():
            return tower(as_inputs(text)).numpy()

    return forward


def refuse_without_runtime(directory: Path, runtime: Runtime) -> None:
    """
    Raises:
        UserError: a model directory has not what `runtime` runs.
    """
    if runtime != "torch" and not (directory / ONNX_FILES[runtime]).is_file():
        raise UserError(
            f"{directory}: no {ONNX_FILES[runtime]} there, which the runtime {runtime} needs. "
            "ray_jobs/distill.py exports a model, or a student of it, to ONNX and prints the "
            "directory; `publish.py --query_encoder DIRECTORY` serves it"
        )


def _onnx(path: Path, threads: int | None) -> Forward:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidArgument,
        InvalidGraph,
        InvalidProtobuf,
        RuntimeException,
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others compute too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, RuntimeException) as error:
        raise UserError(f"{path}: onnxruntime cannot read it: {error}") from error

    def forward(text: TextArrays) -> NDArray[np.float32]:
        inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
        return session.run(["vectors"], inputs)[0]

    return forward
