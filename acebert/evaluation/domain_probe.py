"""How far queries and products are told apart: a fresh domain classifier on frozen vectors.

The adversary's own accuracy may only say that the adversary is weak.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 20


def domain_probe(
    queries: NDArray[np.float32], products: NDArray[np.float32], seed: int = 0
) -> dict[str, float]:
    """Held-out accuracy of fresh classifiers that tell queries from products.

    As many of either, each vector once (equal titles have equal vectors), half to train on.

    Args:
        queries, products: vectors [Q, d], [n, d]

    Returns:
        `linear`: logistic regression; `mlp`: one hidden layer of 128; `points`: held out. With
        fewer than LEAST vectors of a side, `points` 0 alone
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    queries, products = (np.unique(v, axis=0) for v in (queries, products))
    n = min(len(queries), len(products))
    if n < LEAST:
        return {"points": 0}
    x = np.concatenate([rng.permutation(queries)[:n], rng.permutation(products)[:n]])
    y = np.repeat([1, 0], n)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.5, stratify=y, random_state=seed
    )
    probes: dict[str, Any] = {
        "linear": LogisticRegression(max_iter=2000),
        "mlp": MLPClassifier((128,), early_stopping=True, max_iter=200, random_state=seed),
    }
    found = {
        name: float(
            make_pipeline(StandardScaler(), probe).fit(train_x, train_y).score(test_x, test_y)
        )
        for name, probe in probes.items()
    }
    return {**found, "points": len(test_y)}
