"""Evaluation of trained models: tasks, metrics with bootstrap intervals, perplexity and predictions."""
