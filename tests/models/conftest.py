"""Small BERTs, and one thread for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertPreTrainedModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved_bert(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[type[BertPreTrainedModel]], Path]:
    """Saves a BERT of some class: three layers, random weights with spread-out norms and biases."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )

    def save(kind: type[BertPreTrainedModel]) -> Path:
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        directory = tmp_path_factory.mktemp("bert")
        model.save_pretrained(directory)
        return directory

    return save
