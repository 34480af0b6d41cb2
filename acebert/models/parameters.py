"""Parameters in the groups that AdamW wants them in."""

from collections.abc import Collection

from torch import nn


def adamw_groups(
    model: nn.Module,
    new: Collection[str],
    lr: float,
    new_layer_lr_factor: float,
    weight_decay: float,
) -> list[dict[str, object]]:
    """What did not come from the backbone (`new`, by name) learns at `new_layer_lr_factor` times
    `lr`; only matrices of linear layers decay, not biases, norms, embeddings and scalars."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and id(parameter) not in embeddings
        groups.setdefault((name in new, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (new_layer_lr_factor if is_new else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_new, decays), parameters in groups.items()
    ]
