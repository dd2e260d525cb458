"""Run directories: writing, finding, reading and continuing what is on the disk.

This package holds the schemas of a run's files, safe ways to read and write them, the lock, checkpoints, records, and
the decision where a run begins. Training, messages between processes, and what a user sees belong elsewhere. Only
`saver`, `loading` and `initial` import torch, so that a run can be looked at without waiting for it.
"""
