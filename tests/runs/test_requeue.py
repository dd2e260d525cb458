"""A launcher or a scheduler gives the same command again: the run continues, also with --overwrite."""

import json
import sys

import pytest
from support.fault_points import disturb, fail
from support.runs import contents

from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import CheckpointError, OutOfMemoryError
from mygpt.runs.run import RunDirectory
from mygpt.runs.start import find_start
from mygpt.training.train import train


def timed_steps(run) -> list[int]:
    """The steps in timing.jsonl, which shows whether a step was trained twice."""
    return [json.loads(line)["step"] for line in (run / "timing.jsonl").read_text().splitlines()]


def test_restart_continues_the_run_that_overwrite_began(tiny, monkeypatch):
    """A restart of the same command does not begin again; another run is still replaced."""
    run = train(tiny(steps=8, save_every=2), last_step=2)
    recipe, notes = tiny(save_every=2), []
    start = find_start(
        recipe, RunDirectory(run).info, CharTokenizer("a").metadata, overwrite=True, is_restart=True, warn=notes.append
    )
    assert (start.checkpoint, start.overwrite) == (None, True)
    train(recipe, last_step=4, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(recipe, overwrite=True)
    assert timed_steps(run) == [1, 2, 3, 4, 5, 6]
    assert len(RunDirectory(run).info.stretches) == 1


@pytest.mark.fault(63)
def test_restart_before_the_first_save_goes_on_replacing(tiny, monkeypatch, capsys):
    """A launcher that restarts a failed command does not find the old run in its place, and take it for its own."""
    run = train(tiny())
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.MonkeyPatch.context() as patch:
        disturb("before-step", fail(MemoryError()), count=3, patch=patch.setattr)
        with pytest.raises(OutOfMemoryError):
            train(tiny(), overwrite=True)
    assert timed_steps(run / "replaced-run") == [1, 2, 3, 4, 5, 6]
    assert timed_steps(run) == [1, 2]
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(tiny(), overwrite=True)
    assert "saved " in capsys.readouterr().err
    assert not (run / "replaced-run").exists()


@pytest.mark.fault(97)
@pytest.mark.parametrize(
    ("variable", "restarts"),
    [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")],
)
def test_job_queued_again_before_it_began_replaces_the_run_of_another(tiny, monkeypatch, capsys, variable, restarts):
    """Recipe and command are those of the complete run: the id of the job says that it is another's."""
    monkeypatch.setenv(variable, "1")
    train(tiny(), overwrite=True)
    monkeypatch.setenv(restarts, "1")
    capsys.readouterr()
    run = train(tiny(), overwrite=True)
    assert f"{run} is complete" in capsys.readouterr().err
    monkeypatch.setenv(variable, "2")
    train(tiny(), overwrite=True)
    assert f"saved {run}" in capsys.readouterr().err
    assert RunDirectory(run).info.launch_id == f"{variable}=2"
    train(tiny(), overwrite=True)
    assert f"{run} is complete" in capsys.readouterr().err


@pytest.mark.fault(97)
def test_restart_without_an_id_keeps_what_recipe_and_command_began(tiny, monkeypatch, capsys):
    """torchrun's default id is "none", which every launch has; and an older run has recorded no id."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = train(tiny(), overwrite=True)
    assert RunDirectory(run).info.launch_id is None
    for launch in ("none", "its own"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        capsys.readouterr()
        train(tiny(), overwrite=True)
        assert f"{run} is complete" in capsys.readouterr().err


@pytest.mark.fault(63)
def test_requeued_job_with_overwrite_keeps_its_run(tiny, monkeypatch, capsys):
    """Also with another processor, kernel or commit than at the first start: recipe and command identify the run."""
    recipe = tiny(save_every=2)
    run = train(recipe, last_step=4, overwrite=True)
    info = json.loads((run / "run.json").read_text())
    other = {"cpu": "another", "platform": "another", "git_commit": "0" * 40 + "-dirty", "cpu_capability": "AVX2"}
    (run / "run.json").write_text(json.dumps(info | other))
    before = contents(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(recipe, overwrite=True)
    assert "continuing after step 4" in capsys.readouterr().err
    after = contents(run)
    assert all(after[name] == before[name] for name in before if name.startswith("step-"))
    # A run that another command began is replaced.
    (run / "run.json").write_text(json.dumps(info | {"command": ["mygpt", "train", "other.toml"]}))
    train(recipe, overwrite=True)
    assert "continuing" not in capsys.readouterr().err


@pytest.mark.fault(63)
@pytest.mark.parametrize("change", ["program", "text moved", "run.json damaged"])
def test_requeued_job_deletes_nothing_that_may_be_its_own(tiny, tmp_path, text, monkeypatch, change):
    """Another path of the program or of the same text is the same command; an unreadable run is not removed."""
    corpus = tmp_path / "text.txt"
    corpus.write_text(text, encoding="utf-8", newline="")
    run = train(tiny(save_every=2, corpus=str(corpus)), last_step=4, overwrite=True)
    before = contents(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if change == "program":
        monkeypatch.setattr("sys.argv", ["/elsewhere/mygpt", *sys.argv[1:]])
    elif change == "text moved":
        corpus = corpus.rename(tmp_path / "moved.txt")
    else:
        (run / "run.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"run\.json: damaged") as caught:
            train(tiny(save_every=2, corpus=str(corpus)), overwrite=True)
        assert caught.value.exit_code == 1
        assert contents(run).keys() == before.keys()
        return
    train(tiny(save_every=2, corpus=str(corpus)), overwrite=True)
    assert timed_steps(run) == [1, 2, 3, 4, 5, 6]
