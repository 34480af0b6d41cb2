"""What patch features tell of a photo: a linear probe of them, for several weights of the CNN.

    python benchmarks/cnn_probe.py --weights random W/cnn/…/cnn.safetensors --photos 4000 \\
        --recipe cebert_tiny --workdir W --data.products … --data.impressions …

The mean of a photo's 16 patch features goes through a logistic regression, fitted on photos that
the CNN was trained on and measured on those that it never saw (`cnn.held_out`): accuracy of the
category, and of the colour where the title names one.
"""

import argparse
import time

import cv2
import numpy as np
from matplotlib.colors import CSS4_COLORS
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from acebert.cluster import connect
from acebert.config import load_settings
from acebert.data.cnn_labels import PhotoLabels, label_photos
from acebert.data.features import FeatureStore
from acebert.data.patches import PatchCNN, best_device
from acebert.data.preprocess import preprocess
from acebert.job import run_job
from acebert.pipeline import ingest_stage
from acebert.training.train_cnn import crop_settings

NONE = -1


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    ingested = ingest_stage(settings)
    connect()
    crops = preprocess(crop_settings(settings), ingested)
    labels = PhotoLabels(label_photos(settings, ingested, crops).path)
    rng = np.random.default_rng(settings.seed)
    train = np.sort(rng.permutation(labels.train)[: arguments.photos])
    held_out = np.asarray(labels.held_out)
    side = settings.image.cnn_side
    photos = [crops_at(FeatureStore(crops.path), rows, side) for rows in (train, held_out)]
    print(f"{len(train)} photos fitted on, {len(held_out)} held out\n")
    print("| weights | category | colour | photos/s |\n|---|---|---|---|")
    for weights in arguments.weights:
        cnn = PatchCNN(settings.image.cnn, weights, side, settings.image.cnn_batch)
        cnn.to(best_device())
        start = time.perf_counter()
        features = [cnn(pictures).mean(axis=1, dtype=np.float32) for pictures in photos]
        rate = (len(train) + len(held_out)) / (time.perf_counter() - start)
        scores = [
            probe(features, [of(labels, rows) for rows in (train, held_out)])
            for of in (category, colour)
        ]
        print(f"| {weights} | {scores[0]} | {scores[1]} | {rate:.0f} |", flush=True)


def crops_at(store: FeatureStore, rows: np.ndarray, side: int) -> np.ndarray:
    """Crops of product rows as preprocessing shows them to the CNN, uint8 [n, side, side, 3]."""
    return np.stack([cv2.resize(crop, (side, side)) for crop in store.pixels(rows)])


def category(labels: PhotoLabels, rows: np.ndarray) -> np.ndarray:
    return labels.category[rows]


def colour(labels: PhotoLabels, rows: np.ndarray) -> np.ndarray:
    """The tag of the commonest colour word that the title names, NONE without one."""
    colours = np.array([i for i, word in enumerate(labels.tags) if word in CSS4_COLORS], int)
    if not len(colours):
        return np.full(len(rows), NONE)
    named = labels.named_in_title(rows)[:, colours]
    return np.where(named.any(axis=1), colours[named.argmax(axis=1)], NONE)


def probe(features: list[np.ndarray], targets: list[np.ndarray]) -> str:
    """Accuracy on the second set of a regression fitted on the first, where there is a target; '-'
    where there is nothing to tell apart."""
    known = [target != NONE for target in targets]
    if len(np.unique(targets[0][known[0]])) < 2 or not known[1].any():
        return "-"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    model.fit(features[0][known[0]], targets[0][known[0]])
    return f"{model.score(features[1][known[1]], targets[1][known[1]]):.3f}"


if __name__ == "__main__":
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--weights", nargs="+", default=["random"], help="as image.cnn_weights")
    extra.add_argument("--photos", type=int, default=4000, help="photos to fit on")
    run_job(work, __doc__, extra)
