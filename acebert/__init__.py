"""ACE-BERT on Ray: product retrieval from title, photo and hot queries.

The library holds the method; the stage runners (`acebert.data.preprocess`,
`acebert.data.partitions`, `acebert.training.finetune`, `acebert.evaluation.embed`) put it on Ray.
Imports run one way: config ← data ← models ← training ← evaluation ← ray_jobs, serving.
"""

__version__ = "0.1.0"
