"""Quality in words: error rates and answers right, of any checkpoint or bundle on any engine."""
