"""A student: the teacher's product side as it is, and a smaller query side (paper section 4.7).

It is a dual encoder with a query tower of its own, so that whatever reads a model directory reads
a student's, and the products' vectors stay those that the index holds.
"""

import torch
from torch import Tensor

from acebert.errors import UserError
from acebert.models.dual import DualEncoder, Tower
from acebert.models.encoder import CEBertConfig, CEBertModel, seeded

WORDS = "encoder.embeddings.word_embeddings.weight"


def new_student(
    teacher: DualEncoder, layers: int, width: int | None = None, seed: int = 0
) -> DualEncoder:
    """A student at its start weights.

    Of the teacher's width it has its embeddings, first `layers` layers and projection: with all
    layers it is the teacher. A narrower one has random layers on the principal components of the
    teacher's word table. It has no dropout: its targets are a function of the text, without noise.

    Raises:
        UserError: more layers than the teacher has, or a width that its heads do not divide.
    """
    source = teacher.query_tower or teacher.tower
    config = source.encoder.config
    if not 1 <= layers <= config.num_hidden_layers:
        raise UserError(
            f"--distill.layers {layers}: the teacher has {config.num_hidden_layers} layers; a "
            "student has 1 to as many"
        )
    own = {
        "num_hidden_layers": layers,
        "patch_dim": 0,
        "pixel_side": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    D = config.hidden_size
    narrower = width is not None and width != D
    if narrower:
        assert width is not None
        of_a_head = D // config.num_attention_heads
        if width > D or width % of_a_head:
            raise UserError(
                f"--distill.width {width}: the teacher is {D} wide, in heads of {of_a_head}; a "
                f"student's width is a multiple of {of_a_head} below {D}"
            )
        own |= {
            "hidden_size": width,
            "num_attention_heads": width // of_a_head,
            "intermediate_size": config.intermediate_size * width // D,
            "initializer_range": width**-0.5,
        }
    with seeded(seed):
        encoder = CEBertModel(CEBertConfig(**{**config.to_dict(), **own}))
        tower = Tower(encoder, source.projection.out_features)
    state, start = tower.state_dict(), source.state_dict()
    state |= {name: start[name] for name in state if state[name].shape == start[name].shape}
    if narrower:
        state[WORDS] = _principal(start[WORDS], state[WORDS].shape[1])
    tower.load_state_dict(state)
    return DualEncoder(teacher.tower, tower, gamma=float(teacher.gamma))


@torch.no_grad()
def _principal(table: Tensor, components: int) -> Tensor:
    """[n, D] → its first principal components [n, c], as large in the mean square as the table."""
    centred = table - table.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    reduced = centred @ directions[:, -components:]
    return reduced * (table.square().mean() / reduced.square().mean()).sqrt()
