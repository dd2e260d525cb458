"""Saving, finding, loading and comparing models."""

import json
import os
import stat
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mygpt.checks.compare import compare, table
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError, NewerFormatError
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import ModelTable, OptimizerTable, Recipe
from mygpt.runs.files import METADATA_KEY
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.run import find_model_file
from mygpt.runs.saver import Saver, TrainingState
from mygpt.runs.schemas import StateMetadata
from mygpt.runs.steps import read_metadata
from mygpt.training.optim import build_optimizer
from mygpt.training.state import optimizer_tensors

TABLE = ModelTable(embed_dim=8, num_heads=2, num_layers=1, max_seq_len=4)
TOKENIZER = CharTokenizer('abc\n"é😀')


def save(run, gpt, step, config=TABLE, tokenizer=TOKENIZER):
    """Save a model as the loop does, with the moments of an optimizer that has made a step."""
    optimizer = build_optimizer(gpt, OptimizerTable())
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    optimizer.step()
    gpt.load_state_dict(before)
    tensors = optimizer_tensors(optimizer, [name for name, _ in gpt.named_parameters()])
    tensors |= {"generator.stream": torch.Generator().get_state(), "generator.cpu.0": torch.get_rng_state()}
    with Saver(run, Recipe(model=config), tokenizer, corpus_sha256="0" * 64) as saver:
        saver.save(gpt.state_dict(), TrainingState(tensors, StateMetadata(step=step, processes=1)))
        saver.wait()
    return run / f"step-{step:06d}" / "model.safetensors"


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(TABLE, TOKENIZER.vocab_size)


@pytest.fixture
def run(tmp_path, gpt):
    """A directory with two checkpoints of the same weights."""
    for step in (3, 6):
        save(tmp_path, gpt, step)
    return tmp_path


def rewrite(file, *, metadata=lambda values: None, tensors=lambda values: None):
    """Save a model file again after the given functions have changed its parts in place."""
    parts = read_metadata(file).model_dump(), load_file(file)
    metadata(parts[0])
    tensors(parts[1])
    save_file(parts[1], file, {METADATA_KEY: json.dumps(parts[0])})


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
    """Others may read a checkpoint wherever they may read other new files."""
    before = os.umask(0o027)
    try:
        file = save(tmp_path, gpt, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_nothing_unfinished_is_left(run):
    """After a save there are step directories and `latest`, and no temporary."""
    assert {path.name for path in run.iterdir()} == {"step-000003", "step-000006", "latest"}


def test_a_path_may_name_run_step_or_file(run):
    """A run means its newest step."""
    newest = run / "step-000006" / "model.safetensors"
    assert find_model_file(run) == find_model_file(run / "step-000006") == find_model_file(newest) == newest


def test_missing_checkpoints_are_mistakes_of_the_user(tmp_path):
    """A path with no run, and a run with no checkpoint, exit with 2."""
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["../step-000003", "/etc", "step-000009", "", "step-000003/../step-000003"])
def test_latest_may_name_only_a_step_of_its_run(run, name):
    """What a file says never leads outside the run directory."""
    (run / "latest").write_text(name)
    with pytest.raises(DamagedCheckpointError, match=r"latest: got "):
        load_checkpoint(run)


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(file):
    raw = bytearray(file.read_bytes())
    raw[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(raw)


def damage_length(file):
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def damage_empty(file):
    file.write_bytes(b"")


def damage_foreign(file):
    save_file({"w": torch.zeros(3)}, file)


def damage_format(file):
    rewrite(file, metadata=lambda values: values.update(format=99))


def damage_architecture(file):
    rewrite(file, metadata=lambda values: values["model"].update(num_layers=2))


def damage_endless_architecture(file):
    rewrite(file, metadata=lambda values: values["model"].update(num_layers=2**31 - 1))


def damage_heads(file):
    rewrite(file, metadata=lambda values: values["model"].update(num_heads=3))


def damage_step(file):
    rewrite(file, metadata=lambda values: values.update(step=-1))


def damage_vocabulary(file):
    rewrite(file, metadata=lambda values: values["tokenizer"].update(vocab=["a"]))


def damage_nothing_but_metadata(file):
    save_file({"w": torch.zeros(3)}, file, {METADATA_KEY: "{" * 100_000})


def damage_nan(file):
    rewrite(file, tensors=lambda values: values["norm.bias"].fill_(float("nan")))


def damage_dtype(file):
    rewrite(file, tensors=lambda values: values.update({"norm.bias": values["norm.bias"].bfloat16()}))


def damage_types(file):
    rewrite(file, metadata=lambda values: values["model"].update(num_layers="many"))


def damage_missing_tensor(file):
    rewrite(file, tensors=lambda values: values.pop("norm.bias"))


@pytest.mark.parametrize(
    "damage",
    [function for name, function in list(globals().items()) if name.startswith("damage_")],
    ids=lambda function: function.__name__,
)
def test_damaged_files_are_refused(run, damage):
    """Whatever is wrong with a file, loading it gives one line that names it, and exit code 1.

    The manifest's hash finds it; and where there is no manifest, looking at the file does.
    """
    file = run / "step-000006" / "model.safetensors"
    damage(file)
    alone = run / "elsewhere" / "model.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    for path, problem in ((run, "damaged: "), (alone, "")):
        with pytest.raises(
            (DamagedCheckpointError, NewerFormatError, MismatchError), match=rf"model\.safetensors: {problem}"
        ) as caught:
            load_checkpoint(path)
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_not_called_damaged(run, monkeypatch):
    """After an edit of the model's code, a whole checkpoint is one of another version: what differs is named."""
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


def test_equal_weights_are_identical_at_any_step(run):
    """The question is whether the models are the same; the steps are told beside the answer."""
    result = compare(run / "step-000003", run)
    assert result.weights.differences == []
    assert result.steps == (3, 6)
    assert result.weights.values == sum(
        t.numel() for t in load_file(run / "step-000003" / "model.safetensors").values()
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int32])
def test_ulp_distance_of_any_type_is_exact(run, kind):
    """The whole range apart takes one bit more than the type has."""
    ends = [torch.finfo(kind).min, torch.finfo(kind).max] if kind.is_floating_point else [0, 7]
    values = torch.tensor(ends, dtype=kind)
    for step, order in (("step-000003", (0, 1)), ("step-000006", (1, 0))):
        tensor = values[list(order)]
        rewrite(run / step / "model.safetensors", tensors=lambda parts, t=tensor: parts.update(extra=t))
    (difference,) = compare(run / "step-000003", run).weights.differences
    if kind.is_floating_point:
        view = {torch.float64: np.int64, torch.float16: np.int16}[kind]
        assert difference.max_ulp == 2 * int(tensor.max().numpy().view(view))
    else:
        assert (difference.max_abs, difference.max_ulp) == (7, None)


def test_one_bit_is_a_difference(run):
    """One unit in the last place of one weight is found, named and measured; so is the sign of a zero."""

    def change(tensors):
        tensors["norm.weight"][2] = float(np.nextafter(np.float32(1), np.float32(2)))
        tensors["norm.bias"][:2] = -0.0

    rewrite(run / "step-000006" / "model.safetensors", tensors=change)
    bias, weight = compare(run / "step-000003", run).weights.differences
    assert (weight.name, weight.differing, weight.max_ulp) == ("norm.weight", "1 of 8", 1)
    assert weight.max_abs == pytest.approx(2**-23)
    assert (bias.name, bias.differing, bias.max_abs, bias.max_ulp) == ("norm.bias", "2 of 8", 0.0, 0)


def test_ulp_distance_crosses_zero(run):
    """From the smallest negative to the smallest positive number it is two steps."""
    tiny = np.float32(1e-45)

    def put(value):
        return lambda tensors: tensors["norm.bias"].__setitem__(0, float(value))

    rewrite(run / "step-000003" / "model.safetensors", tensors=put(-tiny))
    rewrite(run / "step-000006" / "model.safetensors", tensors=put(tiny))
    (difference,) = compare(run / "step-000003", run).weights.differences
    assert difference.max_ulp == 2


def test_large_vocabularies_are_compared_in_time_that_grows_with_them(tmp_path):
    """Texts of tens of thousands of characters, such as Chinese ones: a second, not minutes."""
    config = ModelTable(embed_dim=2, num_heads=1, num_layers=1, max_seq_len=2)
    for name, start in (("a", 0x10000), ("b", 0x10003)):
        (tmp_path / name).mkdir()
        tokenizer = CharTokenizer("".join(map(chr, range(start, start + 50_000))))
        save(tmp_path / name, GPT(config, 50_000), 1, config, tokenizer)
    started_at = time.perf_counter()
    (line,) = compare(tmp_path / "a", tmp_path / "b").settings
    assert time.perf_counter() - started_at < 5
    assert line.endswith(
        f"{''.join(map(chr, range(0x10000, 0x10003)))!r} against {chr(0x1C350) + chr(0x1C351) + chr(0x1C352)!r}"
    )


def test_other_shapes_and_vocabularies_are_differences(run, tmp_path):
    """Models that do not correspond are compared all the same, and settings are told apart from tensors."""
    other = tmp_path / "other"
    other.mkdir()
    table_b = ModelTable(embed_dim=8, num_heads=4, num_layers=2, max_seq_len=4)
    tokenizer = CharTokenizer("abcd")
    save(other, GPT(table_b, 4), 6, table_b, tokenizer)
    result = compare(run, other)
    lines = "\n".join(table(result.weights.differences))
    assert result.settings[:2] == ["num_heads: 2 against 4", "num_layers: 1 against 2"]
    assert result.settings[2].startswith("vocabulary: 7 against 4 characters")
    assert "float32 [7, 8] against float32 [4, 8]" in lines
    assert "only in" in lines
