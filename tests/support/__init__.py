"""Helpers that several test files share."""

import pytest

# Failed asserts in these modules show their values, as in a test.
pytest.register_assert_rewrite("support.commands", "support.forked", "support.runs")
