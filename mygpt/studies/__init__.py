"""Studies: a grid of recipes, each run with several seeds, and what the runs say about the recipes.

`grid` names the recipes, `room` measures how many runs go side by side, `runner` starts and continues them, each in a
process of its own (`worker`), and `analysis` compares what they came to. A study's runs are ordinary run directories.
"""
