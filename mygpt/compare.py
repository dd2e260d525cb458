"""Bitwise comparison of two models, tensor by tensor. Imports no torch, so that it answers at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mygpt.errors import DamagedCheckpointError
from mygpt.rundir import find_model_file, read_metadata


class Difference(NamedTuple):
    """How one tensor, or one entry of the metadata, differs."""

    name: str
    differing: str
    """Elements whose bits differ, of how many; or what else differs, such as the shape."""
    max_abs: float | None = None
    """Largest absolute difference."""
    max_ulp: int | None = None
    """Largest distance in units in the last place: how many representable numbers apart."""


class Comparison(NamedTuple):
    """Two models side by side; they are identical when `differences` is empty."""

    differences: list[Difference]
    tensors: int
    values: int
    steps: tuple[int, int]
    """The steps at which they were saved, which may differ between identical models."""


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare the models of two run directories (their newest steps), step directories or model files.

    Raises:
        CheckpointError: one of them is not there.
        DamagedCheckpointError: one of them cannot be read.
    """
    file_a, file_b = find_model_file(Path(a)), find_model_file(Path(b))
    metadata_a, metadata_b = read_metadata(file_a), read_metadata(file_b)
    steps = metadata_a.pop("step"), metadata_b.pop("step")
    differences = list(_compare_metadata(metadata_a, metadata_b))
    values = 0
    try:
        with safe_open(file_a, framework="numpy") as tensors_a, safe_open(file_b, framework="numpy") as tensors_b:
            names_a, names_b = set(tensors_a.keys()), set(tensors_b.keys())
            for name in sorted(names_a | names_b):
                if name not in names_b or name not in names_a:
                    differences.append(Difference(name, f"only in {a if name in names_a else b}"))
                    continue
                tensor_a = tensors_a.get_tensor(name)
                values += tensor_a.size
                if difference := _compare_tensors(name, tensor_a, tensors_b.get_tensor(name)):
                    differences.append(difference)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{file_a} or {file_b}: damaged: {error}") from None
    return Comparison(differences, len(names_a | names_b), values, steps)


def table(differences: list[Difference]) -> Iterator[str]:
    """The differences as aligned lines under a heading."""
    rows = [("tensor", "differing", "max abs", "max ulp")]
    for name, differing, max_abs, max_ulp in differences:
        rows.append(
            (name, differing, "" if max_abs is None else f"{max_abs:.3e}", "" if max_ulp is None else f"{max_ulp:,}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()


def _compare_metadata(a: dict[str, Any], b: dict[str, Any]) -> Iterator[Difference]:
    for key in ("model", "tokenizer"):
        for name in sorted(a[key].keys() | b[key].keys()):
            value_a, value_b = a[key].get(name), b[key].get(name)
            if value_a != value_b:
                yield Difference(f"({key}.{name})", f"{value_a!r} against {value_b!r}")


def _compare_tensors(name: str, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Difference | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(name, f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
    bits = np.dtype(f"i{a.itemsize}")
    bits_a, bits_b = a.reshape(-1).view(bits), b.reshape(-1).view(bits)
    differ = bits_a != bits_b
    if not differ.any():
        return None
    count = f"{np.count_nonzero(differ):,} of {a.size:,}"
    values_a, values_b = a.reshape(-1)[differ], b.reshape(-1)[differ]
    if not (np.isfinite(values_a).all() and np.isfinite(values_b).all()):
        return Difference(name, count + " (not finite)", np.inf)
    max_abs = float(np.abs(values_a.astype(np.float64) - values_b.astype(np.float64)).max())
    if a.dtype.kind != "f":
        return Difference(name, count, max_abs)
    # Python integers: the distance between two 64-bit numbers may take 65 bits.
    order_a, order_b = _order(bits_a[differ]), _order(bits_b[differ])
    max_ulp = max(abs(x - y) for x, y in zip(order_a.tolist(), order_b.tolist(), strict=True))
    return Difference(name, count, max_abs, max_ulp)


def _order(bits: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.signedinteger[Any]]:
    """Floating-point bits as integers in the order of their values, 1 apart where the values are neighbours."""
    return np.where(bits < 0, np.iinfo(bits.dtype).min - bits, bits)
