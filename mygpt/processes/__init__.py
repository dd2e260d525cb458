"""The processes of a run and the machines under them: what a launcher started, messages and errors between processes,
checks before step 1, devices, threads and signals. How gradients are summed over processes belongs in training, and so
does everything that needs Accelerate.
"""
