"""Comparison of two models or runs: whether they are the same, bit for bit; and if not, which settings and which
held-out loss they have. Imports no torch, so that it answers at once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mygpt.data.tokenizer import CharMetadata, describe_tokenizer
from mygpt.errors import DamagedCheckpointError
from mygpt.estimates import Estimate
from mygpt.recipe.files import RUN_FILE
from mygpt.recipe.tables import HARMLESS_KEYS, ModelTable
from mygpt.runs.changes import RESOLVED_KEYS, differing_keys
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.held_out import Difference, difference, read_evaluations
from mygpt.runs.records import Record, read_records
from mygpt.runs.run import RunDirectory, find_model_file, run_of
from mygpt.runs.schemas import ModelMetadata
from mygpt.runs.steps import read_manifest, read_metadata


class TensorDifference(NamedTuple):
    """One tensor of two files that is not the same in both."""

    name: str
    differing: int | None = None
    """Elements with different bits."""
    of: int | None = None
    """All its elements."""
    problem: str | None = None
    """Why its elements cannot be compared, such as another shape, or are not finite."""
    max_abs: float | None = None
    """Largest absolute difference."""
    max_ulp: int | None = None
    """Largest distance in units in the last place: how many representable numbers apart."""

    @property
    def text(self) -> str:
        """How many elements differ, or the problem."""
        if self.differing is None:
            return self.problem or ""
        return f"{self.differing:,} of {self.of:,}{f' ({self.problem})' if self.problem else ''}"


class TensorComparison(NamedTuple):
    """The tensors of two files side by side."""

    differences: list[TensorDifference]
    tensors: int
    values: int


class RecordComparison(NamedTuple):
    """The records of two runs side by side."""

    steps: int
    """Steps that both have recorded."""
    totals: tuple[int, int]
    """Records of each."""
    difference: str
    """The first recorded value that differs; "": none."""
    held_out: tuple[Record, Record] | None = None
    """The last record of each that has a held-out loss; None: one has none."""


class HeldOutComparison(NamedTuple):
    """The last evaluations of two models before they were saved, on the same held-out text."""

    steps: tuple[int, int]
    difference: Difference | None
    """Of the second model from the first; None: they held out different parts, which cannot be compared."""
    population: str
    """Of which the difference has an error."""

    @property
    def known(self) -> list[tuple[Estimate, str]]:
        """The differences that can be taken, each with its unit."""
        nats, bits, _ = self.difference or (None, None, "")
        named = ((nats, "nats per token"), (bits, "bits per byte"))
        return [(estimate, unit) for estimate, unit in named if estimate is not None]

    @property
    def no_verdict(self) -> str | None:
        """Why neither model is called better; None: the interval of the difference says whether one is."""
        if self.difference is None:
            return "they hold out different parts of the text"
        if not self.known:
            return "their tokens differ, and the bytes that they stand for are not known"
        return "a single held-out window has no standard error" if self.known[0][0].stderr is None else None

    @property
    def verdict(self) -> str:
        """Which model is better, where that is known."""
        estimate, unit = self.known[0]
        low, high = estimate.interval
        better = "B is better" if high < 0 else "A is better" if low > 0 else "no difference is seen"
        return (
            f"{better} on {self.population}: 95% interval {low:+.4f} to {high:+.4f} {unit}; this compares two "
            "models; `mygpt study` compares recipes, over several seeds"
        )

    def difference_line(self) -> str:
        """The differences that can be taken, with their paired standard errors."""
        shown = (
            f"{estimate.mean:+.4f}{'' if estimate.stderr is None else f' +- {estimate.stderr:.4f}'} {unit}"
            for estimate, unit in self.known
        )
        manner = self.difference.manner if self.difference else ""
        steps = " and ".join(map(str, dict.fromkeys(self.steps)))
        return f"B - A: {', '.join(shown)} ({manner}; evaluated after step {steps})"


class Comparison(NamedTuple):
    """Two models side by side; of two runs also their optimizer states and records."""

    settings: list[str]
    """A line for each setting of the architecture that differs, and for the vocabulary."""
    weights: TensorComparison
    steps: tuple[int, int]
    """The steps at which they were saved. Models of different steps may be identical."""
    state: TensorComparison | None = None
    """Optimizer moments and generator states."""
    records: RecordComparison | None = None
    recipe: Sequence[str] = ()
    """A line for each other key of their recipes that differs and changes numbers."""
    environment: Sequence[str] = ()
    """A line for each difference of processor, versions and other things on which the last bits depend."""
    held_out: HeldOutComparison | None = None
    """None where their losses cannot be compared."""
    not_comparable: str | None = None
    """Why not, for a reader; None: they can be, or a file has no manifest beside it."""

    @property
    def no_verdict(self) -> str | None:
        """Why neither model is called better; None: one may be, or nothing is known of their losses."""
        if not self.settings and not self.weights.differences:
            return "these are the same weights"
        return self.held_out.no_verdict if self.held_out else self.not_comparable

    def verdict_lines(self) -> Iterator[str]:
        """The difference of the held-out losses with its error, and which is better; or why that is not known."""
        is_same = not self.settings and not self.weights.differences
        if self.held_out and self.held_out.known and not is_same:
            yield self.held_out.difference_line()
        if self.no_verdict:
            yield f"verdict: none, because {self.no_verdict}"
        elif self.held_out:
            yield f"verdict: {self.held_out.verdict}"

    @property
    def identical(self) -> bool:
        differences = [*self.settings, *self.weights.differences, *(self.state.differences if self.state else [])]
        return not differences and not (self.records and self.records.difference)


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare the models of two run directories (their newest steps), step directories or model files.

    Raises:
        CheckpointError: one of them does not exist.
        DamagedCheckpointError: one of them cannot be read.
    """
    file_a, file_b = find_model_file(Path(a)), find_model_file(Path(b))
    metadata_a, metadata_b = (read_metadata(file, ModelMetadata) for file in (file_a, file_b))
    comparison = Comparison(
        list(_compare_settings(metadata_a, metadata_b)),
        compare_files(file_a, file_b),
        (metadata_a.step, metadata_b.step),
    )
    run_a, run_b = run_of(file_a), run_of(file_b)
    if run_a and run_b:
        comparison = comparison._replace(recipe=list(_compare_recipes(run_a, run_b)))
        is_evaluated = all(run.recipe.validation.val_every for run in (run_a, run_b))
        comparison = comparison._replace(not_comparable="a checkpoint has no held-out loss")
        last = [
            read_evaluations(run.path, step)[-1:] for run, step in zip((run_a, run_b), comparison.steps, strict=True)
        ]
        if is_evaluated and run_a.info.held_out_text != run_b.info.held_out_text:
            comparison = comparison._replace(not_comparable="they were evaluated on different texts")
        elif all(last):
            (of_a,), (of_b,) = last
            same_tokens = metadata_a.tokenizer == metadata_b.tokenizer
            same_text = _held_out_part(run_a) == _held_out_part(run_b)
            change = difference(of_a, of_b, same_tokens=same_tokens, same_text=same_text)
            found = HeldOutComparison((of_a.step, of_b.step), change, of_a.windows.population)
            comparison = comparison._replace(held_out=found, not_comparable=None)
    if not ((Path(a) / RUN_FILE).exists() and (Path(b) / RUN_FILE).exists()):
        return comparison
    infos = [RunDirectory(Path(run)).info for run in (a, b)]
    was, now = (info.stretch_of(step).environment for info, step in zip(infos, comparison.steps, strict=True))
    if infos[0].init_sha256 != infos[1].init_sha256:
        comparison = comparison._replace(recipe=[*comparison.recipe, "init_from: other initial weights"])
    return comparison._replace(
        state=compare_files(file_a.with_name(STATE_FILE), file_b.with_name(STATE_FILE)),
        records=compare_records(
            # A run that was killed, or still goes on, has later ones than those of its newest checkpoint.
            *(
                [record for record in read_records(Path(run)) if record.step <= metadata.step]
                for run, metadata in ((a, metadata_a), (b, metadata_b))
            )
        ),
        environment=[f"{name} {old} against {new}" for name, (old, new) in was.changes(now).items()],
    )


def _compare_recipes(a: RunDirectory, b: RunDirectory) -> Iterator[str]:
    if a.info.corpus_sha256 != b.info.corpus_sha256:
        yield "corpus: another text"
    if a.info.held_out_sha256 != b.info.held_out_sha256 and a.info.held_out_text != b.info.held_out_text:
        yield "val_corpus: another text"
    # The model and the environment have lines of their own.
    elsewhere = HARMLESS_KEYS | RESOLVED_KEYS | {*ModelTable.model_fields}
    for key, values in differing_keys(a.recipe, b.recipe):
        if key not in elsewhere:
            yield "{} {} against {}".format(key, *("absent" if value is None else value for value in values))


def _held_out_part(run: RunDirectory) -> tuple[object, ...]:
    """What names the part of a text that is held out, apart from the text itself."""
    data = run.recipe.data
    return () if data.val_corpus else (data.val_split, data.hold_out)


def compare_steps(a: Path, b: Path) -> list[TensorDifference]:
    """The tensors of two step directories that differ; if their manifests have the same hashes, none is read.

    Raises:
        DamagedCheckpointError: one of them cannot be read.
    """
    if read_manifest(a).files == read_manifest(b).files:
        return []
    return [tensor for name in (MODEL_FILE, STATE_FILE) for tensor in compare_files(a / name, b / name).differences]


def compare_files(a: Path, b: Path) -> TensorComparison:
    """Compare the tensors of two safetensors files by name.

    Raises:
        DamagedCheckpointError: one of them cannot be read.
    """
    differences, values = [], 0
    try:
        with safe_open(a, framework="numpy") as tensors_a, safe_open(b, framework="numpy") as tensors_b:
            names_a, names_b = ({*tensors.keys()} for tensors in (tensors_a, tensors_b))
            for name in sorted(names_a | names_b):
                if name not in names_a & names_b:
                    differences.append(TensorDifference(name, problem=f"only in {a if name in names_a else b}"))
                    continue
                tensor_a = tensors_a.get_tensor(name)
                values += tensor_a.size
                if difference := _compare_tensors(name, tensor_a, tensors_b.get_tensor(name)):
                    differences.append(difference)
    # numpy has no bfloat16 or float8, which mygpt never saves.
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{a} or {b}: damaged, or not of mygpt: {error}") from None
    return TensorComparison(differences, len(names_a | names_b), values)


def compare_records(records_a: list[Record], records_b: list[Record]) -> RecordComparison:
    """Compare the values of the steps that both runs have recorded. How often they record does not matter."""
    other = {record.step: record for record in records_b}
    totals = len(records_a), len(records_b)
    evaluated = [[record for record in records if record.val is not None] for records in (records_a, records_b)]
    held_out = (evaluated[0][-1], evaluated[1][-1]) if all(evaluated) else None
    common = [(record, other[record.step]) for record in records_a if record.step in other]
    for a, b in common:
        for (name, value_a), (_, value_b) in zip(a, b, strict=True):
            if value_a != value_b and None not in (value_a, value_b):
                difference = f"step {a.step}: {name} {value_a} against {value_b}"
                return RecordComparison(len(common), totals, difference, held_out)
    return RecordComparison(len(common), totals, "", held_out)


def describe_held_out(a: Record, b: Record) -> str:
    """The held-out losses of two records in every unit that both have."""
    units = (("val", ".4f", "nats per token"), ("val_bits_per_byte", ".4f", "bits per byte"))
    pairs = [(getattr(a, name), getattr(b, name), form, unit) for name, form, unit in units]
    pairs.append((a.val_perplexity, b.val_perplexity, ".2f", "perplexity"))
    known = [f"{x:{form}} against {y:{form}} {unit}" for x, y, form, unit in pairs if None not in (x, y)]
    steps = f"step {a.step}" if a.step == b.step else f"step {a.step} against step {b.step}"
    return f"held-out loss at {steps}: {', '.join(known)}"


def table(differences: list[TensorDifference]) -> Iterator[str]:
    """The differences as aligned lines under a heading."""
    rows = [("tensor", "differing", "max abs", "max ulp")]
    for tensor in differences:
        max_abs = "" if tensor.max_abs is None else f"{tensor.max_abs:.3e}"
        max_ulp = "" if tensor.max_ulp is None else f"{tensor.max_ulp:,}"
        rows.append((tensor.name, tensor.text, max_abs, max_ulp))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()


def _compare_settings(a: ModelMetadata, b: ModelMetadata) -> Iterator[str]:
    for (key, value_a), (_, value_b) in zip(a.model, b.model, strict=True):
        if value_a != value_b:
            yield f"{key}: {value_a} against {value_b}"
    if isinstance(a.tokenizer, CharMetadata) and isinstance(b.tokenizer, CharMetadata):
        yield from _compare_characters(a.tokenizer.vocab, b.tokenizer.vocab)
    elif a.tokenizer != b.tokenizer:
        yield f"tokenizer: {describe_tokenizer(a.tokenizer)} against {describe_tokenizer(b.tokenizer)}"


def _compare_characters(vocab_a: str, vocab_b: str) -> Iterator[str]:
    if vocab_a != vocab_b:
        # A vocabulary can have thousands of characters.
        only_a, only_b = (
            "".join(sorted(part)[:10]) for part in (set(vocab_a) - set(vocab_b), set(vocab_b) - set(vocab_a))
        )
        yield (
            f"vocabulary: {len(vocab_a)} against {len(vocab_b)} characters; the first that only one has: "
            f"{only_a!r} against {only_b!r}"
        )


def _compare_tensors(name: str, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> TensorDifference | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        problem = f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
        return TensorDifference(name, problem=problem)
    bits = np.dtype(f"i{a.itemsize}")
    bits_a, bits_b = a.reshape(-1).view(bits), b.reshape(-1).view(bits)
    differ = bits_a != bits_b
    if not differ.any():
        return None
    difference = TensorDifference(name, int(np.count_nonzero(differ)), a.size)
    values_a, values_b = a.reshape(-1)[differ], b.reshape(-1)[differ]
    if not (np.isfinite(values_a).all() and np.isfinite(values_b).all()):
        return difference._replace(problem="not finite", max_abs=np.inf)
    with np.errstate(over="ignore"):
        max_abs = float(np.abs(values_a.astype(np.float64) - values_b.astype(np.float64)).max())
    if a.dtype.kind != "f":
        return difference._replace(max_abs=max_abs)
    order_a, order_b = _order(bits_a[differ]), _order(bits_b[differ])
    # Unsigned, the difference of the larger and the smaller is right even where it overflows the signed type.
    low, high = (part.astype(f"u{a.itemsize}") for part in (np.minimum(order_a, order_b), np.maximum(order_a, order_b)))
    return difference._replace(max_abs=max_abs, max_ulp=int((high - low).max()))


def _order(bits: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.signedinteger[Any]]:
    """Floating-point bits as integers in the order of their values, 1 apart where the values are neighbours."""
    return np.where(bits < 0, np.iinfo(bits.dtype).min - bits, bits)
