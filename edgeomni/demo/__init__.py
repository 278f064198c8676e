"""The demo: the shipped model nano hears a spoken question, answers aloud, and is measured in every precision.

question.py says what is asked; answer.py answers it; picture.py draws both; precisions.py exports and measures the
precisions; run.py puts all of it in one folder.
"""

from .run import demo

__all__ = ["demo"]
