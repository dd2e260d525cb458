"""The README and the pages in docs/: every command and example runs, shortened, and every link leads somewhere."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.commands import BIN, REPOSITORY, run_process

from mygpt.recipe.flags import parse_recipe

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# In the order of the README's table, since commands use the runs that earlier ones made.
PAGES = re.findall(r"^\| \[.+?\]\((docs/.+?\.md)\) \|", README, re.MULTILINE)
TEXTS = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in ["README.md", *PAGES]}
BLOCKS = [
    (page, *block)
    for page, text in TEXTS.items()
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "checkpoints" / "README.md"])
PROGRAM = [path for path in REPOSITORY.glob("[mrs]*/**/*") if path.suffix in (".py", ".toml")]
COMMANDS = [line for _, language, block in BLOCKS if language == "sh" for line in block.splitlines()]
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "

# A training command is cut down to these, so that step 1999 of 2000 becomes step 3 of 4.
SHORTER = {"steps": 4, "warmup": 2, "val_every": 2, "embed_dim": 16, "max_seq_len": 16, "seq_len": 16, "save_every": 3}
SHORTER_STEPS = {
    '"tinyshakespeare"': '"tinyshakespeare.txt"',
    "step-001999": "step-000003",
    "verify checkpoints/hardened --steps 200": "verify checkpoints/hardened --steps 2",
    "step-002000": "step-000004",
    **{f"hardened{between}{step}": f"hardened{between}2" for between in (" ", "-at-") for step in (1000, 1234)},
}
# And a benchmark to one turn of a few steps.
SHORTER_BENCHMARKS = {
    "step.py": ["--rounds", "1", "--steps-per-round", "2"],
    "saving.py": ["--rounds", "1"],
    "devices.py": ["--rounds", "1", "--processes", "1", "2", "--turns", "1", "--steps-per-turn", "2", "--threads", "1"],
}


def shorten(words: list[str]) -> list[str]:
    """A command that does less; one that trains gets smaller values, in place where it names a key, else at its end."""
    words = [f"{word}.txt" if word == "tinyshakespeare" else word for word in words]  # any text does
    if "generate" in words:
        return [*words, "--max-new-tokens", "20"]
    if words[1:2] == ["study"]:
        words[words.index("--seeds") + 1] = "2"
        values = {"corpus": "tinyshakespeare.txt", **SHORTER}
        return [*words, *(part for key, value in values.items() for part in ("--set", f"{key}={value}"))]
    if not ({"train", "doctor"} & set(words) or any(word.endswith(".py") for word in words)):
        return words
    target = next(i for i, word in enumerate(words) if word in ("train", "doctor") or word.endswith(".py")) + 1
    recipe, _ = parse_recipe(words[target:], "mygpt train")
    values = {key: value for _, table in recipe for key, value in table}
    if words[target].endswith(".toml") or "/" not in words[target]:
        # Any text does for seeing that a command runs. The output is that of the recipe without these changes.
        words += ["--corpus", "tinyshakespeare.txt"]
        words += ["--output", recipe.checkpoint.output] * ("--output" not in words)
    for key, value in SHORTER.items():
        flag = f"--{key.replace('_', '-')}"
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        elif values[key]:
            words += [flag, str(value)]
    return words + SHORTER_BENCHMARKS.get(Path(words[target - 1]).name, ["--threads", "1"])


def programs(language: str, block: str) -> list[list[str]]:
    """What a block asks to run, shortened: a Python example, or each command of a shell's but setting up."""
    for step, shorter in SHORTER_STEPS.items():
        block = block.replace(step, shorter)
    if language == "python":
        return [["python", "-W", "ignore::ResourceWarning", "-c", block]]
    commands = [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split(" && ")]
    commands = [words for words in commands if words[0] not in ("python3", ".", "pip", "pytest")]
    # The README's is the guide's with other flags, and takes 20 seconds.
    commands = [words for words in commands if words[:2] != ["mygpt", "init"] or "--out" in words]
    return [shorten(words) for words in commands]


def anchors(document: Path) -> list[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_readme_names_every_page():
    """In its table, each page once; and the pages hold no block of a kind that no test runs."""
    assert sorted(PAGES) == sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/*.md"))
    assert {language for _, language, _ in BLOCKS} == {"sh", "python", "toml"}
    assert sum(text.count("```") for text in TEXTS.values()) == 2 * len(BLOCKS)


def test_fresh_machine_commands_are_the_ones_that_ci_runs():
    """Set-up line by line, then two commands from nothing: the main job, and the tests. CI starts from the second."""
    first, second = (line for line in COMMANDS if line.startswith(SETUP))
    assert COMMANDS[:3] == [*SETUP.split(" && ")[:2], SETUP.split(" && ")[2] + "-e '.[report]'"]
    assert [line.split()[1] for line in COMMANDS[3:6]] == ["train", "generate", "plot"]
    assert first == SETUP + "-e '.[report]' && accelerate launch scripts/train.py recipes/hardened.toml"
    assert second == SETUP + "-e '.[dev]' && pytest -n 2 --dist worksteal"
    assert "README.md" in (REPOSITORY / ".ci" / "run").read_text()


def test_page_for_students_has_the_lines_that_the_readme_says():
    """The whole method, in one file that imports nothing of mygpt."""
    code = (REPOSITORY / "scripts" / "benchmarks" / "reference.py").read_text(encoding="utf-8")
    assert f" {len(code.splitlines())} lines of plain PyTorch" in README
    assert not re.search(r"^(from|import) mygpt", code, re.MULTILINE)


def test_nothing_says_to_install_mygpt_from_a_registry():
    """Messages and pages name the package that is missing: the mygpt of PyPI is another project."""
    texts = {path: path.read_text(encoding="utf-8") for path in [*DOCUMENTS, *PROGRAM]}
    assert not [
        (path, line) for path, text in texts.items() for line in re.findall(r"pip install [^&`\n]*mygpt.*", text)
    ]
    assert sum("pip install " in text for text in texts.values()) > 5


@pytest.mark.slow
def test_every_command_and_example_runs(text_file, tmp_path):
    """In the pages' order, from a folder like a checkout, so that later commands find what earlier ones made."""
    for folder in ("recipes", "scripts", "tests"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "tinyshakespeare.txt").symlink_to(text_file)
    ran, printed = 0, {}
    for page, language, block in BLOCKS:
        for words in programs(language, block) if language != "toml" else []:
            result = run_process([BIN / words[0], *words[1:]], tmp_path, environment={"OMP_NUM_THREADS": "1"})
            # `compare` finds the runs identical that the pages say are: it would exit with 1 otherwise.
            assert result.returncode == 0, f"{page}: {shlex.join(words)}\n{result.stdout}{result.stderr}"
            assert "no such run" not in result.stderr, f"{page}: {shlex.join(words)}\n{result.stderr}"
            ran += 1
            printed[page, language] = result.stdout
    assert ran >= 30
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert printed["docs/guide.md", "python"].startswith("ROMEO:")
    assert "loss = " in printed["docs/guide.md", "python"]
    assert (tmp_path / "checkpoints" / "mine.safetensors").is_file()
    assert ", 16)" in printed["docs/run-directory.md", "python"]


def test_recipe_example_is_a_recipe(tmp_path):
    """The TOML that a page shows can be run."""
    (example,) = [block for _, language, block in BLOCKS if language == "toml"]
    (tmp_path / "mine.toml").write_text(example)
    recipe, _ = parse_recipe([str(tmp_path / "mine.toml")], "mygpt train")
    assert recipe.validation.sampling == "full"


def test_every_key_is_in_the_table():
    """The table of keys is whole, and default.toml explains each of them."""
    from mygpt.recipe.tables import TABLE_OF_KEY

    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", TEXTS["docs/recipes.md"], re.MULTILINE))
    named = {key: table for table, keys in rows.items() for key in re.findall(r"`(\w+)`", keys)}
    assert named == TABLE_OF_KEY
    spelled_out = (REPOSITORY / "recipes" / "default.toml").read_text()
    assert all(re.search(rf"^(# )?{key} = ", spelled_out, re.MULTILINE) for key in TABLE_OF_KEY)


def test_guide_names_what_python_can_import():
    """The public names of mygpt and of mygpt.course are in the guide."""
    import mygpt.course

    assert not [name for name in mygpt.__all__ + mygpt.course.__all__ if f"`{name}`" not in TEXTS["docs/guide.md"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document):
    """To a file that exists, and where a link has an anchor, to a heading of that file."""
    assert len(set(anchors(document))) == len(anchors(document))
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = document.parent / file if file else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    assert shutil.which("mygpt", path=str(BIN))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_named_files_are_there(document):
    """Each file of the program that a document names is there, by its path from the checkout or from mygpt/."""
    for name in re.findall(r"`([\w.-]+/[\w./-]*\.(?:py|toml|yaml|sh))`", document.read_text(encoding="utf-8")):
        assert (REPOSITORY / name).is_file() or (REPOSITORY / "mygpt" / name).is_file(), name
