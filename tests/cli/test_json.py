"""The answers of commands as JSON: documents with the fields that the reference names, and nothing else on stdout."""

import json
import re

import pytest
from support.commands import REPOSITORY
from support.fault_points import POINTS

from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.errors import NonFiniteError
from mygpt.runs.records import Record
from mygpt.training.train import train

REFERENCE = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
SECTION = REFERENCE[REFERENCE.index("## Answers as JSON") : REFERENCE.index("## Exit codes and streams")]
ROWS = dict(re.findall(r"^\| `(.+?)` \| (.*) \|$", SECTION, re.MULTILINE))


ESTIMATE = {"mean", "stderr", "dof", "interval"}
TENSOR = {"name", "differing", "of", "problem", "max_abs", "max_ulp"}
OF_OTHER_ROWS = {
    "eval": ESTIMATE,
    "compare": TENSOR | ESTIMATE | {*Record.model_fields},
    "check": {*Record.model_fields},
    "bisect": TENSOR,
}
"""Fields that the row of a command names as what they are."""
MAY_BE_ABSENT = {"verify": TENSOR, "check": {"value", "mean", "margin"}}
"""Fields of lists that are empty here: nothing differs, and nothing is known of other seeds."""


def documented(command: str) -> set[str]:
    """The names in the row of a command."""
    return set(re.findall(r"`(\w+)`", ROWS[command])) - ROWS.keys()


def names_in(document) -> set[str]:
    """All keys of a document, at every level."""
    if isinstance(document, list):
        return set().union(*map(names_in, document))
    return {*document}.union(*map(names_in, document.values())) if isinstance(document, dict) else set()


@pytest.fixture
def runs(tiny, tmp_path, monkeypatch):
    """Two runs that differ from step 1, and a prepared corpus."""
    monkeypatch.chdir(tmp_path)
    keys = {"val_split": 0.2, "val_every": 3, "save_every": 3, "sampling": "full"}
    first = train(tiny(**keys))
    second = train(tiny(**keys, output=str(tmp_path / "second"), data_seed=1))
    return first, second


def answer(call, *arguments, code=0) -> dict:
    """The document that a command prints."""
    got, out, _ = call(*arguments, "--json")
    assert got == code
    return json.loads(out)


def test_every_answer_is_documented(runs, call, text_file, tmp_path):
    """Each command of the reference's table gives the fields of its row, at every level, and no others."""
    first, second = runs
    prepare([text_file], tmp_path / "tokens", TokenizerChoice("byte", 0, None))
    answers = {
        "eval": answer(call, "eval", first),
        "compare": answer(call, "compare", first, second, code=1),
        "check": answer(call, "check", first),
        "verify": answer(call, "verify", first),
        "at": answer(call, "at", first, 2, "--out", tmp_path / "at"),
        "bisect": answer(call, "bisect", first, second, code=1),
        "doctor": answer(call, "doctor", text_file, "--threads", 1),
    }
    assert documented("verify") >= TENSOR
    assert ", ".join(f'"{name}"' for name in ("mean", "stderr", "dof", "interval")) in SECTION
    for command, document in answers.items():
        found = names_in(document)
        assert found <= documented(command) | OF_OTHER_ROWS.get(command, set()), command
        assert documented(command) - found <= MAY_BE_ABSENT.get(command, set()), command
    different = answers["compare"]["weights"]["different"][0]
    assert 0 < different["differing"] <= different["of"]
    info = answer(call, "data", "info", tmp_path / "tokens")
    assert info == {"vocab_size": 257, **json.loads((tmp_path / "tokens" / "manifest.json").read_text())}
    assert ROWS.keys() == answers.keys() | {"replay", "study", "data info"}
    held_out = answers["compare"]["held_out"]
    assert held_out["b_minus_a"]["nats_per_token"]["interval"][0] < held_out["b_minus_a"]["nats_per_token"]["mean"]
    assert answers["bisect"]["step"] == 1
    assert answers["verify"]["identical"] is True


def test_answer_about_a_failed_step(tiny, call, monkeypatch):
    """Infinite values are null: JSON has none."""
    step = POINTS["before-step"]
    original = getattr(step.owner, step.name)
    with monkeypatch.context() as patch:
        patch.setattr(
            step.owner, step.name, lambda *args: (update := original(*args))._replace(loss=update.loss * float("nan"))
        )
        with pytest.raises(NonFiniteError):
            train(tiny())
    document = answer(call, "replay", tiny().checkpoint.output, "--device", "cpu", code=1)
    assert document.keys() == documented("replay")
    assert document["first_non_finite"] is None
    assert document["step"] == 1


def test_study_prints_its_file(call, tmp_path, monkeypatch, text_file):
    """The document is that of study.json, which has the documented fields."""
    from support.runs import TINY

    from mygpt.recipe.tables import Recipe

    monkeypatch.chdir(tmp_path)
    keys = {key: value for key, value in TINY.items() if key != "threads"}
    recipe = Recipe.of(**keys, corpus=str(text_file), val_split=0.2, val_every=6)
    (tmp_path / "small.toml").write_text(recipe.to_toml())
    document = answer(call, "study", "small.toml", "--seeds", 2, "--out", "study", "--no-picture", "--side-by-side", 1)
    assert document == json.loads((tmp_path / "study" / "study.json").read_text())
    assert document.keys() <= documented("study")
