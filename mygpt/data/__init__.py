"""From a corpus to batches: reading and tokenizing a text, splitting it, and choosing the windows of training and of
evaluation. Nothing here knows of a model or of the steps of a run.
"""
