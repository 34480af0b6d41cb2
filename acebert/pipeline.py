"""The stages in their order. Each function makes what is missing before its own stage."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from acebert.cluster import connect
from acebert.config import NO_FILES, Settings, weights_digest
from acebert.data.cnn_labels import label_photos
from acebert.data.demo import build_demo
from acebert.data.earlier import Earlier, product_ids, stage_key
from acebert.data.ingest import ingest
from acebert.data.partitions import plan
from acebert.data.plan_figure import draw_plan
from acebert.data.preprocess import preprocess
from acebert.data.tokens import tokenize, vocabulary
from acebert.errors import UserError
from acebert.evaluation.embed import embed
from acebert.evaluation.evaluate import BASELINES, evaluate_baselines, evaluate_embeddings
from acebert.evaluation.look_inside import SUSPICIOUS, look_inside
from acebert.evaluation.mine import mine
from acebert.evaluation.teach import teach
from acebert.evaluation.testset import evaluation_queries
from acebert.model_settings import model_settings
from acebert.models.encoder import CEBertConfig, backbone_config
from acebert.serving.bundle import ProductTable, build_bundle, bundle_queries
from acebert.serving.onnx_export import export
from acebert.serving.student_table import TEACHER, students_table
from acebert.tracking import DATA_TAG, MODEL_TAG, finished_run, shared, start_run
from acebert.training.distill import distill, student_layers
from acebert.training.finetune import finetune
from acebert.training.pretrain import pretrain
from acebert.training.train_cnn import WEIGHTS, crop_settings, train_cnn
from acebert.workdir import STAGE_FILE, Stage, lock_file, run_stage

log = logging.getLogger(__name__)

KEPT_WEIGHTS = "weights"
"""the one stage that is not made again when it is removed: models name its files"""


@dataclass(frozen=True)
class Catalogue:
    """The stages that come before training; `features` is None for a text-only model."""

    ingested: Stage
    tokens: Stage
    features: Stage | None


@dataclass(frozen=True)
class Refresh:
    """For a service, of a new day: all days of the log, none held out; and what `earlier` has
    already is not computed again."""

    earlier: Earlier | None


def demo_stage(settings: Settings) -> Stage:
    return tracked(settings, build_demo(settings))


def ingest_stage(settings: Settings, refresh: Refresh | None = None) -> Stage:
    """The validated catalogue and log: the user's, or the demo's."""
    products, impressions = settings.data.products, settings.data.impressions
    if products is None or impressions is None:
        demo = demo_stage(shared(settings))
        products, impressions = str(demo.path / "products.parquet"), str(demo.path / "impressions")
    hold_out = refresh is None
    return tracked(settings, ingest(settings, products, impressions, hold_out=hold_out))


def catalogue_stages(
    settings: Settings, tokenizer: Path | None = None, refresh: Refresh | None = None
) -> Catalogue:
    """`tokenizer`: a trained model's, for it alone.

    Raises:
        UserError: texts that are longer than the encoder's positions, before anything is read.
    """
    if tokenizer is None:
        _refuse_too_long(settings)
    ingested = ingest_stage(shared(settings), refresh)
    if tokenizer is None and settings.model.backbone is None:
        tokenizer = tracked(shared(settings), vocabulary(settings, ingested)).path
    tokens = tracked(settings, tokenize(settings, ingested, tokenizer))
    features = None
    if settings.reads_images:
        settings = with_own_cnn(settings)
        connect()
        features = tracked(settings, preprocess(settings, ingested))
    return Catalogue(ingested, tokens, features)


def _refuse_too_long(settings: Settings) -> None:
    backbone, text = settings.model.backbone, settings.text
    config = backbone_config(backbone) if backbone else CEBertConfig()
    lists = 0 if settings.model.hot_queries == "off" else settings.data.hot_queries
    longest = 2 + max(text.title_tokens + lists * (text.query_tokens + 1), text.query_tokens)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"texts of up to {longest} tokens; the encoder has {config.max_position_embeddings} "
            f"positions: lower --text.title_tokens {text.title_tokens}, --text.query_tokens "
            f"{text.query_tokens}" + (f" or --data.hot_queries {lists}" if lists else "")
        )


def cnn_stage(settings: Settings) -> Stage:
    """The patch CNN, trained on the catalogue."""
    _refuse_uneven(settings, "cnn")
    before = shared(settings)
    ingested = ingest_stage(before)
    connect()
    crops = tracked(before, preprocess(crop_settings(settings), ingested))
    labels = tracked(before, label_photos(settings, ingested, crops))
    return train_cnn(settings, ingested, crops, labels)


def _refuse_uneven(settings: Settings, section: str) -> None:
    """
    Raises:
        UserError: batches of this training that the workers cannot share.
    """
    if problem := settings.not_shared(section):
        raise UserError(f"--{problem}")


def with_own_cnn(settings: Settings) -> Settings:
    """A file of the CNN's weights, or those that `image.cnn_weights trained` stands for (trained
    first where they are not there), as a file that the work directory keeps. A model that is
    trained with it names that file, so it finds its features whatever becomes of the first one."""
    weights = settings.image.cnn_weights
    if settings.trains_cnn:
        weights = str(cnn_stage(shared(settings)).path / WEIGHTS)
    elif not settings.model.patches or weights in NO_FILES or not Path(weights).is_file():
        return settings
    kept = _kept(settings.workdir, Path(weights))
    image = settings.image.model_copy(update={"cnn_weights": str(kept)})
    return settings.model_copy(update={"image": image})


def _kept(workdir: Path, weights: Path) -> Path:
    """The work directory's own copy of a file, named by its SHA-256."""
    if weights.is_relative_to(workdir / KEPT_WEIGHTS):
        return weights
    digest = weights_digest(str(weights))
    name = f"{digest}{weights.suffix}"

    def build(out: Path) -> None:
        shutil.copyfile(weights, out / name)

    return run_stage(workdir, KEPT_WEIGHTS, {"sha256": digest}, build).path / name


def plan_stage(settings: Settings) -> Stage:
    ingested = ingest_stage(shared(settings))
    connect()
    return tracked(settings, plan(settings, ingested))


def plan_figure_stage(settings: Settings) -> Stage:
    """A picture of the plan's batches, which need not have been planned."""
    return tracked(settings, draw_plan(settings, ingest_stage(shared(settings))))


def pretrain_stage(settings: Settings) -> Stage:
    """The directory of a pre-trained CE-BERT."""
    _refuse_uneven(settings, "pretrain")
    settings = with_own_cnn(settings)
    data = catalogue_stages(shared(settings))
    connect()
    return pretrain(settings, data.ingested, data.tokens, data.features)


def look_inside_stage(settings: Settings, pretrained: Stage) -> Stage:
    """What a pre-trained CE-BERT that reads photos makes of them: a page and a list."""
    data = catalogue_stages(shared(settings))
    if data.features is None:
        raise ValueError("a model that reads no photos has nothing to be looked at")
    connect()
    stage = look_inside(settings, pretrained, data.ingested, data.tokens, data.features)
    return tracked(settings, stage, tags={DATA_TAG: data.ingested.digest})


@dataclass(frozen=True)
class Inputs:
    """The stages that fine-tuning reads."""

    data: Catalogue
    planned: Stage
    pretrained: Stage | None
    mined: Stage | None


def before_finetuning(settings: Settings) -> Inputs:
    """All that comes before fine-tuning by these settings, which may be trainings too."""
    settings = with_own_cnn(shared(settings))
    return Inputs(
        catalogue_stages(settings),
        plan_stage(settings),
        pretrain_stage(settings) if settings.model.start == "pretrain" else None,
        mine_stage(settings) if settings.loss.hard_negatives else None,
    )


def finetune_stage(settings: Settings) -> Stage:
    """The model directory."""
    settings = with_own_cnn(settings)
    before = before_finetuning(settings)
    connect()
    data = before.data
    stages = data.ingested, data.tokens, data.features, before.planned
    return finetune(settings, *stages, before.pretrained, before.mined)


def mine_stage(settings: Settings) -> Stage:
    """Products near the training queries for the model that `loss.hard_negatives_from` names, or
    for the one that these settings train without hard negatives."""
    model = settings.loss.hard_negatives_from
    if model is None:
        loss = settings.loss.model_copy(update={"hard_negatives": 0})
        model = finetune_stage(shared(settings).model_copy(update={"loss": loss})).path
    miner = model_settings(settings, model)
    data = catalogue_stages(shared(miner), model / "tokenizer")
    connect()
    ranks = settings.loss.hard_negative_ranks
    return tracked(settings, mine(miner, model, data.ingested, data.tokens, data.features, ranks))


def embed_stage(
    settings: Settings, model: Path, queries: list[str], refresh: Refresh | None = None
) -> Stage:
    """Vectors of the whole catalogue and of `queries`, by a model directory."""
    settings = model_settings(settings, model)
    data = catalogue_stages(shared(settings), model / "tokenizer", refresh)
    connect()
    earlier = refresh.earlier if refresh else None
    stages = data.ingested, data.tokens, data.features
    return tracked(settings, embed(settings, model, *stages, queries, earlier))


def evaluate_stage(settings: Settings, model: Path) -> tuple[Stage, Stage]:
    """Vectors of a model directory, and its metrics on the test day."""
    settings = model_settings(settings, model)
    ingested = ingest_stage(shared(settings))
    embedded = embed_stage(shared(settings), model, evaluation_queries(settings, ingested))
    name = Path(settings.recipe).stem
    evaluated = evaluate_embeddings(settings, ingested, embedded.path, name)
    tags = {MODEL_TAG: str(model)}
    return embedded, tracked(settings, evaluated, row=True, tags=tags)


def distill_stages(settings: Settings, teacher: Path) -> tuple[list[Stage], Stage]:
    """A student for each of `distill.layers`, after the teacher itself, all with their ONNX files;
    and the table that compares them. `settings` are the teacher's, but for `distill` and what
    no model brings."""
    _refuse_uneven(settings, "distill")
    students = student_layers(settings, teacher)  # refuses before the first is trained
    ingested = ingest_stage(shared(settings))
    embedded = embed_stage(shared(settings), teacher, evaluation_queries(settings, ingested))
    connect()
    targets = tracked(shared(settings), teach(settings, teacher, ingested, embedded))
    exports = {TEACHER: export(settings, teacher)}
    for layers in students:
        student = distill(settings, teacher, layers, targets)
        alias = f"{settings.tracking.alias}-{layers}-layers"
        exports[f"{layers} layers"] = export(settings, student.path, alias)
    table = tracked(settings, students_table(settings, ingested, targets, exports))
    return list(exports.values()), table


def bundle_stage(
    settings: Settings, model: Path, query_encoder: Path, refresh: Refresh | None = None
) -> Stage:
    """What the service needs of a model directory and a query encoder that fits it."""
    settings = model_settings(settings, model)
    whole = settings.eval.model_copy(update={"dimensions": None})  # as the encoders make them
    settings = settings.model_copy(update={"eval": whole})
    ingested = ingest_stage(shared(settings), refresh)
    hot = bundle_queries(ingested, settings.serve.hot_queries)
    embedded = embed_stage(shared(settings), model, hot, refresh)
    earlier = refresh.earlier.bundle if refresh and refresh.earlier else None
    stages = ingested, embedded
    return tracked(settings, build_bundle(settings, model, query_encoder, *stages, earlier))


def refreshed_bundle_stage(
    settings: Settings,
    model: Path,
    query_encoder: Path,
    before: Path | None,
    max_gone_share: float,
) -> Stage:
    """A new day's bundle in place of `before`, the one that is published, if one is.

    Raises:
        UserError: more than this share of the products, the photos or the log's clicks of `before`
            is not there any more: it is told before a bundle is made, for a service may take the
            newest bundle of a model.
    """
    refresh = Refresh(Earlier.of_bundle(before) if before else None)
    if before is not None and before.is_dir():
        ingested = ingest_stage(shared(model_settings(settings, model)), refresh)
        known = ProductTable(before).product_ids()
        now = set(product_ids(ingested.path).to_pylist())
        gone = {"products": (sum(name not in now for name in known), len(known))}
        try:
            had = _photos_and_clicks(before.parents[1] / "ingest" / stage_key(before)["ingest"])
        except (OSError, LookupError) as error:
            log.warning("refresh: photos and clicks are not compared with %s: %s", before, error)
        else:
            has = _photos_and_clicks(ingested.path)
            gone |= {name: (count - has[name], count) for name, count in had.items()}
        shares = {
            f"{lost:,} of the {count:,} {name}": lost / count
            for name, (lost, count) in gone.items()
            if lost > max_gone_share * count
        }
        if shares:
            data = settings.data
            raise UserError(
                f"{data.products or 'the demo'}, {data.impressions or 'its log'}: "
                f"{', '.join(shares)} behind what is published are not there; is the export whole? "
                "Nothing was published. If they are gone, --max_gone_share "
                f"{max(shares.values()) + 0.01:.2f} allows it (now {max_gone_share:g})"
            )
    return bundle_stage(settings, model, query_encoder, refresh)


def _photos_and_clicks(ingested: Path) -> dict[str, int]:
    """How many an ingest has, held-out days too.

    Raises:
        OSError: it is gone.
    """
    report = json.loads((ingested / "report.json").read_text())
    products = report["products"]
    clicks = sum(counts["clicks"] for counts in report["splits"].values())
    return {"photos": products["rows_kept"] - products["without_image"], "clicks": clicks}


def baselines_stage(settings: Settings) -> Stage:
    """Metrics of the rows that need no training, each a run of its own."""
    stage = evaluate_baselines(settings, ingest_stage(shared(settings)))
    for name in BASELINES:
        of_row = replace(stage, path=stage.path / name, digest=f"{stage.digest}/{name}")
        tracked(settings, of_row, row=True, name=name)
    return stage


def tracked(
    settings: Settings,
    stage: Stage,
    *,
    row: bool = False,
    name: str | None = None,
    tags: Mapping[str, str] = {},
) -> Stage:
    """Note a stage as an MLflow run, with what it wrote to be seen. One that is reused has its run,
    unless the job that built it was stopped in between; so has one that was removed and built
    again. A `row` has a run for each table (the tag) that it stands in."""
    table = settings.tracking.tag if row else None
    whole = stage.digest.partition("/")[0]
    with FileLock(lock_file(settings.workdir, stage.name, whole)):  # several may have waited for it
        if finished_run(settings, stage.name, stage.digest, table, here=not stage.reused):
            return stage
        started = time.time() - stage.seconds
        data = _data_of(stage)
        all_tags = {**tags, **({DATA_TAG: data} if data else {})}
        with start_run(
            settings, stage.name, stage.digest, name=name, tags=all_tags, started=started
        ) as run:
            run.log_metrics({"seconds": stage.seconds, **_numbers(stage.path)})
            for path in sorted(stage.path.rglob("*")):
                seen = path.suffix in {".png", ".json", ".html"} or path.name == SUSPICIOUS
                if seen and "tokenizer" not in path.parts:
                    below = path.parent.relative_to(stage.path)
                    run.log_artifact(path, None if below == Path(".") else str(below))
    return stage


def _data_of(stage: Stage) -> str | None:
    """Digest of the ingest that a stage, or the stage that it is a row of, was made of."""
    if stage.name == "ingest":
        return stage.digest
    whole = stage.path if (stage.path / STAGE_FILE).is_file() else stage.path.parent
    return stage_key(whole).get("ingest")


def _numbers(directory: Path) -> dict[str, float]:
    """Numbers of the stage's report.json and metrics.json, nested names joined by a slash."""
    out: dict[str, float] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, below in value.items():
                walk(f"{prefix}/{name}" if prefix else _metric_name(name), below)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[_metric_name(prefix)] = float(value)

    for path in [*directory.glob("report.json"), *directory.rglob("metrics.json")]:
        below = "/".join(path.parent.relative_to(directory).parts)
        walk(below, json.loads(path.read_text()))
    return out


def _metric_name(name: str) -> str:
    """What MLflow allows in a metric's name."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
