"""Saving, finding and loading models."""

import functools
import json
import os
import stat
import struct

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import TABLE, TOKENIZER, rewrite, save, small_gpt
from support.runs import steps_of

from mygpt.errors import CheckpointError, DamagedCheckpointError, FormatError, MismatchError
from mygpt.runs.copying import copy_until
from mygpt.runs.files import METADATA_KEY
from mygpt.runs.loading import load_checkpoint, read_state
from mygpt.runs.run import RunDirectory, find_model_file
from mygpt.training.train import train


@pytest.fixture
def gpt():
    return small_gpt()


@pytest.fixture
def run(tmp_path):
    """A directory with two checkpoints of the same weights."""
    for step in (3, 6):
        save(tmp_path, small_gpt(), step)
    return tmp_path


def test_model_file_is_enough_to_generate_from(run, gpt):
    """Weights, architecture, vocabulary and step come back from the one file, wherever it lies."""
    lone = run / "elsewhere.safetensors"
    (run / "step-000006" / "model.safetensors").rename(lone)
    model, tokenizer, step = load_checkpoint(lone)
    assert (step, tokenizer.vocab, model.config) == (6, TOKENIZER.vocab, TABLE)
    assert not model.training
    for name, weight in gpt.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_file_bytes_depend_on_the_content_only(gpt, tmp_path):
    """Twenty saves, one sequence of bytes: metadata is one key of canonical JSON."""
    seen = set()
    for i in range(20):
        (tmp_path / str(i)).mkdir()
        seen.add(save(tmp_path / str(i), gpt, 1).read_bytes())
    assert len(seen) == 1


def test_file_mode_follows_the_umask(gpt, tmp_path):
    """Other users may read a checkpoint where they may read other new files."""
    before = os.umask(0o027)
    try:
        file = save(tmp_path, gpt, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_no_temporary_is_left(run):
    """After a save there are step directories and `latest`, and nothing else."""
    assert {path.name for path in run.iterdir()} == {"step-000003", "step-000006", "latest"}


def test_path_may_name_run_step_or_file(run):
    """A run means its newest step."""
    newest = run / "step-000006" / "model.safetensors"
    assert find_model_file(run) == find_model_file(run / "step-000006") == find_model_file(newest) == newest


def test_missing_checkpoints_exit_with_2(tmp_path):
    """A path without a run, and a run without a checkpoint; the run that it replaces is named."""
    (tmp_path / "new" / "replaced-run").mkdir(parents=True)
    for path, problem in (
        (tmp_path / "nothing", "no such run, step directory or model file"),
        (tmp_path, "has no checkpoint"),
        (
            tmp_path / "new",
            f"has no checkpoint yet, and the run that it replaces is {tmp_path / 'new' / 'replaced-run'}",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert caught.value.exit_code == 2
        assert str(caught.value) == f"{path}: {problem}; expected what `mygpt train` has written"


@pytest.mark.parametrize("name", ["../step-000003", "/etc", "step-000009", "", "step-000003/../step-000003"])
def test_latest_may_name_only_a_step_of_its_run(run, name):
    """The name in the file never leads outside the run directory."""
    (run / "latest").write_text(name)
    with pytest.raises(DamagedCheckpointError, match=r"latest: got "):
        load_checkpoint(run)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "header": lambda file: file.write_bytes(file.read_bytes()[:8] + b"\xff" * 4 + file.read_bytes()[12:]),
    "header length": lambda file: file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:]),
    "empty": lambda file: file.write_bytes(b""),
    "foreign": lambda file: save_file({"w": torch.zeros(3)}, file),
    "deep metadata": lambda file: save_file({"w": torch.zeros(3)}, file, {METADATA_KEY: "{" * 100_000}),
}
DAMAGES |= {
    name: functools.partial(rewrite, metadata=change)
    for name, change in {
        "format": lambda values: values.update(format=99),
        "architecture": lambda values: values["model"].update(num_layers=2),
        "endless architecture": lambda values: values["model"].update(num_layers=2**31 - 1),
        "heads": lambda values: values["model"].update(num_heads=3),
        "type": lambda values: values["model"].update(num_layers="many"),
        "step": lambda values: values.update(step=-1),
        "vocabulary": lambda values: values["tokenizer"].update(vocab=["a"]),
    }.items()
}
DAMAGES |= {
    name: functools.partial(rewrite, tensors=change)
    for name, change in {
        "nan": lambda values: values["norm.bias"].fill_(float("nan")),
        "dtype": lambda values: values.update({"norm.bias": values["norm.bias"].bfloat16()}),
        "missing tensor": lambda values: values.pop("norm.bias"),
    }.items()
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(run, damage):
    """Loading gives one line that names the file, and exit code 1; also where no manifest lies beside it."""
    file = run / "step-000006" / "model.safetensors"
    DAMAGES[damage](file)
    alone = run / "elsewhere" / "model.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    # Weights of another program, alone, are a mistake and no damage: tests/runs/test_initial.py.
    for path, problem in ((run, "damaged: "), *([] if damage == "foreign" else [(alone, "")])):
        with pytest.raises(
            (DamagedCheckpointError, FormatError, MismatchError), match=rf"model\.safetensors: {problem}"
        ) as caught:
            load_checkpoint(path)
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_not_called_damaged(run, monkeypatch):
    """After an edit of the model's code the error says which weight differs."""
    from mygpt.model import gpt as model

    class MLP(model.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(config.embed_dim, 3)

    monkeypatch.setattr(model, "MLP", MLP)
    problem = r"blocks\.0\.mlp\.extra\.bias: got nothing, expected float32 \[3\]: .* another version of the model"
    with pytest.raises(MismatchError, match=problem) as caught:
        load_checkpoint(run)
    assert "damaged" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_missing_moment_is_named(run):
    """Where the manifest does not show it."""
    file = run / "step-000006" / "state.safetensors"
    rewrite(file, tensors=lambda values: values.pop("optimizer.norm.bias.exp_avg"))
    weights = small_gpt().state_dict()
    with pytest.raises(DamagedCheckpointError) as caught:
        read_state(file.parent, weights)
    problem = "optimizer.norm.bias.exp_avg is missing, or not of its weight's shape"
    assert str(caught.value) == f"{file}: damaged: {problem}"


def test_copy_of_a_run_leaves_out_a_best_checkpoint_of_another_format(tiny, tmp_path):
    """As one that is damaged: the copy goes on from the step itself."""
    run = train(tiny(save_every=1, val_split=0.2, val_every=1, save_best=True))
    best = RunDirectory(run).best_until(5).step
    manifest = run / f"step-{best:06d}" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    step = 6 if best == 5 else 5
    copy_until(run / f"step-{step:06d}", tmp_path / "copy")
    assert steps_of(tmp_path / "copy") == [step]
    assert not (tmp_path / "copy" / "best").exists()
