"""Metrics and the gate: is the exported model the same model?"""
