"""The gate: is an export the same model as its checkpoint, and good enough?

run.py measures a staged bundle; figures.py says what is compared and how; teacher_forcing.py walks two runtimes through
the same answer; metrics.py computes; judge.py holds the figures against thresholds.toml; reference.py keeps what the
export gave, so that a device can judge itself.
"""
