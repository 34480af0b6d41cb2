"""Sweeps: many fine-tunings of one recipe, by Ray Tune.

space.py      the space file, checked against the settings tree     Trial = a point and a seed
trials.py     Ray Tune: which trials run when, and what became of each
training.py   what a trial is: our own fine-tuning job, and its stages shared by all trials
run.py        the sweep as a whole: MLflow, reuse, results on disk
results.py    table, Parquet, the best settings as a recipe
figure.py     the metrics against what was varied (paper Fig. 5)
"""
