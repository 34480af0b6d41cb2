"""The dual encoder as an MLflow model: queries in, vectors out.

MLflow runs this file when it loads the model ("models from code"), so nothing is unpickled. The
artifact `model` is a whole model directory: a server that loads it has the product side too.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel

from acebert.config import read_recipe, settings_from
from acebert.data.schema import normalize_query
from acebert.data.tokens import encode, load_tokenizer
from acebert.evaluation.embed import query_inputs
from acebert.models.dual import DualEncoder


class QueryEncoder(PythonModel):
    """`predict` takes a frame with a `query` column and gives float32 [n, d] of length 1."""

    def load_context(self, context: Any) -> None:
        directory = Path(context.artifacts["model"])
        self.max_tokens = settings_from(
            read_recipe(str(directory / "settings.yaml"))
        ).text.query_tokens
        self.encoder = DualEncoder.load(directory).eval()
        self.tokenizer = load_tokenizer(directory / "tokenizer")

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        texts = [normalize_query(query) for query in model_input["query"]]
        pieces = encode(self.tokenizer, texts, self.max_tokens)
        with torch.inference_mode():
            inputs = query_inputs(self.tokenizer, pieces)
            return self.encoder.encode_queries(inputs).numpy()


mlflow.models.set_model(QueryEncoder())
