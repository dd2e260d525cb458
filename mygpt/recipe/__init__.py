"""Everything that a recipe says: its tables, its files, its keys as flags, and the seeds derived from its seeds. What
depends on the machine, the corpus or a run's files belongs in higher packages. torch is not imported here, so that
recipes are read and checked at once.
"""
