"""ACE-BERT on Ray: product retrieval from title, photo and hot queries.

The library holds the method; the stage runners (`acebert.data.preprocess`,
`acebert.data.partitions`, `acebert.training.finetune`, `acebert.evaluation.embed`) put it on Ray.
Imports run one way: config ← data ← models ← evaluation's metrics ← training ← evaluation's
stages ← pipeline ← ray_jobs, serving.
"""

import os

__version__ = "0.1.0"

# Ray reads these when it is imported, so they are set before anybody does. A Ray that is started
# from here listens on 127.0.0.1 only and sends no usage reports; a process that joins a cluster
# (RAY_ADDRESS) is reached at its node's own address.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of lines that differ in numbers only, and so of two trainings side by side, Ray shows one. What it
# skips is torch's warning that a node's name cannot be looked up, which no training needs.
os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", "(finetune|pretrain|cnn|distill)[^:]*: ")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "hostname of the client socket cannot be")
if os.environ.get("RAY_ADDRESS", "local") == "local":
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
