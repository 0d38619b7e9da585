"""Evaluation: answers, metrics, judging, reports."""
