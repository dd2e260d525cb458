"""Prepared corpora: sources of every format, kills, damage, and training on them."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from support.commands import wait_for
from support.fault_points import disturb
from support.runs import FLAGS, contents

from mygpt.checks.replay import replay
from mygpt.data import prepare as preparing
from mygpt.data import prepared as prepared_files
from mygpt.data.batches import windows
from mygpt.data.bpe import train_bpe
from mygpt.data.dataset import Dataset, load_dataset
from mygpt.data.prepare import TokenizerChoice, prepare, take_sample
from mygpt.data.prepared import open_prepared
from mygpt.data.sources import find_sources
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import CorpusError, DamagedCorpusError, DiskError, MygptError
from mygpt.recipe.tables import DataTable
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

KINDS = {
    "char": TokenizerChoice("char", 0, None),
    "byte": TokenizerChoice("byte", 0, None),
    "bpe": TokenizerChoice("bpe", 260, None),
}
DOCUMENTS = ["First one, añ€😀 with\r\nline ends.\n", "", "a b  c\n\n" * 300, "last"]


@pytest.fixture
def small(monkeypatch):
    """Blocks and chunks of a few hundred characters, and a journal that is synced after each."""
    monkeypatch.setattr("mygpt.data.sources.BLOCK", 100)
    monkeypatch.setattr(preparing, "CHUNK", 300)
    monkeypatch.setattr("mygpt.data.bpe.PIECE", 50)
    monkeypatch.setattr(preparing, "SYNC_SECONDS", 0.0)


def write(folder, documents=DOCUMENTS):
    """The same documents in every format, each in a folder of its own."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = [{"text": text, "other": 1} for text in documents]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([("n", "text"), *enumerate(documents)])
    texts = {f"t/{number}.txt": text.encode() for number, text in enumerate(documents)}
    frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:50], lines[50:])]
    files = {
        **texts,
        "j/a.jsonl": lines,
        "g/a.jsonl.gz": gzip.compress(lines[:70]) + gzip.compress(lines[70:]),
        "z/a.jsonl.zst": b"".join(frames),
        "jl/a.json": lines,
        "ja/a.json": b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode(),
        "jg/a.json.gz": gzip.compress(json.dumps(records, ensure_ascii=False).encode()),
        "c/a.csv": b"\xef\xbb\xbf" + rows.getvalue().encode(),
        "cg/a.csv.gz": gzip.compress(rows.getvalue().encode()),
        **{f"tg/{name[2:]}.gz": gzip.compress(text) for name, text in texts.items()},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "p" / "a.parquet", row_group_size=2)
    return ["t", "j", "g", "z", "tg", "p", "jl", "ja", "jg", "c", "cg"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_format_gives_the_same_tokens(tmp_path, small, kind):
    """Each document, with a token at its end, as the tokenizer encodes it whole; the hashes of all sources."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    pytest.importorskip("zstandard", reason="needs zstandard")
    found = {}
    for name in write(tmp_path):
        sources = find_sources([str(tmp_path / name)])
        manifest = prepare(sources, tmp_path / f"out-{name}", KINDS[kind])
        corpus = open_prepared(tmp_path / f"out-{name}")
        found[name] = corpus.tokens.tolist()
        assert [source.path for source in manifest.sources] == [str(source) for source in sources]
        assert manifest.documents == len(DOCUMENTS)
        assert manifest.text_bytes == len("".join(DOCUMENTS).encode())
        expected = []
        for text in DOCUMENTS:
            expected += [*corpus.tokenizer.encode(text).tolist(), corpus.tokenizer.end_of_text]
        assert found[name] == expected
    assert all(tokens == found["t"] for tokens in found.values())
    with safe_open(tmp_path / "out-t" / "tokens.safetensors", "numpy") as tensors:
        assert tensors.get_tensor("tokens").tolist() == found["t"]


def test_sources_are_found_by_name_folder_and_pattern(tmp_path):
    """Each once, in the order of paths; other files in a folder are left out."""
    for name in ("b.txt", "a.jsonl.gz", "sub/c.md", "d.png", "e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    relative = [str(path.relative_to(tmp_path)) for path in find_sources([str(tmp_path)])]
    assert relative == ["a.jsonl.gz", "b.txt", "sub/c.md"]
    by_name = find_sources([str(tmp_path / "e"), str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.md"), str(tmp_path)])
    assert [path.name for path in by_name] == ["e", "b.txt", "c.md", "a.jsonl.gz"]


class Killed(BaseException):
    pass


@contextmanager
def killed_after(chunks):
    """Inside, a command dies when it has encoded so many chunks."""
    encode, left = preparing.encode_chunk, chunks

    def encode_or_die(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return encode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "encode_chunk", encode_or_die)
        yield


def prepare_and_die(chunks, *arguments):
    """Prepare, and be killed after so many chunks."""
    with killed_after(chunks), pytest.raises(Killed):
        prepare(*arguments, workers=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(71)
def test_command_that_is_killed_again_and_again_gives_the_same_bytes(tmp_path, small, kind, text):
    """At random points; a journal or tokens that were cut short, too."""
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(200)))
    sources = find_sources([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    prepare(sources, tmp_path / "whole", KINDS[kind])
    seed, counts = random.Random(0), []
    for kill in range(12):
        try:
            with killed_after(seed.randrange(1, 12)):
                prepare(sources, tmp_path / "killed", KINDS[kind], workers=2)
            break
        except Killed:
            partial = tmp_path / ".tmp-killed"
            counts.append((partial / "journal").stat().st_size // preparing.RECORD.size)
            name = seed.choice(["journal", "tokens.safetensors"])
            if kill % 3 == 2:
                os.truncate(partial / name, max(0, (partial / name).stat().st_size - 7))
    if not (tmp_path / "killed").exists():
        prepare(sources, tmp_path / "killed", KINDS[kind])
    assert max(counts) > 10
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.jsonl", "whole", "killed"}


@pytest.mark.slow
@pytest.mark.fault(71)
def test_sigkill_at_any_moment(tmp_path, text):
    """The command itself, killed ten times after random times, ends with the bytes of one never killed."""
    (tmp_path / "a.txt").write_text(text * 400, encoding="utf-8", newline="")
    command = [sys.executable, "-m", "mygpt", "data", "prepare", "a.txt", "--tokenizer", "bpe", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    seed = random.Random(1)
    for _ in range(10):
        process = subprocess.Popen([*command, "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        wait_for(lambda: (tmp_path / ".tmp-killed").exists() or (tmp_path / "killed").exists())
        try:
            process.wait(seed.uniform(0, 1.5))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
    if not (tmp_path / "killed").exists():
        subprocess.run([*command, "killed"], cwd=tmp_path, check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.fault(73)
@pytest.mark.parametrize("kind", KINDS)
def test_source_that_changes_in_between_is_read_anew(tmp_path, small, kind):
    """From the first chunk whose text is another one; a tokenizer that is made of the text is made again."""
    (tmp_path / "a.txt").write_text("the old text. " * 200)
    prepare_and_die(5, [tmp_path / "a.txt"], tmp_path / "out", KINDS[kind])
    text = "the old text. " * 30 + "a new text! " * 100
    (tmp_path / "a.txt").write_text(text)
    prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS[kind])
    corpus = open_prepared(tmp_path / "out")
    assert corpus.tokenizer.decode(corpus.tokens[:-1].tolist()) == text
    prepare([tmp_path / "a.txt"], tmp_path / "whole", KINDS[kind])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8: byte 0xff at offset 3; convert"),
        ("a.txt", b"ab" * 60 + b"\xe2\x82", r"a\.txt: not UTF-8: byte 0xe2 at offset 120"),
        ("a.txt", b"", r"a\.txt: no text in it$"),
        ("a.txt.gz", gzip.compress(b"a" * 100, mtime=0)[:-9], r"a\.txt\.gz: damaged gzip: "),
        ("a.txt.gz", b"", r"a\.txt\.gz: damaged gzip: the file is empty$"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: damaged gzip: Not a gzipped file"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst: damaged zstd: "),
        ("a.parquet", b"no parquet", r"a\.parquet: damaged Parquet: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl: line 2: 'text' is int, expected text; see --field"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]', r"a\.jsonl: line 3: no JSON object with a field 'text'"),
        ("a.jsonl", b'{"text": "a"\n', r"a\.jsonl: line 1: not JSON: Expecting"),
        ("a.jsonl", b'{"text": "a\xff"}\n', r"a\.jsonl: line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl: line 1: 'text' has half of a surrogate pair"),
        ("a.json", b'{"body": "a"}\n' * 9, r"a\.json: line 1: no JSON object with a field 'text'"),
        ("a.json", b'[{"text": "a"}, {"body": "a"}]', r"a\.json: record 2: has no field 'text' but body; see --field"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', r"a\.json: record 2: 'text' is int, expected text"),
        ("a.json", b'[{"text": "a"}, {"text" "a"}]' * 99, r"a\.json: record 2: not JSON: Expecting"),
        ("a.json", b'[{"text": "a"}, {"text": "a', r"a\.json: record 2: not JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"}, {}]', r"a\.json: record 2: has no fields$"),
        ("a.json", b'[{"text": "a"} {"text": "a"}]', r"a\.json: after record 1: expected , and an object, or \] at"),
        ("a.csv", b"", r"a\.csv: has no columns$"),
        ("a.csv", b"n,body\n1,a\n", r"a\.csv: has no column 'text' but n, body; see --field"),
        ("a.csv", b"n,text\n1,a,b\n", r"a\.csv: line 2: 3 columns, expected 2"),
        ("a.csv", b'n,text\n1,"a\n2,b\n', r"a\.csv: line 3: not CSV: unexpected end of data"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"a\.parquet\.gz: Parquet in a compressed file; decompress"),
    ],
)
@pytest.mark.fault(75)
def test_bad_source_costs_one_line_and_leaves_nothing(tmp_path, small, name, content, message):
    """Also where a source before it is whole, but shorter than a chunk."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    pytest.importorskip("zstandard", reason="needs zstandard")
    files = [tmp_path / name]
    if content:
        files.insert(0, tmp_path / "whole.txt")
        files[0].write_text("a whole text " * 5)
    files[-1].write_bytes(content)
    with pytest.raises(MygptError, match=message) as caught:
        prepare(files, tmp_path / "out", KINDS["byte"])
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}


@pytest.fixture
def encoded(monkeypatch):
    """The first words of each chunk that is encoded from here on."""
    encode, firsts = preparing.encode_chunk, []

    def encode_and_note(tokenizer, chunk, *rest):
        firsts.append(chunk[0].text[:8])
        return encode(tokenizer, chunk, *rest)

    monkeypatch.setattr(preparing, "encode_chunk", encode_and_note)
    return firsts


@pytest.mark.parametrize("sync_seconds", [0.0, 60.0])
@pytest.mark.fault(92)
def test_bad_line_in_the_last_source_costs_no_finished_work(tmp_path, small, monkeypatch, encoded, sync_seconds):
    """Every chunk before it is kept. Once the line is mended, the same command encodes only what is after them."""
    monkeypatch.setattr(preparing, "SYNC_SECONDS", sync_seconds)
    (tmp_path / "a.txt").write_text("".join(f"{number:07d} " for number in range(500)))
    whole, bad = '{"text": "the last text"}\n', '{"text": "the last\n'
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    sources[1].write_text(whole)
    prepare(sources, tmp_path / "whole", KINDS["byte"])
    chunks, last = len(encoded), encoded[-1]
    sources[1].write_text(bad)
    kept = r"; mend this, and the command continues after the ([\d,]+) bytes of text that .*\.tmp-out keeps$"
    with pytest.raises(CorpusError, match=r"b\.jsonl: line 1: not JSON: .*" + kept):
        prepare(sources, tmp_path / "out", KINDS["byte"])
    sources[1].write_text(whole)
    encoded.clear()
    prepare(sources, tmp_path / "out", KINDS["byte"])
    assert chunks > 10
    assert encoded == [last]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.jsonl", "whole", "out"}


@pytest.mark.parametrize("mistake", ["field", "tokenizer file", "vocabulary", "source"])
@pytest.mark.fault(92)
def test_mistake_in_the_next_command_costs_no_finished_work(tmp_path, small, encoded, mistake):
    """The right command goes on after what a command that was killed had finished."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(200)))
    (tmp_path / "t.json").write_text(train_bpe(["some text " * 50], 260).metadata.json_text)
    (tmp_path / "b.txt").write_bytes(b"\0")
    sources, out = [tmp_path / "a.jsonl"], tmp_path / "out"
    choice = KINDS["bpe"] if mistake in ("vocabulary", "source") else TokenizerChoice("bpe", 0, tmp_path / "t.json")
    prepare_and_die(5, sources, out, choice)
    wrong = {
        "field": lambda: prepare(sources, out, choice, field="txet"),
        "tokenizer file": lambda: prepare(sources, out, choice._replace(file=tmp_path / "none.json")),
        "vocabulary": lambda: prepare(sources, out, choice._replace(vocab_size=100_000)),
        "source": lambda: prepare([tmp_path / "b.txt"], out, choice),
    }
    with pytest.raises(MygptError, match=r"; mend this, and the command continues after the [\d,]+ bytes of text"):
        wrong[mistake]()
    encoded.clear()
    prepare(sources, out, choice)
    killed_after_five, encoded[:] = len(encoded), []
    prepare(sources, tmp_path / "whole", choice)
    assert killed_after_five == len(encoded) - 5
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.fault(75)
def test_damage_in_parquet_is_found_by_its_checksums(tmp_path):
    """Where the file has them: the damaged text would be as good as any."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow
    import pyarrow.parquet

    table, file = pyarrow.table({"text": [f"text {number}." for number in range(100)]}), tmp_path / "a.parquet"
    settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, file, **settings)
    flip(file, file.read_bytes().index(b"text 50."))
    with pytest.raises(CorpusError, match=r"a\.parquet: damaged Parquet: .*CRC"):
        prepare([file], tmp_path / "out", KINDS["byte"])


@pytest.mark.fault(75)
def test_zstd_files_that_need_more_than_there_is(tmp_path):
    """Memory for a long window, or a dictionary: they are not damaged."""
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    text = b"some text " * 1000
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    dictionary = zstandard.train_dictionary(500, [b"some text %d " % number * 9 for number in range(200)])
    for settings, message in (
        ({"compression_params": long}, "needs over 128 MiB to be decompressed; compress it without --long"),
        ({"dict_data": dictionary}, "was compressed with a dictionary"),
    ):
        stream = zstandard.ZstdCompressor(**settings).compressobj()  # which does not know the size
        (tmp_path / "a.zst").write_bytes(stream.compress(text) + stream.flush())
        with pytest.raises(CorpusError, match=f"a.zst: {message}"):
            prepare([tmp_path / "a.zst"], tmp_path / "out", KINDS["byte"])


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user who is not root")
@pytest.mark.fault(75)
def test_folder_that_cannot_be_read_is_not_left_out(tmp_path):
    """Its texts would be missing, and nobody would know."""
    (tmp_path / "texts" / "locked").mkdir(parents=True)
    (tmp_path / "texts" / "locked").chmod(0)
    with pytest.raises(CorpusError, match="locked: cannot be read: Permission denied"):
        find_sources([str(tmp_path / "texts")])


def test_name_of_a_source_need_not_be_utf_8(tmp_path):
    """The manifest, which is, has its other bytes escaped."""
    file = tmp_path / os.fsdecode(b"bad\xff.txt")
    file.write_text("some text")
    manifest = prepare(find_sources([str(tmp_path)]), tmp_path / "out", KINDS["byte"])
    assert manifest.sources[0].path == f"{tmp_path}/bad\\xff.txt"
    assert open_prepared(tmp_path / "out").manifest == manifest


def test_vocabulary_that_the_text_allows_is_named_with_its_flag(call, tmp_path, monkeypatch):
    """The default is more than a short text allows; an empty one is named instead, with its file."""
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be " * 9)
    code, _, err = call("data", "prepare", "a.txt", "--out", "out")
    assert code == 2
    flag = re.search(r"vocab_size: got 1024, and the text allows \d+; give --vocab-size (\d+), or more text\n", err)
    code, out, err = call("data", "prepare", "a.txt", "--out", "out", "--vocab-size", flag[1])
    assert code == 0, err
    assert "sources:      1 file, 171 bytes\n" in out
    (tmp_path / "empty.txt").touch()
    assert call("data", "prepare", "empty.txt", "--out", "no")[::2] == (2, "mygpt: empty.txt: no text in it\n")


@pytest.mark.parametrize("out", ["a.txt/x", "x" * 300, "new/folder/x", "new/" + "x" * 300, "new/.."])
def test_mistake_makes_no_folder(tmp_path, out):
    """Nor does a place where none can be made; other places are what helps, and not the same command."""
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_bytes(b"\0")
    with pytest.raises(CorpusError, match=r"choose another --out|not a text"):
        prepare([tmp_path / "b.txt"], tmp_path / out, KINDS["byte"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "binary"])
@pytest.mark.fault(94)
def test_document_that_is_null_is_left_out_and_counted(tmp_path, capsys, kind):
    """In one note per file, with its control characters escaped; a binary column that is UTF-8 is text."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow
    import pyarrow.parquet

    texts = ["añ", None, "b", None]
    file = tmp_path / ("a\x1b[1m\n." + ("jsonl" if kind == "jsonl" else "parquet"))
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        column = [text and text.encode() for text in texts] if kind == "binary" else texts
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    manifest = prepare([file], tmp_path / "out", KINDS["bpe"]._replace(vocab_size=257))
    assert manifest.documents == 2
    corpus = open_prepared(tmp_path / "out")
    assert corpus.decode(corpus.tokens) == "añ<|endoftext|>b<|endoftext|>"
    name = str(file).replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert capsys.readouterr().err == f"{name}: left out, as 'text' is null: 2 documents\n"


@pytest.mark.fault(75)
def test_binary_column_that_is_no_text_is_a_mistake(tmp_path):
    """With the row."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: row 2: 'text' is not UTF-8$"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", KINDS["byte"])


@pytest.mark.fault(75)
def test_missing_column_is_named_with_those_that_there_are(tmp_path):
    """And so is a package that a format needs."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    write(tmp_path)
    with pytest.raises(CorpusError, match=r"has no column 'body' but text; see --field"):
        prepare([tmp_path / "p" / "a.parquet"], tmp_path / "out", KINDS["byte"], field="body")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setitem(sys.modules, "zstandard", None)
        for name in ("p/a.parquet", "z/a.jsonl.zst"):
            with pytest.raises(CorpusError, match=r"needs (pyarrow|zstandard): pip install \1$"):
                prepare([tmp_path / name], tmp_path / "out", KINDS["byte"])


def test_existing_folder_is_not_replaced(tmp_path):
    """Whatever it holds."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    with pytest.raises(CorpusError, match="out: exists; choose another --out"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["byte"])


def test_sample_is_spread_over_the_text():
    """All of a short text; of a long one blocks from its beginning to its end, as many as fit."""
    blocks = [[f"{number:07d}" * 10, "end"] for number in range(40)]
    assert take_sample(blocks[:2], 1 << 24) == [*blocks[0], *blocks[1]]
    sample = take_sample(blocks, 10 * 73)[::2]
    assert [int(block[:7]) for block in sample] == list(range(0, 40, 4))


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
@pytest.mark.fault(74)
def test_second_command_is_refused_while_one_works(tmp_path, small, monkeypatch, same):
    """Whether it would do the same or not; the first ends as if it had been alone."""
    (tmp_path / "a.txt").write_text("some text " * 500)
    (tmp_path / "b.txt").write_text("other text " * 500)
    second = tmp_path / ("a.txt" if same else "b.txt")
    encode, refused = preparing.encode_chunk, []

    def encode_after_second(*arguments):
        if not refused:
            with pytest.raises(CorpusError, match="out: another command prepares it") as caught:
                prepare([second], tmp_path / "out", KINDS["char"])
            refused.append(caught)
        return encode(*arguments)

    monkeypatch.setattr(preparing, "encode_chunk", encode_after_second)
    prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["char"], workers=1)
    assert refused
    corpus = open_prepared(tmp_path / "out")
    assert corpus.tokenizer.decode(corpus.tokens[:-1].tolist()) == "some text " * 500
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", "out"}


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
@pytest.mark.fault(74)
def test_working_folder_of_somebody_else_is_left_alone(tmp_path, kind):
    """A link would be followed, and a folder emptied."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    if kind == "link":
        (tmp_path / ".tmp-out").symlink_to("mine")
    elif kind == "folder":
        shutil.copytree(tmp_path / "mine", tmp_path / ".tmp-out")
    else:
        (tmp_path / ".tmp-out").write_text("mine")
    with pytest.raises(CorpusError, match=r"\.tmp-out: in the way of the folder to work in"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["byte"])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / ".tmp-out").exists()


@pytest.mark.fault(72)
def test_tokens_that_the_disk_has_lost_are_made_again(tmp_path, small):
    """The journal alone is not believed: a hole would be read as tokens of number 0."""
    (tmp_path / "a.txt").write_text("some text " * 500)
    prepare([tmp_path / "a.txt"], tmp_path / "whole", KINDS["char"])
    for damage in ("truncate", "flip", "remove", "journal"):
        prepare_and_die(10, [tmp_path / "a.txt"], tmp_path / damage, KINDS["char"])
        tokens = tmp_path / f".tmp-{damage}" / "tokens.safetensors"
        if damage == "truncate":
            os.truncate(tokens, 300)
        elif damage == "flip":
            flip(tokens, 300)
        elif damage == "journal":
            flip(tokens.with_name("journal"), preparing.RECORD.size + 72)  # the documents of the second chunk
        else:
            tokens.unlink()
        prepare([tmp_path / "a.txt"], tmp_path / damage, KINDS["char"])
        assert contents(tmp_path / damage) == contents(tmp_path / "whole")


@pytest.mark.fault(73)
def test_tokenizer_file_that_changes_in_between_is_read_anew(tmp_path, small):
    """The tokens are all those of the tokenizer that the corpus has."""
    (tmp_path / "a.txt").write_text("some text " * 500)
    file, choice = tmp_path / "t.json", TokenizerChoice("bpe", 0, tmp_path / "t.json")
    file.write_text(train_bpe(["some text " * 50], 262).metadata.json_text)
    prepare_and_die(5, [tmp_path / "a.txt"], tmp_path / "out", choice)
    file.write_text(train_bpe(["so much text " * 50], 259).metadata.json_text)
    prepare([tmp_path / "a.txt"], tmp_path / "out", choice)
    corpus = open_prepared(tmp_path / "out")
    assert corpus.tokenizer.vocab_size == 259
    assert corpus.tokenizer.decode(corpus.tokens[:-1].tolist()) == "some text " * 500


def test_full_disk_keeps_what_was_done(tmp_path, small, monkeypatch):
    """One line, exit 1; the same command continues once there is room."""
    (tmp_path / "a.txt").write_text("some text " * 500)
    prepare([tmp_path / "a.txt"], tmp_path / "whole", KINDS["char"])
    sync, count = preparing._Journal.sync, 0

    def sync_or_fail(journal):
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(journal)

    monkeypatch.setattr(preparing._Journal, "sync", sync_or_fail)
    with pytest.raises(DiskError, match=r"\.tmp-out: No space left on device; make room, and the same command"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["char"])
    assert (tmp_path / ".tmp-out" / "journal").stat().st_size == 5 * preparing.RECORD.size
    prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["char"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_corpus_beside_its_sources_is_no_source(tmp_path, small):
    """Nor is the folder in which a command that was killed has worked."""
    (tmp_path / "a.txt").write_text("some text " * 500)
    prepare_and_die(5, find_sources([str(tmp_path)]), tmp_path / "out", KINDS["char"])
    assert [path.name for path in find_sources([str(tmp_path)])] == ["a.txt"]


@pytest.mark.parametrize("words", ["国際化", "international"])
def test_ids_are_those_of_the_text_where_there_is_no_space(tmp_path, monkeypatch, words):
    """Though the text is read in blocks that end anywhere, and in whatever format."""
    monkeypatch.setattr("mygpt.data.sources.BLOCK", 1000)
    monkeypatch.setattr("mygpt.data.bpe.PIECE", 500)
    monkeypatch.setattr("mygpt.data.bpe.MAX_PIECE", 3000)
    text = words * 2000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "t.json").write_text(train_bpe([words + " "] * 50, 262).metadata.json_text)
    for name in ("a.txt", "b.jsonl"):
        prepare([tmp_path / name], tmp_path / f"out-{name}", TokenizerChoice("bpe", 0, tmp_path / "t.json"))
        corpus = open_prepared(tmp_path / f"out-{name}")
        assert corpus.tokens[:-1].tolist() == corpus.tokenizer.encode(text).tolist()


@pytest.mark.parametrize("kind", ["empty", "zst"])
def test_memory_is_bounded_whatever_the_source(tmp_path, kind):
    """Hundreds of thousands of empty documents; a file of some kilobytes that stands for hundreds of megabytes."""
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    if kind == "empty":
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 300_000 + '{"text": "a"}\n')
    else:
        (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"a" * 300_000_000))
    code = """
import glob, resource
from pathlib import Path
from mygpt.data.prepare import TokenizerChoice, prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
prepare([Path(glob.glob("a.*")[0])], Path("out"), TokenizerChoice("byte", 0, None))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 220


def test_corpus_larger_than_memory_can_be_opened(tmp_path):
    """Its tokens are mapped, not reserved: here a file with a hole of a terabyte."""
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["byte"])
    count = 1 << 39
    rewrite(tmp_path / "out" / "manifest.json", tokens=count)
    with (tmp_path / "out" / "tokens.safetensors").open("r+b") as file:
        file.write(prepared_files.header("U16", count))
        try:
            file.truncate(256 + 2 * count)
        except OSError:
            pytest.skip("needs a file system with files of a terabyte")
    corpus = open_prepared(tmp_path / "out", verify=False)
    assert corpus.tokens[-5:].tolist() == [0] * 5


# ---- Training on one


@pytest.fixture
def prepared(tmp_path, text_file):
    """The text as a prepared corpus of characters."""
    prepare([text_file], tmp_path / "prepared", KINDS["char"])
    return tmp_path / "prepared"


def test_training_on_prepared_text_gives_the_numbers_of_the_text(tiny, tmp_path, prepared, text, monkeypatch):
    """Of the same tokens the same bits: here of a vocabulary that has the token for a document's end, too."""
    keys = {"val_split": 0.2, "val_every": 3, "save_every": 2}
    mapped = train(tiny(**keys, corpus=str(prepared)))

    def load_in_memory(*_, **__):
        tokenizer = CharTokenizer(text, end_of_text=True)
        tokens = torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.end_of_text], dtype=torch.uint8)
        boundary = int(0.8 * len(tokens))
        return Dataset(tokenizer, tokens[:boundary], tokens[boundary:], open_prepared(prepared).manifest.tokens_sha256)

    monkeypatch.setattr("mygpt.processes.preflight.open_dataset", load_in_memory)
    in_memory = train(tiny(**keys, corpus=str(prepared), output=str(tmp_path / "other" / "run")))
    own = ("run.json", "recipe.toml")
    assert contents(mapped, without=own) == contents(in_memory, without=own)


def test_run_on_prepared_text_continues_and_is_replayed(tiny, tmp_path, prepared, monkeypatch):
    """To the bytes of a run never stopped; from another working directory, too."""
    keys = {"save_every": 2, "corpus": str(prepared)}
    whole = train(tiny(**keys))
    where = {"output": str(tmp_path / "stopped" / "run")}
    train(tiny(**keys, **where), last_step=3)
    stopped = train(tiny(**keys, **where))
    own = ("run.json", "recipe.toml")
    assert contents(stopped, without=own) == contents(whole, without=own)

    def break_weight(parts, *_):
        parts.gpt.norm.weight.data[3] = float("nan")

    disturb("before-step", break_weight, count=2, patch=monkeypatch.setattr)
    with pytest.raises(MygptError, match="step 2: the loss is nan"):
        train(tiny(**keys, output=str(tmp_path / "failed")))
    assert "norm" in replay(tmp_path / "failed", torch.device("cpu")).non_finite


@pytest.mark.fault(77)
def test_damaged_corpus_is_refused(prepared, tmp_path):
    """Truncated or changed tokens, the tokenizer of another corpus, no manifest: each in one line."""
    cases = {
        "has 255 bytes, expected": lambda folder: os.truncate(folder / "tokens.safetensors", 255),
        "damaged: its sha256 is not that in": lambda folder: flip(folder / "tokens.safetensors", 5000),
        "not the tokenizer that the tokens are of": lambda folder: rewrite(folder / "tokenizer.json", vocab="ab"),
        r"tokenizer\.json: missing: damaged corpus": lambda folder: (folder / "tokenizer.json").unlink(),
        r"manifest\.json: not a regular file; expected a manifest": lambda folder: make_folder(folder, "manifest.json"),
        r"tokenizer\.json: damaged: ": lambda folder: (folder / "tokenizer.json").write_text("{}"),
        r"manifest\.json: missing: a corpus is a text": lambda folder: (folder / "manifest.json").unlink(),
        r"manifest\.json: damaged: tokens: ": lambda folder: rewrite(folder / "manifest.json", tokens=-1),
    }  # fmt: skip
    for number, (message, damage) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        damage(folder)
        with pytest.raises(CorpusError, match=message) as caught:
            load_dataset(DataTable(corpus=str(folder)), 16)
        assert "\n" not in str(caught.value)


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def make_folder(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


def rewrite(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("point", ["after-step", "validation"])
@pytest.mark.parametrize("change", ["truncate", "touch", "replace", "remove"])
@pytest.mark.fault(78)
def test_corpus_that_changes_while_in_use_ends_the_run(tiny, tmp_path, prepared, change, point, monkeypatch):
    """With one line and what was saved, not with a signal of the system."""
    tokens = prepared / "tokens.safetensors"

    def act(*_):
        if change == "truncate":
            os.truncate(tokens, 300)
        elif change == "touch":
            os.utime(tokens, ns=(1, 1))
        elif change == "remove":
            shutil.rmtree(prepared)
        else:
            shutil.copy(tokens, tmp_path / "copy")
            (tmp_path / "copy").replace(tokens)

    disturb(point, act, count=3, patch=monkeypatch.setattr)
    with pytest.raises(DamagedCorpusError, match=r"tokens\.safetensors: has changed while it was in use"):
        train(tiny(corpus=str(prepared), save_every=1, val_split=0.2, val_every=1))
    assert (tmp_path / "run" / "step-000002").is_dir()
    assert DamagedCorpusError.exit_code == DiskError.exit_code == 1


def test_tokenizer_of_the_recipe_must_be_that_of_the_corpus(prepared):
    """A key that means nothing would be believed; the default stands for any."""
    refusal = "its tokenizer is 'char'; leave tokenizer, vocab_size and tokenizer_file out"
    for keys in ({"tokenizer": "byte"}, {"vocab_size": 300}, {"tokenizer_file": "tokenizer.json"}):
        with pytest.raises(CorpusError, match=refusal):
            load_dataset(DataTable(corpus=str(prepared), **keys), 16)
    assert load_dataset(DataTable(corpus=str(prepared)), 16).tokenizer.end_of_text is not None


def test_windows_of_two_byte_tokens(tmp_path):
    """Types of the file are no limit: any window can be taken, and a GPU gets the windows, or all that fits."""
    (tmp_path / "a.txt").write_text("añ€😀 " * 50, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["byte"])
    data = load_dataset(DataTable(corpus=str(tmp_path / "out")), 16)
    assert data.train.dtype == torch.uint16
    inputs, targets = windows(data.train, torch.tensor([0, 7]), 5)
    assert inputs.tolist() == [data.train[:5].tolist(), data.train[7:12].tolist()]
    assert targets[1].tolist() == data.train[8:13].tolist()
    assert data.to(torch.device("cpu")) is data
    moved = data.to(torch.device("meta"))
    for part in (moved.train, moved.val):
        assert (part.device.type, part.dtype) == ("meta", torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mygpt.data.dataset.MAX_ON_DEVICE", 10)
        assert data.to(torch.device("meta")) is data


def test_command_prepares_describes_and_trains(tmp_path, call, text_file):
    """As a user types it; mistakes in one line."""
    out = tmp_path / "data"
    code, printed, _ = call("data", "prepare", text_file, "--tokenizer", "byte", "--out", out)
    assert code == 0
    assert "documents:    1\n" in printed
    assert call("data", "info", out)[1] == printed
    assert "tokenizer:    byte " in printed
    code, _, _ = call("train", out, *FLAGS, "--output", tmp_path / "run")
    assert code == 0
    assert RunDirectory(tmp_path / "run").recipe.data.tokenizer == "byte"
    assert call("verify", tmp_path / "run")[0] == 0
    assert call("train", out, *FLAGS, "--output", tmp_path / "run")[0] == 0  # it is complete, and nothing has changed
    for arguments, message in (
        (["prepare", tmp_path / "none", "--out", tmp_path / "x"], "none: no such source; expected a file"),
        (
            ["prepare", text_file, "--tokenizer", "byte", "--vocab-size", 9, "--out", tmp_path / "x"],
            "--vocab-size: only",
        ),
        (["prepare", "--out", tmp_path / "x"], "SOURCE missing; usage: mygpt data prepare SOURCE..."),
        (["prepare", text_file], "mygpt data prepare --help"),
        (["info", tmp_path], "manifest.json: missing"),
    ):
        code, _, err = call("data", *arguments)
        assert code == 2
        assert message in err
    tokens = bytearray((out / "tokens.safetensors").read_bytes())
    tokens[256:258] = b"\xff\x7f"
    (out / "tokens.safetensors").write_bytes(tokens)
    code, _, err = call("data", "info", out)
    assert (code, err.count("\n")) == (1, 1)
    assert "tokens.safetensors: damaged: token id 32767: expected 0 to 256" in err


def test_run_in_epochs_by_documents_continues_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    """Its position is part of the checkpoint; a failed step has the windows of its epoch."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(60)))
    prepare([tmp_path / "a.jsonl"], tmp_path / "docs", KINDS["char"])
    keys = {"corpus": str(tmp_path / "docs"), "order": "epoch", "hold_out": "documents", "val_split": 0.3}
    keys |= {"val_every": 2, "save_every": 2, "steps": 80}  # more than an epoch
    data = load_dataset(DataTable(corpus=keys["corpus"], hold_out="documents", val_split=0.3), 16)
    assert data.train[-1] == data.tokenizer.end_of_text
    whole = train(tiny(**keys))
    where = {"output": str(tmp_path / "stopped" / "run")}
    train(tiny(**keys, **where), last_step=71)
    stopped = train(tiny(**keys, **where))
    own = ("run.json", "recipe.toml")
    assert contents(stopped, without=own) == contents(whole, without=own)
    # Another seed gives another order, from a checkpoint and from the checkpoints after that.
    changed = keys | {"data_seed": 7, "steps": 84, "save_every": 1, "resume": str(whole / "step-000078")}
    for name, stop in (("x", 81), ("y", 84)):
        branch = tiny(**changed, output=str(tmp_path / name))
        train(branch, last_step=stop)
        train(branch)
    weights = [(tmp_path / name / "step-000084" / "model.safetensors").read_bytes() for name in ("x", "y")]
    assert weights[0] == weights[1]
    with pytest.raises(CorpusError, match='hold_out: got "documents", and python-docs is one text'):
        load_dataset(DataTable(hold_out="documents", corpus="python-docs"), 16)

    def break_weight(parts, *_):
        parts.gpt.norm.weight.data[3] = float("nan")

    disturb("before-step", break_weight, count=4, patch=monkeypatch.setattr)
    with pytest.raises(MygptError, match="step 4: the loss is nan"):
        train(tiny(**keys, output=str(tmp_path / "failed")))
    failed = json.loads((tmp_path / "failed" / "failed-step-000004" / "batch.json").read_text())
    assert all(start % 16 == 0 for start in failed["starts"])
    assert "norm" in replay(tmp_path / "failed", torch.device("cpu")).non_finite


@pytest.mark.fault(90)
@pytest.mark.parametrize("hold_out", ["documents", "tokens"])
def test_held_out_documents_that_are_trained_on_are_counted(tiny, tmp_path, capsys, monkeypatch, hold_out):
    """Exact copies on both sides of the split; empty documents are none, and neither is a part of one.

    Nothing is read if nothing is held out, or the corpus is large.
    """
    monkeypatch.setattr("mygpt.data.dataset.BLOCK", 64)
    texts = [f"Document {number} of some, with its words." for number in range(40)] + ["", ""]
    texts += ["Document 3 of some, with its words.", "its words.", "", *(f"Held out {number}." for number in range(30))]
    texts += ["Document 7 of some, with its words.", "Document 7 of some, with its words."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "a.jsonl"], tmp_path / "docs", KINDS["byte"])
    keys = {"corpus": str(tmp_path / "docs"), "hold_out": hold_out, "val_every": 6, "val_split": 0.2}
    dataset = load_dataset(DataTable(corpus=keys["corpus"], hold_out=hold_out, val_split=0.2), 16)
    copies, documents = dataset.count_copies()
    assert copies == 2
    assert documents == sum(map(bool, dataset.tokenizer.decode(dataset.val.tolist()).split("<|endoftext|>")))
    train(tiny(**keys))
    assert f"2 of the {documents} held-out documents are in the training part, too" in capsys.readouterr().err
    assert dataset._replace(train=dataset.val[:0]).count_copies() == (0, documents)
    monkeypatch.setattr("mygpt.data.dataset._documents", lambda *_: pytest.fail("read"))
    assert dataset._replace(val=dataset.val[:0]).count_copies() == (0, 0)
    monkeypatch.setattr("mygpt.data.dataset.MAX_COMPARED", 100)
    assert dataset.count_copies() == (0, 0)


@pytest.mark.parametrize(("distinct", "dtype"), [(255, "U8"), (256, "U16"), ((1 << 16) - 1, "U16"), (1 << 16, "I32")])
def test_tokens_take_the_smallest_type(tmp_path, distinct, dtype):
    """Of so many characters and the token that ends a document."""
    text = "".join(map(chr, range(0x10000, 0x10000 + distinct)))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["char"]).dtype == dtype
    corpus = open_prepared(tmp_path / "out")
    assert corpus.tokens.tolist() == list(range(distinct + 1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("char", "d617ba30f1bfa677137aed2265c86501e0750aed8c837b3487937b5b1e3e57a1"),
        ("byte", "24b93a2705f6da35292f210e4ca8c86c47cdf5bcfbe296d9277b769c36ee1865"),
    ],
)
def test_prepared_bytes_are_those_of_earlier_versions(tmp_path, monkeypatch, kind, expected):
    """A run records the hash of its corpus: where the format changes, the number in the manifest has to change, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare(find_sources(["a.jsonl"]), tmp_path / "out", KINDS[kind])
    files = ("manifest.json", "tokenizer.json", "tokens.safetensors")
    content = b"".join((tmp_path / "out" / name).read_bytes() for name in files)
    assert hashlib.sha256(content).hexdigest() == expected


def test_source_that_is_gone_is_named(tmp_path):
    """As one that is removed after it was found."""
    with pytest.raises(CorpusError, match=r"^\S+a\.txt: cannot be read: No such file or directory$"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", KINDS["byte"])
