"""Quality in words: error rates and answers right, of any checkpoint or bundle on any engine.

metrics.py scores one answer; recognisers.py hears spoken ones; selection.py says
which samples are asked in which task; run.py asks them; result.py holds
what was found; comparison.py sets two sources against each other; lost.py tells the gate what an export lost; report.py
draws tables.
"""

from .comparison import Comparison, compare
from .result import Evaluation
from .run import evaluate

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
