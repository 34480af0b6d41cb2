"""The 'look_inside' stage: what a pre-trained CE-BERT makes of photos, on one page and as a list.

* `suspicious.parquet`: every product with a title and a photo, those first whose two TIP believes
  the least (Fig. 1a's mismatch): product_id, title, category, match (probability, float32).
* `page.html`: for some held-out products the words that it guesses with the right photo, with
  another one and with none, and the top of that list, with the photos. It stands alone.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from acebert.cluster import encoder_pool, node_resources
from acebert.config import Settings
from acebert.data.feature_cache import without_copy
from acebert.data.features import FeatureStore
from acebert.data.preprocess import crop_spec
from acebert.data.tokens import Ragged, load_tokenizer
from acebert.evaluation.look_inside_page import Example, Guess, PagePhotos, write_page
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.pretraining import CEBertForPreTraining
from acebert.training.pairs import InputStore, StagePaths
from acebert.training.pretrain_batches import PretrainBatches
from acebert.training.pretrain_pairs import NO_PHOTO
from acebert.training.pretrain_validation import OTHER, OWN, HeldOut
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 2
SUSPICIOUS = "suspicious.parquet"
ROWS_A_TASK = 4096
EXAMPLES, SUSPECTS = 8, 24
TOP = 3  # guesses shown for a word


def look_inside(
    settings: Settings, pretrained: Stage, ingested: Stage, tokens: Stage, features: Stage
) -> Stage:
    """Score the catalogue's title-photo pairs on Ray Data and draw the page."""
    key = {
        "version": VERSION,
        "pretrain": pretrained.digest,
        "features": features.digest,
        "precision": settings.train.precision,
    }
    paths = StagePaths(ingested.path, tokens.path, features.path)

    def build(out: Path) -> None:
        products, match = score_matches(settings, pretrained.path, paths)
        suspects = write_suspicious(paths, products, match, out)
        examples = draw_examples(settings, pretrained.path, paths)
        report = json.loads((pretrained.path / "report.json").read_text())
        photos = PagePhotos(crop_spec(settings), ingested.path / "products", features.path)
        write_page(out / "page.html", report["held_out"], examples, suspects, photos)

    return run_stage(settings.workdir, "look_inside", key, build)


def score_matches(
    settings: Settings, model: Path, paths: StagePaths
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Products that have a title and a photo [n], and TIP's probability that they match [n]."""
    assert paths.features is not None
    titles = Ragged.load(paths.tokens, "titles")
    rows = np.arange(len(titles))
    pictured = FeatureStore(paths.features).has_image(rows)
    products = rows[pictured & (titles.lengths(rows) > 0)]
    by_length = products[np.argsort(titles.lengths(products), kind="stable")]
    blocks = [
        pa.table({"product": part})
        for part in np.array_split(by_length, max(1, len(by_length) // ROWS_A_TASK))
    ]
    pool = encoder_pool(settings.eval.num_actors, node_resources())
    scored = ray.data.from_arrow(blocks).map_batches(
        _Matcher,
        fn_constructor_args=(settings, model, paths, pool.threads),
        batch_size=settings.eval.batch_size,
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_gpus=pool.num_gpus,
        num_cpus=pool.num_cpus,
    )
    log.info("look_inside: title-photo matching of %d products", len(products))
    match = np.zeros(len(titles), np.float32)
    for batch in scored.iter_batches(batch_size=ROWS_A_TASK):
        match[batch["product"]] = batch["match"]
    return products, match[products]


class _Matcher:
    """One actor: TIP's probability of products' own photos."""

    def __init__(self, settings: Settings, model: Path, paths: StagePaths, threads: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.model: Any = CEBertForPreTraining.from_pretrained(model).eval()
        self.model.to(self.device)
        self.bf16 = settings.train.precision == "bf16"
        self.inputs = InputStore(settings, paths)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        text, image = self.inputs.products(batch["product"], None)
        assert image is not None
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            logits = self.model.match(text.to(self.device), image.to(self.device))
        return {"product": batch["product"], "match": logits.float().sigmoid().cpu().numpy()}


def write_suspicious(
    paths: StagePaths, products: NDArray[np.int64], match: NDArray[np.float32], out: Path
) -> list[tuple[int, str, float]]:
    """Write `out`/suspicious.parquet, least likely first; its top as (product, title, match)."""
    parts = sorted((paths.ingest / "products").glob("part-*.parquet"))
    columns = ["product_id", "title", "category"]
    table = ds.dataset(parts).to_table(columns=columns).take(pa.array(products))
    order = np.argsort(match, kind="stable")
    table = table.append_column("match", pa.array(match)).take(pa.array(order))
    pq.write_table(table, out / SUSPICIOUS)
    top = zip(
        products[order].tolist(),
        table["title"].to_pylist()[:SUSPECTS],
        table["match"].to_pylist()[:SUSPECTS],
        strict=False,
    )
    return [(product, title, match) for product, title, match in top]


@torch.inference_mode()
def draw_examples(settings: Settings, model: Path, paths: StagePaths) -> list[Example]:
    """What the model guesses for each word of some held-out titles, one masked at a time."""
    here = without_copy(settings)
    batches = PretrainBatches(here, paths, rank=0, world=1)
    sample = HeldOut(batches)
    lent = np.flatnonzero(sample.photos[OTHER] != NO_PHOTO)
    lent = lent[np.unique(sample.products[lent], return_index=True)[1]]  # each product once
    chosen = lent[np.linspace(0, len(lent) - 1, min(EXAMPLES, len(lent))).astype(int)]
    bert = CEBertForPreTraining.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    inputs = InputStore(here, paths)
    examples = []
    for row in chosen:
        product, other = int(sample.photos[OWN][row]), int(sample.photos[OTHER][row])
        text, own = inputs.products(np.array([product]), None)
        assert own is not None
        shown = {"own": own, "other": inputs.images(np.array([other])), "none": None}
        ids = text.input_ids[0]
        places = torch.arange(1, len(ids) - 1)  # not [CLS] and [SEP]
        masked = ids.repeat(len(places), 1)
        masked[torch.arange(len(places)), places] = batches.vocabulary.mask
        guesses: list[dict[str, list[Guess]]] = [{} for _ in places]
        match = {}
        for name, image in shown.items():
            for place, p in enumerate(_words(bert, masked, places, image)):
                top = p.topk(TOP)
                words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
                true = float(p[ids[places[place]]])
                guesses[place][name] = [
                    Guess(word, float(value), true)
                    for word, value in zip(words, top.values, strict=True)
                ]
            if image is not None:
                match[name] = float(bert.match(text, image).sigmoid())
        pieces = ids[places].tolist()
        words = [str(tokenizer.convert_ids_to_tokens(piece)) for piece in pieces]
        title = str(tokenizer.decode(pieces))
        examples.append(Example(product, other, title, words, guesses, match))
    return examples


def _words(
    bert: CEBertForPreTraining,
    masked: torch.Tensor,
    places: torch.Tensor,
    image: ImageInputs | None,
) -> torch.Tensor:
    """Probabilities of all words where each row [P, L] is masked, [P, vocabulary]."""
    rows = torch.zeros(len(masked), dtype=torch.int64)
    text = TextInputs(masked, torch.ones_like(masked, dtype=torch.bool), torch.zeros_like(masked))
    states = bert.ce_bert.first_states(
        text, None if image is None else image.rows(rows), masked.shape[1]
    )
    return bert.cls(states[torch.arange(len(masked)), places]).softmax(dim=-1)
