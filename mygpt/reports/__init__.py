"""What a person reads of a run: records made while it trains, and pictures drawn from them later. The schemas of
records, which other packages read, belong in runs; comparisons of runs belong in checks.
"""
