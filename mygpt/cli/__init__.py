"""The `mygpt` command: reads arguments, calls the package that does the work, prints the result or the error, and gives
the exit code. Nothing here computes: what a script could want as well belongs in the package that does the work.
"""
