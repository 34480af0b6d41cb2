"""All settings: one typed tree, filled from a recipe (YAML) and the command line.

    settings = load_settings(["--recipe", "acebert_tiny", "--train.batch_size", "128"])

* A leaf is named by its path: `train.batch_size` in YAML is `--train.batch_size` on the command
  line, which wins. `--help` prints every leaf with its default and unit.
* An unknown key, a wrong type or settings that contradict each other raise `UserError` naming
  the key. No environment variable changes a result; `ACEBERT_HOME` says where results lie.
* A recipe may `include` others; later ones win over earlier ones, its own keys over all.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from difflib import get_close_matches
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from acebert.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "acebert_tiny"
DEFAULT_WORKDIR = "$ACEBERT_HOME, else ~/.acebert"
HOW_TO_GIVE = (
    "On the command line a list is `--eval.ks 10 50` or `--eval.ks 10,50`, a mapping "
    "`--data.columns product_id=sku title=name`; none is the word `none`."
)

NO_FILES = ("hub", "random", "trained")
"""words for a CNN's weights that name no file, whatever lies in the current directory"""
HOW_IT_RUNS = frozenset(
    {
        *("micro_batch", "num_workers", "min_workers", "use_gpu", "cpus_per_worker"),
        *("threads_per_worker", "max_failures", "wait_minutes"),
        *("checkpoint_every", "checkpoints_kept"),
    }
)
"""leaves of `train` that do not belong in a stage's key: a run goes on when they change"""
COPIED_SOURCE = "runtime_resources/working_dir_files"
"""part of the path of the directory that `ray job submit` copies the source to"""


def absolute(path: Path) -> Path:
    """
    Raises:
        ValueError: `path` is relative, in a submitted job.
    """
    path = path.expanduser()
    if not path.is_absolute() and COPIED_SOURCE in str(Path.cwd()):
        raise ValueError(
            f"{path} is relative: in a submitted job it would lie in Ray's copy of the source, "
            "which is removed. Give an absolute path, or a URI where one is taken"
        )
    return path.absolute()


def _address(value: str | None) -> str | None:
    if value == "":
        raise ValueError("it is empty: a path or URI, or none")
    return value if value is None or "://" in value else str(absolute(Path(value)))


def _name_or_path(value: str | None) -> str | None:
    """A path is made absolute, so that a model can be used from any directory later."""
    if value is None or not Path(value).expanduser().exists():
        return value
    return str(absolute(Path(value)))


def _weights(value: str) -> str:
    return value if value in NO_FILES else str(absolute(Path(value)))


def weights_digest(weights: str) -> str:
    """SHA-256 of a file of weights, wherever it lies; words of NO_FILES are themselves."""
    if weights in NO_FILES or not Path(weights).is_file():
        return weights
    with open(weights, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def computes_in_bf16(cpuinfo: str) -> bool:
    """Whether a machine with this /proc/cpuinfo has instructions for bf16 products (AVX-512 BF16,
    AMX, or Arm's). Without them torch emulates it, eight times slower than fp32."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return bool(flags and {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags[1].split()))


def _resolved(precision: str) -> str:
    if precision != "auto":
        return precision
    cpuinfo = Path("/proc/cpuinfo")
    fast = cpuinfo.exists() and computes_in_bf16(cpuinfo.read_text())
    return "bf16" if fast or Path("/proc/driver/nvidia/version").exists() else "fp32"


Address = Annotated[str | None, AfterValidator(_address)]
CNNWeights = Annotated[str, AfterValidator(_weights)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""what numpy and torch both take"""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DemoSettings(Section):
    """The catalogue that is drawn when no `data.products` is given."""

    products: int = Field(1000, ge=20)
    """products to draw"""
    searches_per_day: int = Field(3000, ge=1)
    """searches a day"""
    days: int = Field(5, ge=3)
    """days of search log: the last is the test day, the one before it the validation day"""
    image_side: int = Field(160, ge=32, le=2048)
    """side of a product photo [px]"""
    seed: Seed = 0
    """seed of the catalogue and its log (apart from the training seed)"""


class DataSettings(Section):
    """What to read, how to split it, and what counts as a bad row."""

    products: Address = None
    """products: a Parquet, CSV or JSON-lines file, a directory of them, or a URI (none: the demo
    catalogue)"""
    impressions: Address = None
    """search log: file, directory or URI, one row for each product shown"""
    valid_impressions: Address = None
    """validation log of its own, for a log without timestamps"""
    test_impressions: Address = None
    """test log of its own, for a log without timestamps"""
    test_from: date | None = None
    """the test day, YYYY-MM-DD; rows after it are left out (none: the last day of the log).
    The day before it validates, all earlier days train"""
    columns: dict[str, str] = {}
    """our column name → the name in your files: product_id=sku,query=term"""
    max_bad_share: float = Field(0.1, ge=0, le=1)
    """stop when more than this share of the products, or of the impressions, is quarantined"""
    robot_clicks_per_minute: int = Field(60, ge=1)
    """a user with more clicks in one minute is a robot; its rows of that split and of later ones
    are left out"""
    robot_same_click: int = Field(20, ge=1)
    """a user who clicks one product for one query more often in a day is a robot"""
    hot_queries: int = Field(10, ge=1)
    """most clicked queries kept for a product (paper section 3.2: at most 10)"""
    memory_limit: str = "2GB"
    """memory that ingest may take before it spills to the disk of the work directory"""


class ImageSettings(Section):
    """From a photo to patch features and pixels (paper section 2.1)."""

    roi: bool = True
    """cut patches from the region of interest found by edge detection, else the whole photo"""
    cnn: str = "resnext101_32x8d"
    """timm name of the CNN behind the patch features"""
    cnn_weights: CNNWeights = "hub"
    """`hub` (timm's pretrained weights), `random`, a .safetensors file of the CNN's weights, or
    `trained`: those that these settings train on the catalogue (section `cnn`), first where they
    are missing"""
    cnn_side: int = Field(256, ge=128, multiple_of=128)
    """side to which the RoI is resized for the CNN, a multiple of 128 so that the 4×4 cells fall
    on its feature map's grid [px]"""
    cnn_batch: int = Field(16, ge=1)
    """photos in one forward of the CNN"""
    pixel_source: Literal["roi", "photo"] = "roi"
    """what the pixel tokens show (paper: the photo)"""
    pixel_side: int = Field(224, ge=32)
    """side to which it is resized [px]; seven pixel patches a side"""
    pixel_format: Literal["raw", "jpeg"] = "raw"
    """stored uncompressed, or as JPEG (smaller, decoded when read)"""
    max_megapixels: float = Field(50, gt=0)
    """a photo that claims to be larger is treated as broken [10^6 px]"""
    feature_cache: Literal["none", "node_disk", "node_memory", "device"] = "none"
    """where training reads features: from the work directory, from a copy on the node's disk or in
    its memory, made once a node and shared by its workers, or from the worker's own GPU"""
    feature_cache_dir: Annotated[
        Path | None, AfterValidator(lambda path: path and absolute(path))
    ] = None
    """directory of the node's copies (none: acebert-UID in the node's $TMPDIR, for node_memory in
    /dev/shm)"""

    @field_validator("feature_cache", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """On the command line the word `none` is read as no value."""
        return "none" if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pixel_side % 7:
            raise ValueError(f"pixel_side must be a multiple of 7, got {self.pixel_side}")
        return self


class ScheduleSettings(Section):
    """Budget, learning rate and optimiser of a training."""

    epochs: int = Field(3, ge=1)
    """passes over what it trains on"""
    max_steps: int | None = Field(None, ge=1)
    """steps at most"""
    max_minutes: float | None = Field(None, gt=0)
    """training time at most [min]; the learning rate decays over whichever end comes first"""
    lr: float = Field(5e-5, gt=0)
    """peak learning rate of AdamW"""
    new_layer_lr_factor: float = Field(1.0, gt=0)
    """the learning rate of layers without start weights is this many times lr"""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decay, of matrices only"""
    warmup_steps: int = Field(100, ge=0)
    """steps of linear warm-up"""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """schedule after the warm-up"""


class CNNSettings(ScheduleSettings):
    """Training of the patch CNN on the catalogue itself, for `image.cnn_weights trained`. Workers,
    precision and clipping are those of `train`."""

    start: CNNWeights = "hub"
    """what it starts from: `hub` (timm's pretrained weights), `random`, or a .safetensors file"""
    side: int = Field(168, ge=56, multiple_of=28)
    """side that it trains at; about two thirds of image.cnn_side, for random crops show the
    product larger than it is [px]"""
    tags: int = Field(500, ge=0)
    """most frequent words of titles and training queries that it learns (0: categories alone)"""
    tag_products: int = Field(20, ge=1)
    """products that a word needs to be one of them"""
    tag_weight: float = Field(1.0, gt=0)
    """weight of the words' loss beside the category's"""
    unnamed_weight: float = Field(1.0, gt=0, le=1)
    """weight of a word that neither title nor clicked queries name: it is unknown, not absent"""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """share of the category's target that is spread over all categories"""
    held_out: float = Field(0.02, gt=0, lt=1)
    """share of the photos that is held out to measure on"""
    batch_size: int = Field(256, ge=2)
    """photos in a batch"""
    lr: float = Field(3e-4, gt=0)
    """peak learning rate of AdamW"""
    new_layer_lr_factor: float = Field(10.0, gt=0)
    """the learning rate of the two heads is this many times lr"""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decay, of matrices only"""
    decay: Literal["linear", "cosine", "constant"] = "cosine"
    """schedule after the warm-up"""
    seed: Seed = 0
    """seed of this training, apart from the fine-tuning's: its seeds share one CNN"""


class TextSettings(Section):
    """Tokens of titles and queries."""

    title_tokens: int = Field(32, ge=1)
    """longest title [tokens, without CLS and SEP]"""
    query_tokens: int = Field(12, ge=1)
    """longest query, on the query side and in a hot list [tokens]"""
    vocab_size: int = Field(8000, ge=100)
    """WordPiece vocabulary trained on titles and training queries, where model.backbone is none"""


class ModelSettings(Section):
    """The encoder (paper section 2) and its two uses as query and product side (section 3)."""

    backbone: Annotated[str | None, AfterValidator(_name_or_path)] = "bert-base-uncased"
    """start weights and vocabulary: a Hugging Face BERT by hub name or local directory, also one
    that pre-training wrote (none: random weights)"""
    start: Literal["backbone", "pretrain"] = "backbone"
    """what fine-tuning starts from: the backbone, or the CE-BERT that these settings pre-train,
    which is trained first where it is missing"""
    layers: int = Field(4, ge=1)
    """first layers of the backbone that are kept (paper: a 4-layer BERT)"""
    width: int = Field(768, ge=8)
    """hidden width of a random encoder; a backbone brings its own"""
    heads: int = Field(12, ge=1)
    """attention heads of a random encoder"""
    embedding_dim: int = Field(128, ge=1)
    """dimensions of the query and product embeddings (paper: 128)"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """dropout of hidden states and attention"""
    patches: bool = True
    """the product side reads 16 patch features"""
    pixels: bool = True
    """the product side reads 49 pixel tokens"""
    pooling: Literal["cls", "mean"] = "cls"
    """state that is projected: of CLS (paper), or the mean over the text's tokens"""
    image_attention_bias: float = 0.0
    """added to the attention score of every image token: below zero they enter gently (paper: 0).
    With start pretrain it is 0: there photos are nothing new"""
    hot_queries: Literal["off", "as_is", "other_days"] = "other_days"
    """hot queries on the product side. as_is (paper): the list of all training days, which holds
    most pairs' own query; other_days: clicks of the pair's own day are left out of its list"""
    hot_query_dropout: float = Field(0.15, ge=0, lt=1)
    """share of the pairs of a batch whose product comes without its list"""
    shared_towers: bool = True
    """one encoder for both sides (paper), else one each from the same start weights"""

    @field_validator("image_attention_bias")
    @classmethod
    def _of_the_start(cls, bias: float, info: ValidationInfo) -> float:
        """Resolved, as `train.precision` is, so that what is saved and told is what is trained."""
        images = info.data.get("patches") or info.data.get("pixels")
        return 0.0 if info.data.get("start") == "pretrain" and images else bias

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class PlanSettings(Section):
    """Mixed negative sampling (paper section 4.3)."""

    partitions: int | None = Field(None, ge=1)
    """partitions P of the training pairs (none: by batches_per_partition)"""
    batches_per_partition: float = Field(65.0, gt=0)
    """n/(P·W), the scale-free axis of Fig. 5 (paper: 25 million pairs, P=1000, W=384: 65). More
    categories than batches a partition: every batch holds few categories, and is hard"""


MAX_LEARNED_GAMMA = 100.0
"""as CLIP bounds its learned scale"""


class LossSettings(Section):
    """Semantic matching (paper Eq. 4-5)."""

    gamma: float = Field(20.0, gt=0)
    """smoothing γ of Eq. 4, the inverse temperature"""
    gamma_learned: bool = False
    """learn γ, starting there; it is 100 at most"""
    false_negatives: Literal["keep", "batch", "log"] = "log"
    """in-batch negatives that are clicked pairs are kept (paper), masked where the batch shows the
    click, or masked where the whole training log shows it"""
    popularity_correction: bool = False
    """subtract the log of each product's share of the training pairs from its in-batch scores
    (logQ), so that what is clicked more often ranks higher (paper: no)"""
    matryoshka_dims: tuple[int, ...] = ()
    """train the first so many dimensions, brought to length 1, as embeddings of their own too: the
    losses are added up, and `eval.dimensions` may cut the vectors there"""
    hard_negatives: int = Field(0, ge=0)
    """products added to the batch for each pair: near the query for a trained model, never clicked
    for it (paper: 0)"""
    hard_negative_ranks: tuple[int, int] = (11, 50)
    """ranks from which they are drawn, among the products never clicked for the query; the very
    first may be relevant, and not clicked because nobody saw them"""
    hard_negatives_from: Annotated[
        Path | None, AfterValidator(lambda path: path and absolute(path))
    ] = None
    """directory of the model whose ranks these are (none: the model of these settings without hard
    negatives, trained first where it is missing)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, last = self.hard_negative_ranks
        if not 1 <= first <= last:
            raise ValueError(f"hard_negative_ranks: 1 ≤ first ≤ last, got {first} and {last}")
        if self.gamma_learned and self.gamma > MAX_LEARNED_GAMMA:
            raise ValueError(f"gamma {self.gamma:g}: one that is learned is 100 at most")
        return self


class AdversarySettings(Section):
    """Domain classifier as adversary (paper section 3.3, Eq. 6-8)."""

    form: Literal["off", "minimax", "confusion"] = "minimax"
    """minimax: the encoder ascends the classifier's loss (paper); confusion: the encoder descends
    the cross-entropy to one half, which has a floor"""
    k: int = Field(5, ge=1)
    """encoder steps for one step of the domain classifier"""
    weight: float = Field(1.0, ge=0)
    """λ before the adversarial loss (paper: 1)"""
    ramp_steps: int = Field(0, ge=0)
    """encoder steps over which λ grows linearly from 0"""
    hidden: int = Field(128, ge=1)
    """hidden units of the classifier"""
    lr: float = Field(1e-3, gt=0)
    """learning rate of the classifier's own Adam"""


class PretrainSettings(ScheduleSettings):
    """Pre-training of CE-BERT with MLM, MPM and TIP (paper section 2.2). Workers, precision and
    clipping are those of `train`."""

    negatives: int = Field(3, ge=1)
    """pairs of a title and another product's photo for each matched pair (paper: 3)"""
    same_category_negatives: float = Field(0.0, ge=0, le=1)
    """share of these photos that is taken from the title's own category (paper: 0)"""
    patch_temperature: float = Field(1.0, gt=0)
    """T of a masked patch's target, softmax(feature/T); smaller is peakier (paper: 1)"""
    adaptive_loss: bool = False
    """weigh the three losses by FashionBERT's adaptive weights, else add them up (paper)"""
    queries: bool = False
    """masked words of the training queries too, each a row of its own"""
    held_out: float = Field(0.02, gt=0, lt=1)
    """share of the distinct titles that is held out to measure on"""
    valid_products: int = Field(2000, ge=2)
    """titles of these that a validation reads; where there are fewer, each under several masks"""
    validate_every: int = Field(1000, ge=1)
    """steps between validations"""
    batch_size: int = Field(96, ge=2)
    """titles and queries in a batch; a title comes 1 + negatives times"""
    lr: float = Field(2e-5, gt=0)
    """peak learning rate of AdamW (paper: 2e-5)"""
    warmup_steps: int = Field(10_000, ge=0)
    """steps of linear warm-up (paper: 10,000)"""
    seed: Seed = 0
    """seed of pre-training, apart from the fine-tuning's: its seeds share one start"""


class TrainSettings(ScheduleSettings):
    """Fine-tuning on Ray Train (paper: lr 5e-5)."""

    batch_size: int = Field(384, ge=2)
    """global batch W [pairs] (paper: 384)"""
    micro_batch: int | None = Field(None, ge=1)
    """queries or products encoded at a time on a worker, by gradient caching: activations of so
    many rows for any W, at the price of one more forward (none: all of them). The inputs of two
    batches are held beside, photos and all"""
    num_workers: int = Field(1, ge=1)
    """DDP workers; W must be divisible by them"""
    min_workers: int | None = Field(None, ge=1)
    """workers that training goes on with when nodes are lost, until there are more again (none:
    num_workers); W must be divisible by every number between"""
    use_gpu: bool | None = None
    """one GPU a worker (none: if the cluster has any)"""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs that Ray reserves for a worker (none: an equal share of 90 % of the cluster's)"""
    threads_per_worker: int | None = Field(None, ge=1)
    """torch threads of a CPU worker (none: cores of its node over workers)"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradients are clipped to this L2 norm"""
    precision: Annotated[Literal["auto", "fp32", "bf16"], AfterValidator(_resolved)] = Field(
        "auto", validate_default=True
    )
    """autocast of forward and backward; weights and optimiser stay fp32. auto: bf16 where the
    machine that starts the job has a GPU or bf16 instructions, else fp32"""
    compile: bool = False
    """torch.compile the encoder (on CPUs it needs a C++ compiler)"""
    validate_every: int = Field(200, ge=1)
    """encoder steps between validations on the validation day"""
    valid_searches: int = Field(1000, ge=1)
    """searches of the validation day in a validation"""
    valid_products: int = Field(5000, ge=1)
    """products of the corpus that Recall is measured on in a validation (shown ones first)"""
    valid_metric: Literal["recall_100", "gauc"] = "recall_100"
    """metric that early stopping and the best checkpoint go by (of at most 100 products all are
    found: gauc then)"""
    patience: int = Field(5, ge=1)
    """validations without a better value before training stops"""
    checkpoint_every: int = Field(100, ge=1)
    """steps between checkpoints (one is written with every validation too)"""
    checkpoints_kept: int = Field(2, ge=1)
    """newest checkpoints that are kept beside the best"""
    wait_minutes: float = Field(0, ge=0)
    """how long to wait for a cluster that grows on demand to bring what the workers need (0: what
    is not there now is refused) [min]"""
    max_failures: int = Field(3, ge=0)
    """restarts of the worker group without a new checkpoint in between; after one it counts anew"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        least = self.min_workers or self.num_workers
        if least > self.num_workers:
            raise ValueError(f"min_workers {least} is more than num_workers {self.num_workers}")
        if problem := self.not_shared("batch_size", self.batch_size):
            raise ValueError(problem)
        return self

    def not_shared(self, name: str, batch_size: int) -> str | None:
        """What is wrong where a number of workers that may come to be cannot share a batch."""
        for workers in range(self.min_workers or self.num_workers, self.num_workers + 1):
            if batch_size % workers:
                problem = f"{name} {batch_size} is not divisible by {workers} workers (num_workers"
                if self.min_workers is None:
                    return f"{problem} {workers})"
                step = math.lcm(*range(self.min_workers, self.num_workers + 1))
                return (
                    f"{problem} {self.num_workers}, min_workers {self.min_workers}); {step} and "
                    "its multiples are by all that may be left"
                )
        return None


class DistillSettings(ScheduleSettings):
    """Query-side students of a trained dual encoder (paper section 4.7). Workers are those of
    `train`; precision and clipping are those that the teacher was trained with."""

    layers: tuple[int, ...] = ()
    """a student for each number: the first layers of the teacher's query side (none: 1, 2 and 3, as
    far as it has them)"""
    width: int | None = Field(None, ge=8)
    """hidden width of narrower students, whose layers start at random weights (none: the
    teacher's, with its weights)"""
    titles: bool = True
    """train on the catalogue's titles too, beside the training days' queries"""
    texts: Address = None
    """more unlabelled text to train on: a Parquet file with a column `text`"""
    random_products: int = Field(512, ge=0)
    """random products beside the teacher's first 100 in the score distribution"""
    embedding_weight: float = Field(1.0, ge=0)
    """weight of 1 − cosine to the teacher's vector, beside the score distributions' KL"""
    batch_size: int = Field(256, ge=2)
    """texts in a batch"""
    epochs: int = Field(10, ge=1)
    """passes over the texts"""
    lr: float = Field(3e-4, gt=0)
    """peak learning rate of AdamW"""
    validate_every: int = Field(500, ge=1)
    """steps between validations on queries of the validation day"""
    valid_queries: int = Field(2000, ge=1)
    """queries of the validation day in one of them; the table at the end takes all"""
    seed: Seed = 0
    """seed of the batches and of what starts at random"""


class EvalSettings(Section):
    """Embedding, index and metrics (paper section 4.2)."""

    ks: tuple[int, ...] = (10, 50, 100)
    """cut-offs of Recall and nDCG: 10,50"""
    batch_size: int = Field(256, ge=1)
    """queries or products in one forward"""
    num_actors: int | None = Field(None, ge=1)
    """actors that embed (none: one a GPU, or one on each of the largest nodes)"""
    search_mb: int = Field(256, ge=1)
    """scores held at a time while the whole catalogue is searched [MiB]"""
    ann_from: int = Field(100_000, ge=1)
    """catalogue size from which the ANN index is IVF instead of HNSW [products]"""
    head_share: float = Field(0.5, gt=0, lt=1)
    """the most frequent test queries that make up this share of the impressions are the head"""
    qrels: Address = None
    """judged relevance of your own, TREC format: query text with spaces as '+', 0, product_id,
    grade"""
    bootstrap: int = Field(1000, ge=0)
    """samples of the bootstrap over queries behind each row's interval (0: none)"""
    dimensions: int | None = Field(None, ge=1)
    """first dimensions of the embeddings that are kept, brought to length 1 (none: all of them);
    for models trained with loss.matryoshka_dims"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be 1 or more each, got {self.ks}")
        return self


class ServeSettings(Section):
    """The search service (paper section 4.7) and the bundle that it serves."""

    bundle: Path | None = None
    """bundle directory to serve (none: the one that ray_jobs/publish.py published last in the work
    directory; a newer one is taken over while serving)"""
    model: str | None = None
    """model whose newest bundle in the work directory is served: its directory, or its address in
    MLflow's registry, e.g. models:/acebert@champion, where the alias is followed (none: the bundle
    that was published last)"""
    hot_queries: int = Field(100_000, ge=0)
    """most clicked queries whose vectors are computed beforehand"""
    index: Literal["auto", "flat", "hnsw", "ivf"] = "auto"
    """kind of FAISS index (auto: flat up to 10,000 products, hnsw up to eval.ann_from, then ivf)"""
    codec: Literal["fp32", "fp16", "int8", "pq"] = "fp32"
    """how the index keeps vectors: 4, 2, 1 or ½ byte a dimension; pq needs index ivf. Candidates
    of codes are scored again by the exact vectors, which are mapped from disk"""
    target_recall: float = Field(0.95, gt=0, le=1)
    """recall@100 against exact search that the search effort is set for"""
    milvus_uri: str | None = None
    """Milvus server, or file of Milvus Lite, that searches in place of FAISS"""
    runtime: Literal["torch", "onnx", "onnx_int8"] = "torch"
    """what computes query vectors; the ONNX ones need a query encoder of ray_jobs/distill.py"""
    encoder_apart: bool = False
    """query encoder as a deployment of its own (one hop more), else in the ingress"""
    threads: int = Field(1, ge=1)
    """threads of the query encoder and of the index in a replica"""
    batch_size: int = Field(32, ge=1)
    """queries in one forward at most"""
    batch_wait_ms: float = Field(0.0, ge=0)
    """how long a forward waits for more queries; 0: those that came during the last one [ms]"""
    max_requests: int = Field(100, ge=1)
    """requests in a replica at a time, an eighth of them such as encode products or photos; above,
    503 with Retry-After"""
    follow_seconds: float = Field(0.5, gt=0)
    """how often a replica asks for changes of products and for a newer bundle [s]"""
    max_body_mb: float = Field(16, gt=0)
    """larger request bodies are refused unread [MiB]"""
    max_megapixels: float = Field(16, gt=0)
    """photos in requests that claim to be larger are refused undecoded [10^6 px]"""
    request_log: Literal["off", "paths", "texts"] = "off"
    """a line of JSON for each request: with its path, or with the text of a search too"""
    click_weight: float = Field(0.3, ge=0, allow_inf_nan=False)
    """what ln(1 + past clicks of the query on the product) counts beside a cosine, where clicks are
    asked for: in a search by `clicks=true`, in an evaluation in the row `with_clicks`"""
    good_score: float | None = Field(None, ge=-1, le=1)
    """below this best score an answer says `no_good_match` (none: never)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.codec == "pq" and self.index != "ivf":
            raise ValueError(f"codec pq needs index ivf, got {self.index}")
        return self


class ExperimentSettings(Section):
    """A/B test of published models (paper Table 2)."""

    name: str | None = Field(None, min_length=1)
    """name of the experiment that runs (none: none does, and no search is logged)"""
    arms: tuple[str, ...] = ()
    """names under which `ray_jobs/publish.py --arm NAME` published bundles, the control first"""
    shares: tuple[float, ...] = ()
    """shares of the users by arm (none: equal ones)"""
    design: Literal["split", "interleave"] = "split"
    """split: a user sees one arm; interleave: each search shows a draft of both arms"""
    salt: str = ""
    """another salt deals the users of an experiment anew"""
    log_queries: bool = False
    """log what was searched for too, normalised; else who searched and what was shown"""
    flush_seconds: float = Field(30.0, gt=0)
    """how often a replica moves its part of the log to Parquet [s]"""
    retention_days: int = Field(90, ge=1)
    """days after which a service deletes logged searches and clicks"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is None:
            return self
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: two distinct names at least, got {self.arms}")
        if any(not re.fullmatch(r"[A-Za-z0-9][\w.-]*", arm) for arm in self.arms):
            raise ValueError(f"arms: names of letters, digits, '.', '-' and '_', got {self.arms}")
        if self.shares and (len(self.shares) != len(self.arms) or min(self.shares) <= 0):
            raise ValueError(f"shares: one above 0 for each of {len(self.arms)} arms")
        if self.design == "interleave" and len(self.arms) != 2:
            raise ValueError(f"design interleave drafts from two arms, got {len(self.arms)}")
        return self


class TrackingSettings(Section):
    """MLflow."""

    experiment: str = "acebert"
    """experiment that the runs are made in"""
    run_name: str | None = None
    """name of the run (none: the recipe's)"""
    tag: str | None = None
    """value of the tag `table` on the run of what the job makes, to compare rows in MLflow"""
    parent_run: str | None = None
    """id of the MLflow run that runs are nested under (a sweep sets it)"""
    register_as: str | None = "acebert"
    """registered model that a finished fine-tuning adds a version to (none: not registered)"""
    alias: str = "candidate"
    """alias set on that version"""

    @field_validator("tag")
    @classmethod
    def _check(cls, tag: str | None) -> str | None:
        if tag and "'" in tag:
            raise ValueError(
                f"{tag} has an apostrophe, which MLflow's filters have no way to write"
            )
        return tag


def _default_workdir() -> Path:
    return absolute(Path(os.environ.get("ACEBERT_HOME", "~/.acebert")))


class Settings(BaseSettings):
    """ACE-BERT on Ray: settings shared by all jobs."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        nested_model_default_partial_update=True,
        cli_use_class_docs_for_groups=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str="none",
    )

    recipe: str = DEFAULT_RECIPE
    """name under acebert/recipes, or the path of a YAML file"""
    workdir: Annotated[Path, AfterValidator(absolute)] = Field(default_factory=_default_workdir)
    """where every stage puts its results; all nodes of the cluster must see it"""
    seed: Seed = 0
    """seed of weights, plan and dropout"""
    data: DataSettings = DataSettings()
    demo: DemoSettings = DemoSettings()
    image: ImageSettings = ImageSettings()
    cnn: CNNSettings = CNNSettings()
    text: TextSettings = TextSettings()
    model: ModelSettings = ModelSettings()
    plan: PlanSettings = PlanSettings()
    loss: LossSettings = LossSettings()
    adversary: AdversarySettings = AdversarySettings()
    pretrain: PretrainSettings = PretrainSettings()
    train: TrainSettings = TrainSettings()
    distill: DistillSettings = DistillSettings()
    eval: EvalSettings = EvalSettings()
    serve: ServeSettings = ServeSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.data.products is None) != (self.data.impressions is None):
            raise ValueError("data.products and data.impressions are given both, or neither (demo)")
        for name in ("valid_impressions", "test_impressions"):
            if getattr(self.data, name) and not self.data.impressions:
                raise ValueError(f"data.{name} needs data.impressions")
        if bool(self.data.valid_impressions) != bool(self.data.test_impressions):
            raise ValueError(
                "data.valid_impressions and data.test_impressions are given both, or neither"
            )
        if self.data.test_impressions and self.data.test_from:
            raise ValueError("data.test_from splits by time; data.test_impressions is a split: one")
        for dims in self.loss.matryoshka_dims:
            if not 0 < dims < self.model.embedding_dim:
                raise ValueError(
                    f"loss.matryoshka_dims {dims}: must be between 1 and model.embedding_dim "
                    f"{self.model.embedding_dim}, which is trained anyway"
                )
        before = {"pretrain": self.model.start == "pretrain", "cnn": self.trains_cnn}
        for section in (name for name, happens in before.items() if happens):
            if problem := self.not_shared(section):
                raise ValueError(problem)
        if self.pretrain.adaptive_loss and not self.model.patches:
            raise ValueError(
                "pretrain.adaptive_loss weighs three losses; a model without patches has no MPM: "
                "set model.patches true, or pretrain.adaptive_loss false"
            )
        return self

    def not_shared(self, section: str) -> str | None:
        """What is wrong where the workers of `train` cannot share this training's batches."""
        return self.train.not_shared(f"{section}.batch_size", getattr(self, section).batch_size)

    @property
    def trains_cnn(self) -> bool:
        return self.image.cnn_weights == "trained" and self.model.patches

    @property
    def reads_images(self) -> bool:
        return self.model.patches or self.model.pixels

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # the recipe; the command line is put above it by load_settings


def load_settings(
    argv: Sequence[str] | None = None, *, tree: dict[str, Any] | None = None
) -> Settings:
    """Settings from a recipe and the command line `argv` (default: this process's).

    `tree` stands for the recipe that `argv` names, whose name then is a setting like others.

    Raises:
        UserError: unknown recipe, unknown key, wrong type, contradiction; it names the key.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe")
    try:
        known, rest = first.parse_known_args(_lists_joined(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if tree is None:
        named = known.recipe or DEFAULT_RECIPE
        values = {"recipe": named, **read_recipe(named)}
    else:
        values = tree | ({"recipe": known.recipe} if known.recipe else {})
    try:
        cli = CliSettingsSource[Any](
            Settings,
            cli_parse_args=rest,
            cli_exit_on_error=False,
        )
        return Settings(_cli_settings_source=cli, **values)
    except ValidationError as error:
        raise UserError(_describe(error)) from error
    except SettingsError as error:
        said = str(error).removeprefix("error parsing CLI: ")
        if unread := re.match(r"Parsing error encountered for ([\w.]+):", said):
            raise UserError(f"--{unread[1]}: cannot be read. {HOW_TO_GIVE}") from error
        raise UserError(said + _did_you_mean(rest)) from error


def _leaves() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its path."""
    for name, field in Settings.model_fields.items():
        if _is_section(field.annotation):
            for leaf, below in field.annotation.model_fields.items():  # type: ignore[union-attr]
                yield f"{name}.{leaf}", below
        else:
            yield name, field


def _lists_joined(argv: Sequence[str]) -> list[str]:
    """`--eval.ks 10 50` as `--eval.ks 10,50`, for pydantic takes one word for a list."""
    lists = {f"--{n}" for n, field in _leaves() if get_origin(field.annotation) in (tuple, dict)}
    joined: list[str] = []
    more = False  # whether what comes is a further value of a list
    for word in argv:
        if word.startswith("--"):
            flag, given, _ = word.partition("=")
            more = bool(given) and flag in lists
            joined.append(word)
        elif more:
            joined[-1] += f",{word}"
        else:
            more = bool(joined) and joined[-1] in lists
            joined.append(word)
    return joined


def _did_you_mean(argv: Sequence[str]) -> str:
    """The settings whose flags are nearest to those that are none."""
    flags = [f"--{name}" for name in flatten(Settings.model_construct().model_dump())]
    given = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    near = [get_close_matches(flag, flags, n=1) for flag in given if flag not in flags]
    found = " ".join(flag for flags_near in near for flag in flags_near)
    return f" (did you mean {found}?)" if found else ""


def print_help(description: str | None, extra: argparse.ArgumentParser | None = None) -> None:
    """What a job is, its own arguments (`extra`), and every setting."""
    own = extra or argparse.ArgumentParser(add_help=False)
    own.description = description
    own.formatter_class = argparse.RawDescriptionHelpFormatter
    own.usage = f"{own.format_usage().removeprefix('usage: ').strip()} [settings]"
    own.print_help()
    every = argparse.ArgumentParser(
        add_help=False, usage=argparse.SUPPRESS, epilog=HOW_TO_GIVE, formatter_class=_Help
    )
    CliSettingsSource[Any](Settings, root_parser=every)
    every.print_help()


class _Help(argparse.HelpFormatter):
    """Says where the work directory is, where pydantic names the function that tells."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        wanted = f"default factory: {_default_workdir.__name__}"
        return action.help and action.help.replace(wanted, f"default: {DEFAULT_WORKDIR}")


def settings_from(values: dict[str, Any]) -> Settings:
    """Settings from a plain tree, as `Settings.model_dump()` gives it; errors as load_settings."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UserError(_describe(error)) from error


def read_recipe(name: str) -> dict[str, Any]:
    """The recipe's tree with what it includes merged in.

    Raises:
        UserError: no such recipe, or no YAML mapping in it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("[!_]*.yaml")))
        raise UserError(f"--recipe {name}: no such recipe. Known: {known}; or a .yaml file")
    try:
        own = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(own, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, not a {type(own).__name__}")
    merged: dict[str, Any] = {}
    for parent in own.pop("include", []):
        merged = _merge(merged, read_recipe(parent))
    return _merge(merged, own)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        out[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return out


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'lr': 1}} → {'train.lr': 1}, as MLflow's params want it."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"--{key}: there is no such setting (--help lists them all)")
        elif item["type"] == "value_error":
            said = str(item["ctx"]["error"])
            section = (
                Settings.model_fields[key].annotation if key in Settings.model_fields else None
            )
            if isinstance(section, type) and issubclass(section, Section):
                key = f"{key}." if re.split(r"\W", said)[0] in section.model_fields else f"{key}: "
                lines.append(f"--{key}{said}")
            else:
                lines.append(f"--{key}: {said}" if key else said)
        else:
            lines.append(f"--{key}: {item['msg']}, got {item['input']!r}")
    return "\n".join(lines)


def settings_reference() -> str:
    """docs/settings.md: every leaf with type, default and meaning, a table a section."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m acebert.config`. A leaf is `--section.leaf` on the command line and",
        "`section: {leaf: …}` in a recipe. Defaults are the code's; recipes under",
        "`acebert/recipes/` set others.",
        "",
        HOW_TO_GIVE,
    ]
    top = {n: f for n, f in Settings.model_fields.items() if not _is_section(f.annotation)}
    lines += ["", *_table("", top)]
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += ["", f"## {name}", "", (section.__doc__ or "").strip(), ""]
            lines += _table(f"{name}.", section.model_fields)
    return "\n".join(lines) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(prefix: str, fields: dict[str, FieldInfo]) -> list[str]:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        kind = getattr(field.annotation, "__name__", "") or str(field.annotation)
        if "[" in str(field.annotation) or "|" in str(field.annotation):
            kind = str(field.annotation)
        kind = kind.replace("typing.", "").replace("datetime.", "").replace("pathlib.", "")
        default = DEFAULT_WORKDIR if name == "workdir" else field.default
        meaning = " ".join((field.description or "").split())
        cells = [f"`{prefix}{name}`", f"`{kind}`", f"`{default}`", meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    print(settings_reference(), end="")
