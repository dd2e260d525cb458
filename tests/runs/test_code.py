"""A run records the code of mygpt that trained it, and says so where another code is used."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.commands import run_process
from support.runs import contents

import mygpt
from mygpt.disk import code_sha256
from mygpt.errors import LaunchError
from mygpt.processes.preflight import ProcessReport, check_alike
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

OTHER_CODE = "mygpt's code is another than that which trained {} (0.2.0, commit unknown): numbers may differ"


def trained_by_other_code(run: Path) -> None:
    """Have run.json say that another code of mygpt trained this run."""
    info = json.loads((run / "run.json").read_text())
    info["stretches"][0]["environment"] |= {"code_sha256": "0" * 64, "git_commit": None}
    (run / "run.json").write_text(json.dumps(info))


@pytest.mark.fault(99)
def test_edited_code_is_noticed(tiny, tmp_path):
    """A changed file of the model: evaluating, checking and giving the command again say so; generating does not."""
    run = train(tiny(val_split=0.2, val_every=3))
    package = tmp_path / "edited" / "mygpt"
    shutil.copytree(Path(mygpt.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "model" / "gpt.py").open("a") as file:
        file.write("\n# changed\n")

    def edited(*arguments) -> str:
        command = [sys.executable, "-m", "mygpt", *arguments]
        done = run_process(command, tmp_path / "edited", environment={"PYTHONSAFEPATH": ""})
        assert done.returncode == 0, done.stderr
        return done.stderr

    for arguments in (("eval", run), ("check", run), ("train", run / "recipe.toml")):
        assert edited(*arguments).count(f"mygpt's code is another than that which trained {run} (") == 1
    assert "mygpt's code" not in edited("generate", "--checkpoint", run, "--prompt", "the", "--max-new-tokens", 1)


@pytest.mark.fault(99)
def test_run_that_goes_on_with_other_code_records_it(tiny, tmp_path, capsys, call):
    """A warning of one line, and a stretch in run.json, by which each step knows its code."""
    keys = {"save_every": 2, "val_split": 0.2, "val_every": 2}
    run = train(tiny(**keys), last_step=4)
    trained_by_other_code(run)
    train(tiny(**keys))
    notes = capsys.readouterr().err
    assert OTHER_CODE.format(run) in notes.splitlines()
    assert "last bits" not in notes
    info, now = RunDirectory(run).info, code_sha256()[:12]
    assert [info.stretch_of(step).environment.code for step in (4, 5)] == ["0" * 12, now]
    assert "mygpt's code" not in call("check", run)[2]
    undisturbed = train(tiny(**keys, output=str(tmp_path / "undisturbed")))
    for step in ("step-000002", "step-000004", "step-000006"):
        assert contents(run / step) == contents(undisturbed / step)
    trained_by_other_code(undisturbed)
    assert f"environment: code {now} against {'0' * 12}" in call("compare", run, undisturbed)[1].splitlines()


@pytest.mark.fault(99)
def test_branch_of_other_code_is_warned_of(tiny, tmp_path, capsys):
    """The warning names the run of which it is a branch."""
    source = train(tiny(save_every=2), last_step=4)
    trained_by_other_code(source)
    capsys.readouterr()
    train(tiny(resume=str(source), output=str(tmp_path / "branch")))
    assert OTHER_CODE.format(source) in capsys.readouterr().err


@pytest.mark.fault(99)
def test_exact_sums_need_the_same_code(tiny):
    """Of the processes of one launch, as they need the same versions."""
    own = RunDirectory(train(tiny(steps=1))).info.stretches[0].environment
    other = own.model_copy(update={"code_sha256": "0" * 64})
    reports = [ProcessReport(node, "cpu", "gloo", {}, {}, each.values()) for node, each in (("a", own), ("b", other))]
    reports = [report._replace(inputs=dict.fromkeys(("corpus", "val_corpus", "init_from"))) for report in reports]
    check_alike(reports, exact=False)
    with pytest.raises(LaunchError, match=r"code: differs: .* on rank 0 on a, 000000000000 on rank 1 on b; exact sums"):
        check_alike(reports, exact=True)
