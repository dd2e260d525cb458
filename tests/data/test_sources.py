"""Finding files, and knowing what they hold: the same wherever a text can be given."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.runs import FLAGS

from mygpt.data.corpus import load_corpus
from mygpt.data.dataset import load_dataset
from mygpt.data.formats import convert_command
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.data.prepared import open_prepared
from mygpt.data.sources import find_sources, read_pieces
from mygpt.errors import CorpusError, MygptError
from mygpt.recipe.tables import DataTable
from mygpt.training.train import train

TEXT = "One line of text.\nAnother line.\n" * 400
BYTES = TokenizerChoice("byte", 0, None)


def archive(kind, member) -> bytes:
    """A zip or tar archive with one file."""
    box = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(box, "w") as file:
            file.writestr("[Content_Types].xml", "<Types/>")
            file.writestr(member, TEXT)
    else:
        with tarfile.open(fileobj=box, mode="w") as file:
            info = tarfile.TarInfo(member)
            info.size = len(TEXT)
            file.addfile(info, io.BytesIO(TEXT.encode()))
    return box.getvalue()


def lines(count) -> str:
    return "".join(json.dumps({"text": f"Document {number} of some."}) + "\n" for number in range(count))


FOREIGN = {
    "utf-16-with-mark": (
        TEXT.encode("utf-16"),
        r"a\.txt: UTF-16 text; convert it: iconv -f utf-16 -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "utf-16-le": (
        TEXT.encode("utf-16-le"),
        r"UTF-16 text; convert it: iconv -f utf-16le -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "utf-16-be": (
        TEXT.encode("utf-16-be"),
        r"UTF-16 text; convert it: iconv -f utf-16be -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "utf-32-with-mark": (
        TEXT.encode("utf-32"),
        r"UTF-32 text; convert it: iconv -f utf-32 -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "utf-32-le": (
        TEXT.encode("utf-32-le"),
        r"UTF-32 text; convert it: iconv -f utf-32le -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "nul": (TEXT.encode() * 9 + b"\0", r"not a text: byte 0x00 at offset 115200; remove such bytes"),
    "windows-1252": (
        TEXT.encode() + b"caf\xe9",
        r"not UTF-8: byte 0xe9 at offset 12803; convert it .*cp1252 -t utf-8 \S*a\.txt > \S*a-utf8\.txt$",
    ),
    "zip": (archive("zip", "a.txt"), r"a\.txt: a zip archive; unpack it: unzip \S*a\.txt$"),
    "word": (archive("zip", "word/document.xml"), r"a Word document; save it as plain text"),
    "tar": (archive("tar", "a.txt"), r"a tar archive; unpack it: tar -xf \S*a\.txt$"),
    "tar-gzip": (gzip.compress(archive("tar", "a.txt")), r"a tar archive; unpack it: tar -xf \S*a\.txt$"),
    "xz": (lzma.compress(TEXT.encode()), r"an xz file; decompress it: xz -dk \S*a\.txt$"),
    "bzip2": (bz2.compress(TEXT.encode()), r"a bzip2 file; decompress it: bunzip2 -k \S*a\.txt$"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n" * 400, r"a PDF; extract its text first, such as with pdftotext$"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.fault(87)
def test_what_is_no_text_is_named_and_refused_alike_for_training_and_preparing(tmp_path, case):
    """With the way to its text; also what is ASCII, or valid UTF-8, throughout."""
    content, message = FOREIGN[case]
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    messages = set()
    for read in (
        lambda: load_corpus(str(file)),
        lambda: load_dataset(DataTable(corpus="python-docs", val_corpus=str(file)), 16),
        lambda: prepare(find_sources([str(file)]), tmp_path / "out", BYTES),
    ):
        with pytest.raises(CorpusError, match=message) as caught:
            read()
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.fault(87)
def test_every_command_refuses_the_same_text_with_the_same_line(call, tiny, tmp_path, monkeypatch):
    """UTF-16 without a byte order mark, which is valid UTF-8, too."""
    monkeypatch.chdir(tmp_path)
    run = train(tiny(steps=1))
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-16-le"))
    printed = {
        call(*arguments)[::2]
        for arguments in (
            ("train", "a.txt", *FLAGS),
            ("train", "python-docs", "--val-corpus", "a.txt", "--val-every", "3", *FLAGS),
            ("doctor", "a.txt"),
            ("eval", run, "--corpus", "a.txt"),
            ("init", "a.txt"),
            ("data", "prepare", "a.txt", "--out", "out"),
        )
    }
    convert = "iconv -f utf-16le -t utf-8 a.txt > a-utf8.txt"
    assert printed == {(2, f"mygpt: a.txt: UTF-16 text; convert it: {convert}\n")}
    assert convert_command(Path("b c.txt.gz"), "cp1252") == (
        "gzip -dc 'b c.txt.gz' | iconv -f cp1252 -t utf-8 > 'b c-utf8.txt'"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "run"}


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.jsonl", lines(50).encode(), "JSON Lines"),
        ("a.json", lines(50).encode(), "JSON Lines"),
        ("a.json", b'[\n {"text": "One"},\n {"text": "Two"}\n]\n', "a JSON array"),
        ("a.csv", b"n,text\n1,One\n", "CSV"),
        ("a.txt.gz", gzip.compress(TEXT.encode()), "a gzip file"),
        ("a b.txt", gzip.compress(TEXT.encode()), "a gzip file"),
    ],
)
@pytest.mark.fault(91)
def test_file_of_documents_is_not_trained_on_as_text_and_the_command_in_the_message_prepares_it(
    call, tmp_path, monkeypatch, name, content, form
):
    """Its braces and commas would be learned, and a compressed file is no text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    code, _, err = call("train", name, *FLAGS)
    assert code == 2
    head, _, command = err.partition("prepare it, and give the folder: ")
    assert head == f"mygpt: {name}: {form}; " + "copy it to a .txt to take it as it is, or " * ("gzip" not in form)
    _, *arguments = shlex.split(command)
    assert call(*arguments, "--tokenizer", "byte")[0] == 0
    assert open_prepared(tmp_path / arguments[-1]).manifest.documents == {"JSON Lines": 50, "a JSON array": 2}.get(
        form, 1
    )


def test_json_that_is_no_records_is_one_text(tmp_path):
    """For training and for preparing; in a folder it is left out."""
    content = json.dumps({"name": "settings", "values": [1, 2, 3]}, indent=1)
    (tmp_path / "a.json").write_text(content)
    assert load_corpus(str(tmp_path / "a.json")).text == content
    prepare([tmp_path / "a.json"], tmp_path / "out", BYTES)
    corpus = open_prepared(tmp_path / "out")
    assert corpus.decode(corpus.tokens[:-1]) == content
    with pytest.raises(CorpusError, match=r"no texts in it, only: \.json without 'text' \(1\), prepared corpus \(1\)"):
        find_sources([str(tmp_path)])


def test_json_that_is_taken_as_a_text_is_named(call, tmp_path, monkeypatch):
    """Once, as it may have been meant as records; records, and other texts, are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"text": "a",}\n{"text": "b"}\n' * 99)
    (tmp_path / "b.json").write_text('{"text": "a"}\n')
    reason = "taken as plain text: it is no JSON array of objects, and its first line is no JSON object"
    for arguments in (
        ("data", "prepare", "a.json", "b.json", "--tokenizer", "byte", "--out", "tokens"),
        ("train", "a.json", *FLAGS),
    ):
        code, _, err = call(*arguments)
        assert (code, err.count("taken as plain text")) == (0, 1), err
        assert f"a.json: {reason}" in err


def test_long_and_quoted_fields_of_csv(tmp_path, monkeypatch):
    """A field may have line ends, and be longer than Python's csv module reads by default."""
    monkeypatch.setattr("mygpt.data.sources.BLOCK", 100)
    document = 'a "quoted" line\r\nand, another\n' * 9000
    (tmp_path / "a.csv").write_text('body,n\n"' + document.replace('"', '""') + '",1\n', newline="")
    prepare([tmp_path / "a.csv"], tmp_path / "out", BYTES, field="body")
    corpus = open_prepared(tmp_path / "out")
    assert corpus.decode(corpus.tokens[:-1]) == document


def test_field_that_no_source_has_use_for_is_a_mistake(call, tmp_path, monkeypatch):
    """It would be believed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    for command in (("init", "a.txt"), ("data", "prepare", "a.txt", "--out", "out")):
        code, _, err = call(*command, "--field", "body")
        assert code == 2
        assert err == (
            "mygpt: --field body: no source has such a field; correct it, or leave it out if all sources are plain "
            "texts\n"
        )
    code, _, err = call("init", "python-docs", "--field", "body")
    assert (code, err) == (2, "mygpt: --field body: python-docs has no fields; leave it out\n")
    (tmp_path / "b.csv").write_text("body\nsome text\n")
    assert call("data", "prepare", "a.txt", "b.csv", "--field", "body", "--tokenizer", "byte", "--out", "out")[0] == 0


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("a.json", '[{"text": "a"}]\n[{"text": "a"},', "after record 1: expected , and an object, or ]"),
        ("a.json", '[{"text": "a"}, 5,', "after record 1: expected , and an object, or ]"),
        ("a.csv", 'text\n"never closed\n', "not CSV: field larger than field limit (5000)"),
    ],
)
def test_damaged_records_are_refused_before_the_rest_of_the_file_is_read(tmp_path, monkeypatch, name, start, message):
    """It would be held in memory. Here it ends with a byte that is not UTF-8."""
    monkeypatch.setattr("mygpt.data.sources.BLOCK", 1000)
    monkeypatch.setattr("mygpt.data.sources.HEAD", 1000)
    monkeypatch.setattr("mygpt.data.sources.MAX_RECORD", 5000)
    (tmp_path / name).write_bytes(start.encode() + b"a line of some\n" * 1000 + b"\xff")
    with pytest.raises(CorpusError, match=re.escape(message)):
        prepare([tmp_path / name], tmp_path / "out", BYTES)


def test_json_array_may_have_white_space_and_a_character_across_blocks(tmp_path, monkeypatch):
    """A block may hold white space alone, or a part of one character, which is no text yet."""
    monkeypatch.setattr("mygpt.data.sources.BLOCK", 1)
    monkeypatch.setattr("mygpt.data.sources.HEAD", 16)
    content = "\ufeff [ \n\n {'text': 'One'} \n ,\n  {'text': '\U0001f600 two'}\n ] \n ".replace("'", '"')
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    pieces = read_pieces(tmp_path / "a.json", "text", [])
    assert [piece.text for piece in pieces] == ["One", "\U0001f600 two"]


# ---- Folders


def test_tinyshakespeare_is_a_source(shakespeare):
    """As `train` and `init` take the name."""
    assert find_sources(["tinyshakespeare"]) == [shakespeare]


def test_what_a_folder_has_beside_texts_is_said(tmp_path, capsys):
    """By ending and number, the most first; records of JSON and CSV are read, where they have the field."""
    for name, content in {
        "README.md": "about these data",
        "data.json": lines(9),
        "names.csv": "name,age\nAda,36\n",
        "b.csv": "text,age\nsome words,36\n",
        "settings.json": "{}",
        "sub/a.PNG": "",
        "sub/b.png": "",
        "sub/c.txt.xz": "",
        "sub/d.xz": "",
        "LICENSE": "words",
    }.items():
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "data" / name).write_text(content)
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    found = find_sources([str(tmp_path / "data")])
    assert [file.name for file in found] == ["README.md", "b.csv", "data.json"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'data'}: left out: .xz (2), .PNG (1), .csv without 'text' (1), .json without 'text' (1), "
        ".png (1), link to a folder (1), no ending (1)\n"
    )
    with pytest.raises(CorpusError, match="--field txet: no source has such a field; correct it"):
        find_sources([str(tmp_path / "data")], "txet")  # and README.md remains


@pytest.mark.fault(88)
def test_runs_and_prepared_corpora_in_a_folder_are_no_sources(tiny, tmp_path, capsys):
    """Their JSON would be read as text. The count of each is said."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "metrics.jsonl").write_text(lines(9))
    train(tiny(steps=1))
    prepare([tmp_path / "a.txt"], tmp_path / "tokens", BYTES)
    capsys.readouterr()
    assert [file.name for file in find_sources([str(tmp_path)])] == ["a.txt", "metrics.jsonl"]
    assert capsys.readouterr().err == f"note: {tmp_path}: left out: prepared corpus (1), run directory (1)\n"


def test_folder_of_code_is_answered_with_the_pattern_that_reads_it(call, tmp_path, monkeypatch):
    """Its files have no ending of a text."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.PY", "sub/b.PY", "sub/c.toml"):
        (tmp_path / "my code" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "my code" / name).write_text(f"# {name}\n")
    code, _, err = call("data", "prepare", "my code", "--out", "out")
    assert (code, err.splitlines()) == (
        2,
        [
            "mygpt: my code: no texts in it, only: .PY (2), .toml (1); to read all .PY as texts: 'my code/**/*.PY'",
        ],
    )
    pattern = shlex.split(err.rpartition("texts: ")[2])
    assert call("data", "prepare", *pattern, "--tokenizer", "byte", "--out", "out")[0] == 0
    assert open_prepared(tmp_path / "out").manifest.documents == 2


# ---- Copies


@pytest.mark.fault(89)
def test_content_that_is_there_twice_counts_once(call, tmp_path, monkeypatch):
    """Under another name or compressed; a note names both files. What differs at its end alone is no copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mygpt.data.formats.HEAD", 64)
    monkeypatch.setattr("mygpt.data.sources.HEAD", 64)
    (tmp_path / "dup").mkdir()
    for name, content in {
        "a.jsonl": lines(20),
        "b.jsonl": lines(20) + " ",
        "c.json": lines(20),
        "d.txt": lines(20),
        "e.txt": "",
        "f.txt": "",
    }.items():
        (tmp_path / "dup" / name).write_text(content)
    (tmp_path / "dup" / "a.jsonl.gz").write_bytes(gzip.compress(lines(20).encode()))
    code, _, err = call("data", "prepare", "dup", "--tokenizer", "byte", "--out", "out")
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("note: dup")] == [
        "note: dup/a.jsonl.gz: passed over: it holds the same as dup/a.jsonl",
        "note: dup/c.json: passed over: it holds the same as dup/a.jsonl",
    ]
    manifest = open_prepared(tmp_path / "out").manifest
    assert [os.path.basename(source.path) for source in manifest.sources] == [
        "a.jsonl",
        "b.jsonl",
        *("d.txt", "e.txt"),
        "f.txt",
    ]
    assert manifest.documents == 43


def test_many_copies_are_counted(tmp_path, capsys):
    """Not a line for each."""
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("the same")
    assert len(find_sources([str(tmp_path)])) == 1
    *named, last = capsys.readouterr().err.splitlines()
    assert len(named) == 5
    assert last == "note: 3 more files passed over that hold the same as another"


def test_only_foreign_files_are_refused(tmp_path):
    """Text that only looks like another format somewhere else than where that has its mark."""
    for text in ("PDF files begin with %PDF-1.7", "ustar " * 50, "BZh", "[1, 2]", "{not json}\n", "caf\u00e9 \u2013"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert load_corpus(str(tmp_path / "a.json")).text == text


def test_missing_field_of_a_named_file_is_a_mistake(tmp_path):
    """In a folder such a file is left out; what is named is wanted."""
    (tmp_path / "a.csv").write_text("name,age\nAda,36\n")
    with pytest.raises(MygptError, match="has no column 'text' but name, age"):
        prepare(find_sources([str(tmp_path / "a.csv")]), tmp_path / "out", BYTES)


def test_name_that_cannot_be_a_path_is_a_mistake(call):
    """As one that is too long."""
    code, _, err = call("data", "prepare", name := "x" * 300, "--out", "o")
    assert (code, err) == (2, f"mygpt: {name}: File name too long; expected a file, a folder or a pattern\n")
