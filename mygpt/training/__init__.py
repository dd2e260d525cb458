"""The training run: its phases, its loop, the parts that train and what is saved of them.

Only here, in the doctor and in compat.py is Accelerate imported. Not here: how a run lies on the disk (runs), what
processes say to each other beside the training (processes), and what looks at a finished run (checks).
"""
