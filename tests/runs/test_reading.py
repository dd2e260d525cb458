"""What only reads a run writes nothing into its directory."""

from pathlib import Path

import pytest

import mygpt
from mygpt.errors import DamagedCheckpointError
from mygpt.runs.records import Timing, read_records, read_until
from mygpt.training.train import train


def state_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """Of everything in a folder and itself what a write would change: content, size, time and inode."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, content)
    return found


COMMANDS = {
    "check": (("check", "RUN"), 0),
    "plot": (("plot", "RUN", "--x", "minutes", "--out", "loss.png"), 0),
    "compare": (("compare", "RUN", "OTHER"), 1),
    "eval": (("eval", "RUN"), 0),
    "generate": (("generate", "--checkpoint", "RUN", "--max-new-tokens", 2, "--prompt", "the"), 0),
    "verify": (("verify", "RUN"), 0),
    "at": (("at", "RUN", 3, "--out", "at"), 0),
    "fork": (("fork", "RUN", 3, "--lr", 1e-4, "--output", "fork"), 0),
    "bisect": (("bisect", "RUN", "OTHER"), 1),
    "replay": (("replay", "RUN"), 2),
    "recipe": (("recipe", "show", "RUN/recipe.toml"), 0),
    "doctor": (("doctor", "RUN/recipe.toml"), 0),
    "branch": (("train", "RUN/recipe.toml", "--resume", "RUN/step-000002", "--output", "branch"), 0),
    "begin with it": (("train", "RUN/recipe.toml", "--init-from", "RUN", "--output", "tuned"), 0),
}


@pytest.fixture
def training(tiny) -> Path:
    """A run as it is while it trains: a record is half written, and more steps are timed than recorded."""
    run = train(tiny(steps=8, save_every=2, save_best=True, val_split=0.2, val_every=2), last_step=6)
    with (run / "metrics.jsonl").open("a") as records, (run / "timing.jsonl").open("a") as timings:
        records.write('{"step":7,"loss":3.2')
        for step in (7, 8):
            timings.write(Timing(step=step, elapsed_seconds=step, tokens_per_second=1.0).model_dump_json() + "\n")
        timings.write('{"step":9')
    return run


@pytest.mark.fault(98)
@pytest.mark.parametrize("command", COMMANDS)
def test_reading_command_leaves_the_run_as_it_is(training, tiny, tmp_path, monkeypatch, call, command):
    """No byte, time or inode in the directory of a run that is training changes, whatever reads it."""
    monkeypatch.chdir(tmp_path)
    if "OTHER" in COMMANDS[command][0]:
        train(tiny(data_seed=1, val_split=0.2, val_every=2, output=str(tmp_path / "other")))
    before = state_of(training)
    arguments, code = COMMANDS[command]
    names = {"RUN": str(training), "OTHER": str(tmp_path / "other")}
    words = [names.get(str(word), str(word).replace("RUN/", f"{training}/")) for word in arguments]
    got, _, err = call(*words)
    assert got == code, err
    assert state_of(training) == before


@pytest.mark.fault(98)
def test_run_object_leaves_the_run_as_it_is(training):
    """The properties of `mygpt.Run`, its model and its picture only read, too."""
    before = state_of(training)
    run = mygpt.Run(training)
    assert (len(run.records), run.is_finished, [*run.checkpoints]) == (6, False, [2, 4, 6])
    assert run.best is not None
    assert run.load("latest").step == 6
    mygpt.plot(run, x="minutes")
    assert state_of(training) == before


@pytest.mark.fault(98)
def test_records_are_read_up_to_a_step(training, tmp_path):
    """Later lines, and one that is half written, are left out and left there; no file has no records."""
    assert [timing.step for timing in read_until(training / "timing.jsonl", Timing, 7)] == list(range(1, 8))
    assert read_until(tmp_path / "nothing", Timing, 7) == []


def test_records_out_of_order_are_damage(training):
    """The file and the line are named."""
    file = training / "metrics.jsonl"
    first, second, *_ = file.read_text().splitlines(keepends=True)
    file.write_text(second + first)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_records(training)
    assert str(caught.value) == f"{file}: damaged: line 2 is of an earlier step than the one before"
