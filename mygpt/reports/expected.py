"""How close a complete run came to what its recipe expects."""

from collections.abc import Iterator

from mygpt.recipe.tables import ExpectedTable
from mygpt.runs.records import Record, Timing


def outcome_lines(expected: ExpectedTable, record: Record, timing: Timing, processes: int = 1) -> Iterator[str]:
    """A line for each expectation, given the run's last record and timing. The time is that of a single process."""
    if expected.expected_minutes is not None and processes == 1:
        minutes = timing.elapsed_seconds / 60
        share = minutes / expected.expected_minutes
        yield f"time: {minutes:.2g} minutes, {share:.2f} of the {expected.expected_minutes:g} that the recipe expects"
    if expected.expected_bits_per_byte is not None:
        low, high = expected.expected_bits_per_byte
        value, name = record.val_bits_per_byte, "held-out loss"
        if value is None:
            yield f"{name}: not measured; the recipe expects {low:.2f} to {high:.2f} bits per byte"
            return
        distance = max(low - value, value - high)
        where = f"{distance:.2f} {'below' if value < low else 'above'}" if distance > 0 else "within"
        yield f"{name}: {value:.2f} bits per byte, {where} the {low:.2f} to {high:.2f} that the recipe expects"
