"""Power failures: every state in which one can leave a folder holds what was saved, and the same command continues."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.crash_states import Recording, crash_states, recording, restore
from support.runs import TINY, contents

from mygpt.data import prepare as preparing
from mygpt.data.prepared import open_prepared
from mygpt.disk import replace_bytes, sync
from mygpt.errors import MygptError
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import replace_text
from mygpt.runs.records import Record, cut_after, read_until
from mygpt.runs.replacing import put_back, set_aside_run
from mygpt.runs.run import RunDirectory
from mygpt.runs.saver import Saver
from mygpt.runs.steps import verify_checkpoint
from mygpt.studies import runner
from mygpt.studies.grid import Variant
from mygpt.studies.results import is_finished
from mygpt.training.train import train

KEYS = {
    "embed_dim": 8,
    "steps": 4,
    "save_every": 1,
    "keep_last": 1,
    "val_split": 0.2,
    "val_every": 2,
    "save_best": True,
}


class Ended:
    """A process of a study that has ended."""

    returncode, stdin = 0, None

    def poll(self):
        return 0


class Work(NamedTuple):
    """Something that is done in a folder, where the power fails."""

    do: Callable[[Recording], None]
    """Does it, and notes what it has saved."""
    check: Callable[[list], None]
    """Checks what a failure has left, after these notes."""
    again: Callable[[list], None]
    """Does it again after a failure, and checks what it comes to."""


def replacing(place, _text_file, _patch):
    """Files that are replaced: the old content, or the new."""
    values = [b"first", b"a second that is longer", b"third"]

    def do(recorded):
        for value in values[1:]:
            replace_bytes(place / "file", value)
            recorded.note(value)
        replace_text(place / "file", "fourth")
        recorded.note(b"fourth")

    def check(notes):
        possible = [*values, b"fourth"]
        assert (place / "file").read_bytes() in possible[len(notes) : len(notes) + 2]

    def again(_notes):
        replace_text(place / "file", "fourth")
        assert {path.name: path.read_bytes() for path in place.iterdir()} == {"file": b"fourth"}

    (place / "file").write_bytes(values[0])
    return Work(do, check, again)


def setting_aside(place, _text_file, _patch):
    """Records with a line that is none: it is in their file, or in the copy that is set aside."""
    file, aside, line = place / "metrics.jsonl", place / "damaged-metrics.jsonl-1", b'{"step": "none"}\n'

    def do(recorded):
        assert cut_after(file, Record, 1) == []
        recorded.note("kept")

    def check(_notes):
        assert line in (file.read_bytes(), aside.exists() and aside.read_bytes())

    def again(_notes):
        assert cut_after(file, Record, 1) == []
        assert line in [path.read_bytes() for path in place.glob("damaged-*")]

    file.write_bytes(line)
    return Work(do, check, again)


def training(place, text_file, patch):
    """A run that saves after each step: its newest checkpoint, its records, `latest` and `best`."""
    run, saved, undisturbed = place / "new" / "run", {}, {}
    recipe = Recipe.of(**TINY | KEYS, corpus=str(text_file), output=str(run))
    save = Saver.save

    def do(recorded):
        def save_and_wait(saver, weights, state, *rest):
            save(saver, weights, state, *rest)
            saver.wait()
            saved[state.metadata.step] = contents(run / f"step-{state.metadata.step:06d}")
            recorded.note(state.metadata.step)

        with pytest.MonkeyPatch.context() as within:
            within.setattr(Saver, "save", save_and_wait)
            train(recipe)
        undisturbed.update(contents(run))

    def check(notes):
        steps, found = (RunDirectory(run).checkpoints, contents(run)) if run.exists() else ({}, {})
        assert all(found.get(name) in (None, undisturbed[name]) for name in ("run.json", "recipe.toml"))
        assert max(steps, default=0) >= max(notes, default=0)
        for step, directory in steps.items():
            verify_checkpoint(directory)
            assert contents(directory) == saved[step]
        if steps:
            records = read_until(run / "metrics.jsonl", Record, max(steps))
            assert steps.keys() <= {record.step for record in records}
        if notes:
            assert RunDirectory(run).latest
            assert RunDirectory(run).best or max(notes) < 2

    def again(_notes):
        train(recipe)
        assert contents(run) == undisturbed

    return Work(do, check, again)


def preparing_a_corpus(place, text_file, patch):
    """A prepared corpus: absent or whole; of its tokens none is made twice that was saved."""
    patch.setattr("mygpt.data.sources.BLOCK", 500)
    patch.setattr(preparing, "CHUNK", 1500)
    patch.setattr(preparing, "SYNC_SECONDS", 0.0)
    source, out, prepared, encoded = text_file.with_name("short.txt"), place / "new" / "corpus", {}, []
    source.write_bytes(text_file.read_bytes()[:8000])
    patch.setattr(
        preparing, "encode_chunk", lambda *given, encode=preparing.encode_chunk: encoded.append(0) or encode(*given)
    )

    def prepare(progress=lambda _: None):
        choice = preparing.TokenizerChoice("char", 0, None)
        preparing.prepare([source], out, choice, workers=1, progress=progress)

    def do(recorded):
        prepare(progress=lambda _: recorded.note("batch"))
        recorded.note("done")
        prepared.update(contents(out))

    def check(notes):
        assert out.exists() or "done" not in notes
        if out.exists():
            open_prepared(out)
            assert contents(out) == prepared

    def again(notes):
        saved, is_begun = notes.count("batch"), (place / "new" / ".tmp-corpus" / "settings.json").exists()
        encoded.clear()
        if not out.exists():
            prepare()
        assert contents(out) == prepared
        # With its last batch the corpus is complete, and the journal goes.
        assert len(encoded) <= total - saved or (saved == total and not is_begun)

    do(Recording(place))
    total = len(encoded)
    restore({}, place)
    return Work(do, check, again)


def studying(place, text_file, patch):
    """A study: its plan, runs that are over, and its results."""
    folder, expected = place / "new" / "study", {}
    keys = TINY | KEYS | {"steps": 2, "corpus": str(text_file)}
    variants = [Variant("small", Recipe.of(**keys))]
    patch.setattr(runner, "POLL_SECONDS", 0)
    recorded = []

    def train_here(task, *_, **__):
        recipe = Recipe.model_validate_json(task.recipe)
        for recording_ in recorded:
            recording_.note(folder / "plan.json")
        train(recipe)
        for recording_ in recorded:
            recording_.note(Path(recipe.checkpoint.output))
        return Ended()

    patch.setattr(runner, "start_worker", train_here)

    def study():
        runner.run_study(variants, 2, folder, 0.01, lambda _: None, side_by_side=1)

    def do(recording_):
        recorded[:] = [recording_]
        study()
        recorded.clear()
        recording_.note(folder / "study.json")
        expected.update(files())

    def files():
        return {name: found for name, found in contents(folder).items() if not name.endswith(".log")}

    def check(notes):
        for path in notes:
            assert is_finished(path) if path.name.startswith("seed-") else path.exists()
        for path in folder.glob("[!.]*"):
            assert path.is_dir() or contents(path.parent)[path.name] == expected[path.name]

    def again(_notes):
        study()
        assert files() == expected

    return Work(do, check, again)


def replacing_a_run(place, text_file, _patch):
    """A run that is set aside and put back: whatever a failure leaves, it can be put back whole."""
    run = train(Recipe.of(**TINY | {"steps": 1, "corpus": str(text_file), "output": str(place / "run")}))
    old = contents(run)

    def do(_recorded):
        set_aside_run(run)
        replace_text(run / "run.json", "{}")
        replace_text(run / "metrics.jsonl", "{}")
        put_back(run)

    def check(_notes):
        put_back(run)
        assert {name: found for name, found in contents(run).items() if not name.startswith(".tmp-")} == old

    def again(notes):
        set_aside_run(run)
        check(notes)

    return Work(do, check, again)


WORKS = [
    pytest.param(replacing, marks=pytest.mark.fault(114)),
    pytest.param(setting_aside, marks=pytest.mark.fault(114)),
    pytest.param(training, marks=pytest.mark.fault(114)),
    pytest.param(replacing_a_run, marks=pytest.mark.fault(114)),
    pytest.param(preparing_a_corpus, marks=pytest.mark.fault(115)),
    pytest.param(studying, marks=pytest.mark.fault(116)),
]


def fail_everywhere(make, tmp_path, text_file, patch, *, again):
    """Do the work, check the states that a power failure can leave, and go on after `again` of them."""
    place = tmp_path / "place"
    place.mkdir()
    work = make(place, text_file, patch)
    with recording(place) as recorded:
        work.do(recorded)
    states = []
    for tree, notes in crash_states(recorded, most=12):
        states.append((tree, notes))
        restore(tree, place)
        work.check(list(notes))
    for tree, notes in random.Random(0).sample(states, min(again, len(states))):
        restore(tree, place)
        work.again(list(notes))
    return states


@pytest.mark.parametrize("make", WORKS)
def test_power_failure_at_any_moment(make, tmp_path, text_file, monkeypatch, capsys):
    """What was saved is there and whole, whatever else the disk has lost; the same command comes to the same bytes."""
    assert len(fail_everywhere(make, tmp_path, text_file, monkeypatch, again=12)) > 5


@pytest.mark.parametrize("make", WORKS)
def test_power_failure_is_noticed_where_nothing_is_synced(make, tmp_path, text_file, monkeypatch, capsys):
    """The tests above see the difference: with `sync` that does nothing, something is lost."""
    monkeypatch.setattr(sync, "__code__", (lambda path: None).__code__)
    with pytest.raises((AssertionError, MygptError)):
        fail_everywhere(make, tmp_path, text_file, monkeypatch, again=0)
