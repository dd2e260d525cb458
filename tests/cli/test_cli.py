"""The `mygpt` command: its output, its exit codes, and its messages for mistakes."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from support.commands import MYGPT, run_process
from support.runs import FLAGS

from mygpt import __version__
from mygpt.cli.data import PrepareOptions
from mygpt.cli.init import InitOptions
from mygpt.cli.inspect import GenerateOptions, PlotOptions
from mygpt.cli.main import COMMANDS
from mygpt.cli.steps import AtOptions
from mygpt.cli.study import StudyOptions
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.recipe.flags import parse_options, parse_recipe
from mygpt.recipe.tables import Recipe


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The commands run in an empty folder, so that a test sees what they create."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "90")


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
    return path


# The numbers are the rows of docs/faults.md.
BAD_RECIPES = {
    "38-unknown-key": ("[train]\nmax_gradnorm = 1.0", "unknown key 'max_gradnorm'; did you mean 'max_grad_norm'?"),
    "38-unknown-table": ("[trian]\nsteps = 1", "unknown table 'trian'; did you mean 'train'?"),
    "38-key-with-control-characters": (
        '[train]\n"a\\n\\u001b[31m" = 1',
        r"unknown key 'a\\n\\x1b\[31m'; expected one of",
    ),
    "39-wrong-type": ('[train]\nsteps = "many"', r"\[train\] steps: got 'many', expected a valid integer"),
    "39-boolean": ("[train]\nsteps = true", r"\[train\] steps: got true, expected a valid integer"),
    "39-table-for-key": ("[train.steps]\nx = 1", r"\[train\] steps: got \{'x': 1\}, expected a valid integer"),
    "39-key-for-table": ("train = 3", r"\[train\]: got 3, expected a table"),
    "40-nan": ("[optimizer]\nlr = nan", r"\[optimizer\] lr: got nan, expected a finite number"),
    "40-inf": ("[optimizer]\nlr = inf", r"\[optimizer\] lr: got inf, expected a finite number"),
    "40-overflow": ("[optimizer]\nlr = 1e400", r"\[optimizer\] lr: got inf, expected a finite number"),
    "41-negative-warmup": ("[schedule]\nwarmup = -1", r"\[schedule\] warmup: got -1, expected at least 0"),
    "42-warmup-over-steps": ("[schedule]\nwarmup = 2001", "warmup: got 2001, expected at most steps = 2000"),
    "44-micro-batch": ("[train]\nmicro_batch_size = 5", "expected a divisor of batch_size = 16"),
    "45-heads": ("[model]\nnum_heads = 5", "num_heads: got 5, expected a divisor of embed_dim = 64"),
    "46-duplicate-key": ("[train]\nsteps = 1\nsteps = 2", "not valid TOML: Cannot overwrite a value"),
    "46-byte-order-mark": (b"\xef\xbb\xbf[train]\nsteps = 1", "starts with a byte order mark"),
    "46-not-utf-8": (b"[data]\ncorpus = '\xff'", "not UTF-8: byte 0xff at offset 17"),
    "47-deep-nesting": ("x = " + "[" * 50_000, "nested too deeply"),
    "47-long-integer": ("[train]\nsteps = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
    "47-long-hexadecimal": ("[train]\nsteps = 0x" + "f" * 5000, "steps: got a number of thousands of digits, expected"),
    "48-seq-len": ("[train]\nseq_len = 65", "seq_len: got 65, expected at most max_seq_len = 64"),
    "48-extends-itself": ('extends = "bad.toml"', "extends goes in a circle: bad.toml -> bad.toml"),
    "48-extends-nothing": (
        'extends = "gone.toml"',
        r"bad\.toml: extends: got 'gone\.toml', expected the path of a recipe",
    ),
    "48-extends-nul": ('extends = "a\\u0000b"', r"bad\.toml: extends: got 'a\\x00b', expected the path of a recipe"),
    "48-extends-a-folder": ('extends = "."', r"bad\.toml: extends: got '\.', expected the path of a recipe"),
    "48-extends-a-number": ("extends = 3", "extends: got 3, expected the path of a recipe"),
}


@pytest.mark.fault(38, 39, 40, 41, 42, 44, 45, 46, 47, 48)
@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_cost_one_line(call, tmp_path, case):
    """Exit 2, one line on stderr that names the file, and nothing created."""
    content, message = BAD_RECIPES[case]
    path = write(tmp_path / "bad.toml", content)
    code, out, err = call("train", path)
    assert (code, out) == (2, "")
    assert err.startswith("mygpt: ")
    assert err.count("\n") == 1
    assert ".toml" in err
    assert re.search(message, err), err
    assert not os.listdir()


BAD_TEXTS = {
    "43-short-held-out-part": ("abcd" * 300, "the held-out part has 12 of the corpus's 1,200 characters"),
    "43-short-training-part": ("abcd" * 3, "the training part has 11 of the corpus's 12 characters"),
    "52-empty": ("", "empty; expected a text"),
    "53-one-character": ("a", "single distinct character"),
    "53-one-distinct-character": ("a" * 500, "single distinct character"),
    "54-not-utf-8": (b"good\xffbad", "not UTF-8: byte 0xff at offset 4"),
}


@pytest.mark.fault(43, 52, 53, 54)
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_cost_one_line(call, tmp_path, case):
    """Also a text on which one part would hold no window."""
    content, message = BAD_TEXTS[case]
    code, out, err = call(
        "train", write(tmp_path / "text.txt", content), *FLAGS, "--val-split", "0.01", "--seq-len", 12
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
    assert not os.listdir()


@pytest.mark.fault(48, 49, 50, 51)
def test_missing_and_unreadable_paths_cost_one_line(call, tmp_path):
    """A path that is not there, is a directory, or is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    for target, message in (
        (tmp_path / "gone.toml", "no such recipe"),
        (tmp_path / "gone.txt", "no such text file"),
        (tmp_path, "a corpus is a text file, or a folder that `mygpt data prepare` made"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / ("x" * 300 + ".toml"), "File name too long"),
    ):
        code, out, err = call("train", target)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("folder.toml", "loop.toml", "pipe.toml"):
        code, _, err = call("train", tmp_path / name)
        assert (code, err.count("\n")) == (2, 1), err
    assert "did you mean 'hardened'" in call("train", "hardenedd")[2]
    assert not os.listdir()


@pytest.mark.fault(32)
def test_links_in_a_circle_cost_one_line(call, tmp_path):
    """Wherever a run can be named: Python 3.11 ends with a RuntimeError where it follows such a link."""
    (tmp_path / "loop").symlink_to("loop")
    loop = tmp_path / "loop"
    for arguments in (
        *(
            ("replay", loop),
            ("plot", loop),
            ("verify", loop),
            ("compare", loop, loop),
            ("generate", "--checkpoint", loop),
        ),
        ("train", "python-docs", "--steps", 1, "--resume", loop),
        ("train", "python-docs", "--steps", 1, "--output", loop),
    ):
        code, _, err = call(*arguments)
        assert (code, err.count("\n")) == (2, 1), err


def test_threads_are_where_torch_finds_them(call, monkeypatch):
    """When it is imported: setting them later makes a small model slower. The recipe's, or this process's cores."""
    seen = []
    monkeypatch.setattr("mygpt.training.train.train", lambda *_, **__: seen.append(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("mygpt.processes.environment.core_count", lambda: 6)
    monkeypatch.delitem(sys.modules, "torch")
    for flags in (["--threads", 3], [], ["--reduction", "exact", "--device", "cpu"]):
        assert call("train", "python-docs", *flags)[0] == 0
    assert seen == ["3", "6", "1"]


@pytest.mark.fault(51)
@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom file permissions stop; this is root")
def test_unreadable_text_costs_one_line(call, tmp_path):
    """A file without permission to read it."""
    path = write(tmp_path / "secret.txt", "text")
    path.chmod(0)
    code, _, err = call("train", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "Permission denied" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "nan"], "mygpt: --lr: got nan, expected a finite number\n"),
        (["--val-split", "1"], "mygpt: --val-split: got 1.0, expected less than 1\n"),
        (["--steps", "0"], "mygpt: --steps: got 0, expected at least 1\n"),
        (["--warmup", "7"], "text.txt [schedule] warmup: got 7, expected at most steps = 6"),
        (["--step", "3"], "unknown flag --step; did you mean --steps?"),
        (["--learning-rate", "3"], "unknown flag --learning-rate; did you mean --lr?"),
        (
            ["--max-tokens", "3"],
            "unknown flag --max-tokens; did you mean --steps (of batch_size * seq_len tokens each)?",
        ),
        (["--seed", "1", "--output", "data_seed", "--lr", "-1"], "--lr: got -1.0"),
        (["--zzz=3"], "unknown flag --zzz; `mygpt train --help` lists all"),
        (["--steps", "many"], "--steps: got 'many', expected a valid integer\n"),
        (["--steps", "1e3"], "--steps: got '1e3', expected a valid integer\n"),
        (["--micro-batch-size", "none"], "--micro-batch-size: got 'none', expected a valid integer\n"),
        (["--lr=a"], "--lr: got 'a', expected a valid number\n"),
        (["--lr", "-1"], "--lr: got -1.0, expected at least 0\n"),
        (["--lr", "-1e-3"], "--lr: got -0.001, expected at least 0\n"),
        (["--schedule", "cosin"], "--schedule: got 'cosin', expected 'constant', 'cosine', 'linear' or 'wsd'\n"),
        (["--lr"], "--lr: expected one argument"),
        (
            ["--save-best", "--output", "--lr", "1"],
            "expected one argument; a value that begins with a dash is given as",
        ),
        (["--compile", "true"], "unexpected argument 'true'; usage: mygpt train RECIPE|TEXT [FLAGS]\n"),
        (["--compile=1"], "--compile: takes no value; expected --compile or --no-compile\n"),
        (["--no-compil"], "unknown flag --no-compil; did you mean --no-compile?\n"),
        (["-lr", "1"], "unknown flag -lr; did you mean --lr?\n"),
        (["--Steps", "1"], "unknown flag --Steps; did you mean --steps?\n"),
        (["--expected-bits-per-byte", "1"], "--expected-bits-per-byte: got (1.0,), expected more values\n"),
        (["more.txt"], "unexpected argument 'more.txt'; usage: mygpt train RECIPE|TEXT [FLAGS]\n"),
    ],
)
def test_bad_flags_are_named(call, text_file, flags, message):
    """The same rules as in a file; a misspelt flag gets a suggestion."""
    code, out, err = call("train", text_file, *FLAGS, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not os.listdir()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (AtOptions, ["run", "3"]),
        (InitOptions, ["text.txt"]),
        (PlotOptions, ["run"]),
        (PrepareOptions, ["text.txt"]),
        (StudyOptions, ["quickstart"]),
    ],
)
def test_out_and_output_are_one_flag(kind, arguments):
    """Of the commands with --out; those with --output, a recipe's key, take --out."""
    for given in (["--out", "x.toml"], ["--output", "x.toml"], ["--out=x.toml"], ["--output=x.toml"]):
        assert parse_options([*arguments, *given], "mygpt", kind, "")[0].out == Path("x.toml")
        assert parse_recipe(["quickstart", *given], "mygpt train")[0].checkpoint.output == "x.toml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "study quickstart --steps 20",
            "unknown flag --steps; give the values of a recipe's key with --set steps=VALUE,VALUE",
        ),
        (
            "study quickstart --learning-rate 1",
            "unknown flag --learning-rate; give the values of a recipe's key with --set lr=VALUE,VALUE",
        ),
        ("study quickstart --epochs 3", "unknown flag --epochs; give the values of a recipe's key with --set steps="),
        ("study quickstart --threads 1", "unknown flag --threads; `mygpt study --help` lists all"),
        ("at nothing 3 --output x", "nothing: no such run; expected a directory that `mygpt train` has written"),
        ("recipe show nope", "nope: no such recipe or text; expected a recipe (one of default, gpt2-124m, hardened, "),
        ("doctor hardend", "hardend: no such recipe or text; did you mean 'hardened'?"),
        ("study quickstart --seed 3", "unknown flag --seed; did you mean --seeds?"),
        ("train quickstart --wandb", "unknown flag --wandb; metrics.jsonl in the run directory has the numbers; "),
        ("train quickstart --gpus 8", "unknown flag --gpus; the launcher starts the processes: "),
        ("generate run --steps 3", "unknown flag --steps; `mygpt generate --help` lists all"),
        ("train", "RECIPE|TEXT missing; usage: mygpt train RECIPE|TEXT [FLAGS]; `mygpt train --help` tells more"),
        ("train --wandb", "unknown flag --wandb; metrics.jsonl in the run directory has the numbers; "),
        ("at run", "STEP and --out missing; usage: mygpt at RUN STEP --out PATH [FLAGS]; `mygpt at --help` tells"),
        ("study quickstart --set", "--set: expected one argument"),
        ("study quickstart --effect 0", "--effect: got 0.0, expected greater than 0"),
        ("study quickstart --side-by-side 0", "--side-by-side: got 0, expected at least 1"),
        ("generate run --top-k -1", "--top-k: got -1, expected at least 0"),
        ("generate run --device gpu", "--device: got 'gpu', expected 'auto', 'cpu', 'cuda' or 'mps'"),
        ("generate", "generate: got nothing, expected one run or checkpoint: mygpt generate RUN"),
        ("generate a --checkpoint b", "generate: got both a and --checkpoint b, expected one run or checkpoint"),
        ("export run", "unknown command 'mygpt export'; RUN/step-NNNNNN/model.safetensors has the weights"),
        ("chat", "unknown command 'mygpt chat'; `mygpt generate RUN --prompt TEXT` continues a text"),
        ("list", "unknown command 'mygpt list'; `mygpt recipe list` lists the recipes"),
        ("sample run", "unknown command 'mygpt sample'; `mygpt generate RUN"),
        ("run quickstart", "unknown command 'mygpt run'; `mygpt train RECIPE` trains"),
        ("resume run", "unknown command 'mygpt resume'; `mygpt train RUN/recipe.toml` continues a run"),
        ("fine-tune run", "unknown command 'mygpt fine-tune'; `mygpt train TEXT --init-from RUN`"),
        ("trian run", "unknown command 'mygpt trian'; did you mean 'train'?"),
        ("xyz", "unknown command 'mygpt xyz'; expected one of init, train, study, "),
        ("plot run --ymin 3", "unknown flag --ymin; did you mean --y-min?"),
        ("eval run --zzz", "unknown flag --zzz; `mygpt eval --help` lists all"),
        ("data info text.txt", "text.txt: a file; expected a folder that `mygpt data prepare` made"),
    ],
)
def test_other_commands_name_what_was_meant(call, text_file, monkeypatch, arguments, message):
    """Flags of other commands, and what is no folder."""
    monkeypatch.chdir(text_file.parent)
    code, out, err = call(*arguments.replace("text.txt", text_file.name).split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mygpt: {message.replace('text.txt', text_file.name)}")


def test_a_text_may_hold_runs(call, text_file, tmp_path, monkeypatch):
    """A named or prepared corpus, given again, is a corpus though there are runs in a folder of its name."""
    monkeypatch.chdir(tmp_path)
    prepare([text_file], Path("tokens"), TokenizerChoice("byte", 0, None))
    for corpus in ("python-docs", "tokens"):
        for _ in range(2):
            code, _, err = call("train", corpus, *FLAGS, "--output", f"{corpus}/run")
            assert code == 0, err


@pytest.mark.fault(24, 25)
def test_impossible_outputs_are_found_before_the_first_step(call, text_file, tmp_path):
    """A file where the run directory, or a folder above it, should be; names that no disk takes."""
    write(tmp_path / "file", "precious")
    for output in (tmp_path / "file", tmp_path / "file" / "run", f"new/{'a' * 300}", ""):
        code, out, err = call("train", text_file, *FLAGS, "--output", output)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "--output" in err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.fault(58)
def test_prompt_outside_the_vocabulary_is_named(call, text_file):
    """The character and its position; nothing is generated."""
    assert call("train", text_file, *FLAGS, "--output", "run")[0] == 0
    code, out, err = call("generate", "--checkpoint", "run", "--prompt", "abc\u1234")
    assert (code, out) == (2, "")
    assert "prompt: character '\u1234' (U+1234) at position 3 is not among the" in err


def test_flags_go_before_or_after_the_recipe(call, tmp_path):
    """And lie over the recipe's values, which lie over the defaults."""
    path = write(tmp_path / "mine.toml", "[train]\nsteps = 7\nseq_len = 8\n")
    for arguments in ((path, "--seq-len", 9), ("--seq-len", 9, path)):
        code, out, _ = call("recipe", "show", *arguments)
        assert code == 0
        assert {"steps = 7", "seq_len = 9", "batch_size = 16", 'output = "checkpoints/mine"'} <= set(out.splitlines())


def test_flag_may_correct_a_recipe(call, tmp_path):
    """Relations between keys are checked after the flags are applied."""
    path = write(tmp_path / "mine.toml", "[schedule]\nwarmup = 3000\n")
    assert call("recipe", "show", path)[0] == 2
    assert call("recipe", "show", path, "--steps", 4000)[0] == 0


def test_name_that_is_not_utf_8_costs_one_line(call, tmp_path, monkeypatch):
    """A recipe cannot hold it; nothing is said of an output that was not given."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some text")
    code, _, err = call("train", name)
    assert (code, err) == (2, "mygpt: caf\\udce9.txt: its name is not UTF-8, as a recipe is; rename it\n")


def test_line_break_in_a_path_is_escaped(call):
    """An error is one line."""
    for arguments in (("train", "no/a\nb.toml"), ("generate", "./a\nb"), ("train", "python-docs", "--corpus=a\nb")):
        code, _, err = call(*arguments)
        assert (code, err.count("\n"), "a\\nb" in err) == (2, 1, True), err


def test_working_directory_that_is_gone_costs_one_line(tmp_path):
    """Importing torch would end the process."""
    (tmp_path / "gone").mkdir()
    program = "import os, sys; os.rmdir(os.getcwd()); from mygpt.cli.main import main; main(['generate', '/absent'])"
    done = run_process([sys.executable, "-c", program], tmp_path / "gone")
    message = "mygpt: the working directory has been removed; change to another one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_ending_of_a_recipe_may_be_in_capitals(call, tmp_path):
    """It is not trained on as a text."""
    path = write(tmp_path / "MINE.TOML", "[train]\nsteps = 3\n")
    code, out, _ = call("recipe", "show", path)
    assert code == 0
    assert "steps = 3" in out
    assert 'output = "checkpoints/MINE"' in out


@pytest.mark.parametrize("columns", [1, 100, 300])
def test_every_key_is_a_flag_with_help(call, monkeypatch, columns):
    """Help names each key and says its first sentence, with the recipe's own values as defaults, on few lines."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call("train", "hardened", "--help")
    assert code == 0
    words = " ".join(out.split())
    for table in Recipe.model_fields.values():
        for key, info in type(table.default).model_fields.items():
            assert f" --{key.replace('_', '-')} " in words
            assert columns == 1 or " ".join(info.description.split()).split(". ")[0].removesuffix(".") in words, key
    assert "[cosine]" in words
    if columns > 1:
        assert max(map(len, out.splitlines())) <= 100
        assert out.count("\n") < 145


def test_help_shows_plain_defaults_where_there_is_no_recipe(call):
    """Before a recipe is named, and where it cannot be read."""
    for arguments in (("train", "--help"), ("--help", "gone.toml"), ("fork", "-h")):
        code, out, err = call(*arguments if arguments[0] != "--help" else ("train", *arguments))
        assert (code, err) == (0, "")
        assert "[constant]" in " ".join(out.split())


def test_values_are_read_as_they_are_given():
    """Flags stand anywhere, numbers may have underscores, and the last of two flags counts."""

    def recipe(*flags):
        return parse_recipe(["quickstart", *flags], "mygpt train")[0]

    assert recipe("--output=--x").checkpoint.output == "--x"
    assert recipe("--steps", "1_000", "--lr", "2e-3").train.steps == 1000
    assert recipe("--lr", "2", "--lr=.5").optimizer.lr == 0.5
    assert recipe("--compile", "--no-compile").runtime.compile is False
    assert recipe("--no_tied_head").model.tied_head is False
    assert recipe("--micro-batch-size", "4", "--micro_batch_size=None").train.micro_batch_size is None
    rows = ("--expected-seeds", "3", "--expected-val", "5", "3.5", "0.1", "9", "3", "0.2")
    expected = recipe(*rows, "--expected-bits-per-byte", "1", "2").expected
    assert expected.expected_val == ((5, 3.5, 0.1), (9, 3.0, 0.2))
    assert expected.expected_bits_per_byte == (1.0, 2.0)
    study = parse_options(["--set", "lr=1,2", "a", "--set=steps=3", "b"], "mygpt study", StudyOptions, "")[0]
    assert (study.recipes, study.set) == (("a", "b"), ("lr=1,2", "steps=3"))
    assert parse_options(["--prompt", "- x"], "mygpt generate", GenerateOptions, "")[0].prompt == "- x"
    spelled = parse_options(["--prompt", "--- my_name is"], "mygpt generate", GenerateOptions, "")[0]
    assert spelled.prompt == "--- my_name is"


def test_shown_recipe_is_the_recipe_of_the_run(call, text_file):
    """`recipe show` prints the run's recipe.toml, which has no output key; and that file trains the same weights."""
    arguments = (text_file, *FLAGS, "--output", "run")
    shown = call("recipe", "show", *arguments)[1]
    assert call("train", *arguments)[0] == 0
    comment, written = Path("run/recipe.toml").read_text(encoding="utf-8").split("\n\n", 1)
    assert comment.startswith("# The run in this directory")
    assert written == shown.replace('output = "run"\n', "")
    assert call("train", "run/recipe.toml", "--output", "again")[0] == 0
    code, out, _ = call("compare", "run", "again")
    assert code == 0
    values = r"identical: \d+ tensors, [\d,]+ values \(step 6\)\n"
    assert re.fullmatch(rf"{values}optimizer and generators {values}metrics identical: 6 records\n", out)


def test_compare_shows_the_differences(call, text_file):
    """Exit 1 and a table; exit 2 where a run is missing."""
    for seed in (0, 1):
        assert call("train", text_file, *FLAGS, "--init-seed", seed, "--output", f"run{seed}")[0] == 0
    code, out, _ = call("compare", "run0", "run1", "--tensors")
    assert code == 1
    assert out.startswith("different: ")
    assert re.search(r"token_embedding\.weight +[\d,]+ of [\d,]+ +\d\.\d{3}e[+-]\d\d +[\d,]+\n", out)
    assert call("compare", "run0", "gone")[0] == 2


@pytest.mark.fault(107)
def test_generate_continues_the_prompt(call, text_file):
    """The same seed and device give the same text; it begins with the prompt and has the length asked for."""
    assert call("train", text_file, *FLAGS, "--output", "run")[0] == 0
    arguments = ("generate", "--checkpoint", "run", "--prompt", "The ", "--max-new-tokens", "30")
    torch.set_float32_matmul_precision("medium")
    texts = [
        call(*arguments, *more)[1] for more in ((), (), ("--seed", 1), ("--temperature", 0), ("--precision", "bf16"))
    ]
    assert all(text.startswith("The ") and len(text) == 35 for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert torch.get_float32_matmul_precision() == "highest"  # fp32 is fp32, as in training
    assert call(*arguments, "--temperature", "1e-300")[1] == texts[3]
    assert call("generate", "run", *arguments[3:])[1] == texts[0]
    for flag, value in (("--temperature", "-1"), ("--temperature", "nan"), ("--top-k", "-1"), ("--seed", "-1")):
        code, _, err = call(*arguments, flag, value)
        assert (code, err.count("\n")) == (2, 1)


def test_unknown_commands_get_a_suggestion(call):
    """As for keys and flags."""
    assert call("trian") == (2, "", "mygpt: unknown command 'mygpt trian'; did you mean 'train'?\n")
    assert call("recipe", "shwo")[2] == "mygpt: unknown command 'mygpt recipe shwo'; did you mean 'show'?\n"
    assert call("recipe", "list", "x")[0] == 2


def test_help_names_every_command(call):
    """With no arguments too."""
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = call(*arguments)
        assert code == 0
        assert all(f"  {name} " in out for name in COMMANDS)
    assert call("--version")[1] == f"mygpt {__version__}\n"


def test_help_and_package_import_neither_torch_nor_pydantic(tmp_path):
    """They answer at once: torch alone takes seconds to import."""
    code = "import sys, mygpt, mygpt.cli.main; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    started_at = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mygpt", "--help"], cwd=tmp_path, check=True, capture_output=True)
    assert time.perf_counter() - started_at < 0.5


def test_generate_into_a_closed_pipe_ends_quietly(command, text_file, tmp_path):
    """`mygpt generate ... | head` prints no traceback."""
    assert command("train", text_file, *FLAGS, "--output", "run").returncode == 0
    shell = f"{sys.executable} -m mygpt generate --checkpoint run --prompt T --max-new-tokens 3000 | head -c 5"
    result = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(result.stdout) == 5
    assert result.stderr == ""


def test_interrupt_ends_without_traceback(text_file, tmp_path):
    """Ctrl-C: exit 130."""
    command = [*MYGPT, "train", text_file, *FLAGS, "--steps", "1000000", "--output", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step     1:"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_progress_bar_is_drawn_on_a_terminal_only(text_file, tmp_path):
    """stderr on a terminal shows steps, time left and throughput; stdout the lines alone."""
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, (30, 100))
    command = [*MYGPT, "train", text_file, *FLAGS, "--output", "run"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=other_end, check=True)
    os.close(other_end)
    drawn = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert re.search(r"6/6 \[.*<.*step.*tokens/s\]", drawn)
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if "loss" in line] == lines[-2:]
    assert "\r" not in done.stdout.decode()


@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_output_does_not_end_a_run(text_file, tmp_path, closed):
    """Training goes on without a terminal, as under a scheduler that closes one of its streams."""
    command = f"{sys.executable} -m mygpt train {text_file} {' '.join(FLAGS)} --output run {closed}>&-"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "run" / "latest").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_stdout_costs_one_line(tmp_path):
    """Exit 1 and a message."""
    command = f"{sys.executable} -m mygpt recipe show default > /dev/full"
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in result.stderr


def test_output_that_is_not_utf_8_escapes_what_it_lacks(tmp_path, command):
    """No character of a corpus stops a command in an ASCII terminal."""
    write(tmp_path / "text.txt", "\u00e9\u4e16" * 200)
    plain = {"PYTHONIOENCODING": "ascii"}
    assert command("train", "text.txt", *FLAGS, "--output", "run", **plain).returncode == 0
    result = command("generate", "--checkpoint", "run", "--prompt", "\u00e9", "--max-new-tokens", "3", **plain)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\xe9")


@pytest.mark.fault(16)
def test_out_of_memory_costs_one_line_and_keeps_the_old_run(text_file, call):
    """A model that no machine holds is found before the run that it would replace is touched."""
    assert call("train", text_file, *FLAGS, "--output", "run")[0] == 0
    code, _, err = call("train", text_file, *FLAGS, "--output", "run", "--overwrite", "--embed-dim", 2**28)
    assert (code, err.count("\n")) == (1, 1)
    assert "out of memory with batch_size = 4, seq_len = 16; lower" in err
    assert os.path.exists("run/step-000006/model.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_named(call, text_file):
    """Never a silent fallback to another."""
    code, out, err = call("train", text_file, *FLAGS, "--device", "cuda")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "device: got cuda, which this machine" in err
    assert not os.listdir()


def test_one_flag_sets_both_seeds(command):
    """For a run that differs in its random numbers alone; not together with one of the two flags."""
    shown = command("recipe", "show", "quickstart", "--seed", 7).stdout
    assert re.findall(r"^(\w+_seed) = (\d+)$", shown, re.MULTILINE) == [("init_seed", "7"), ("data_seed", "7")]
    for flag in ("--init-seed=3", "--data_seed=3"):
        refused = command("recipe", "show", "quickstart", "--seed", 7, flag)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "give --seed alone" in refused.stderr


WITHOUT_POSIX = "import sys; sys.modules |= {'fcntl': None, 'resource': None}; from mygpt.cli.main import main; main()"


def test_system_without_posix_is_refused_where_it_is_needed(tmp_path, text_file):
    """As on Windows: what reads runs works, and what trains or prepares names WSL in one line."""
    subprocess.run([*MYGPT, "train", text_file, *FLAGS, "--val-split", "0.2", "--output", "run"], check=True)

    def run(*arguments):
        command = [sys.executable, "-c", WITHOUT_POSIX, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for arguments in (
        ("--help",),
        ("recipe", "show", "hardened"),
        ("check", "run"),
        ("compare", "run", "run"),
        ("eval", "run"),
        ("generate", "--checkpoint", "run", "--max-new-tokens", 3),
        ("plot", "run"),
    ):
        assert run(*arguments).returncode == 0, arguments
    for arguments in (
        ("train", text_file, *FLAGS, "--output", "other"),
        ("data", "prepare", text_file, "--out", "tokens"),
        ("study", "hardened"),
        ("verify", "run"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "on Windows run mygpt in WSL" in done.stderr
    assert sorted(os.listdir()) == ["loss.png", "run"]
