"""Studies: a grid of recipes, each run with several seeds, and what the runs say about the recipes.

`grid` names the recipes, `parallelism` measures how many runs go side by side, `runner` starts and continues them, each
in a process of its own (`worker`), and `analysis` compares their losses. A study's runs are ordinary run directories.
"""
