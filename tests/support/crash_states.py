"""The states in which a power failure can leave a folder.

A file has on the disk what it had when it was last synced; what was written since may be there, in part, as zeros, or
not at all. A change of a directory (a name that is made, moved or removed) is atomic. It is on the disk once the
directory is synced, or one of the two between which it moves something; until then it may have happened or not,
whatever happened to other changes.
"""

import itertools
import math
import os
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, bytes | None]
"""A folder: the content of each file by its path; None: it is a directory."""
Names = dict[tuple[int, str], int | None]
"""The number of a file or directory, by that of its directory and its name; None: nothing any more. The root is 0."""


class Recording:
    """What happens in a folder, found by looking at it before and after each call that renames, removes or syncs.

    Events are ("content", file, bytes), ("names", changes), ("synced", number) and ("noted", what is said to be saved).
    """

    def __init__(self, root: Path):
        self.root, self.events = root, list[Any]()
        self._names, self._contents = Names(), dict[int, bytes]()
        self._numbers, self._inodes = itertools.count(1), {root.stat().st_ino: 0}
        self._lock = threading.RLock()
        self._look()
        self.names_before, self.contents_before, self.events = self._names, self._contents, []

    def note(self, note: Any) -> None:
        with self._lock:
            self._look()
            self.events.append(("noted", note))

    def watched(self, call: Any) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._look()
                result = call(*args, **kwargs)
                self._look(is_one_change=True)
            return result

        return replacement

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            self._look()
            if (node := self._inodes.get(os.fstat(descriptor).st_ino)) is not None:
                self.events.append(("synced", node))

    def _look(self, *, is_one_change: bool = False) -> None:
        names, contents, inodes, unread = Names(), dict[int, bytes](), {self.root.stat().st_ino: 0}, [self.root]
        for folder in unread:
            for path in sorted(folder.iterdir()):
                node = inodes[path.stat().st_ino] = self._inodes.get(path.stat().st_ino) or next(self._numbers)
                names[inodes[folder.stat().st_ino], path.name] = node
                unread += [path] if path.is_dir() else []
                contents |= {} if path.is_dir() else {node: path.read_bytes()}
        self.events += [("content", *item) for item in contents.items() if self._contents.get(item[0]) != item[1]]
        changed = {key: names.get(key) for key in self._names | names if self._names.get(key) != names.get(key)}
        apart = [{key: node} for key, node in changed.items()]
        self.events += [("names", change) for change in ([changed] if is_one_change and changed else apart)]
        self._names, self._contents, self._inodes = names, contents, inodes


@contextmanager
def recording(root: Path) -> Iterator[Recording]:
    """Record what happens in a folder meanwhile; what it holds already is on the disk, and nothing is really synced."""
    recorded = Recording(root)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate"):
            patch.setattr(os, name, recorded.watched(getattr(os, name)))
        patch.setattr(os, "fsync", recorded.fsync)
        yield recorded


def crash_states(recorded: Recording, *, most: int, seed: int = 0) -> Iterator[tuple[Tree, tuple[Any, ...]]]:
    """What a failure before the first event and after each can leave, and the notes until then; of each moment `most`
    states or so, drawn by `seed`."""
    names, synced, contents = recorded.names_before, dict(recorded.contents_before), dict(recorded.contents_before)
    pending, notes, seen, draw = list[Names](), tuple[Any, ...](), set(), random.Random(seed)
    for event in [("start",), *recorded.events]:
        match event:
            case "noted", note:
                notes += (note,)
            case "content", file, data:
                contents[file] = data
            case "names", change:
                pending.append(change)
            case "synced", node if node in contents:
                synced[node] = contents[node]
            case "synced", node:
                of_it = [change for change in pending if node in {parent for parent, _ in change}]
                names, pending = _after(names, of_it), [change for change in pending if change not in of_it]
        named = set(_after(names, pending).values()) | set(names.values())
        dirty = [file for file in named & contents.keys() if synced.get(file) != contents[file]]
        options: list[list[Any]] = [[change, {}] for change in pending]
        options += [_versions(synced.get(file, b""), contents[file]) for file in dirty]
        for choice in _choices(options, most, draw):
            held = synced | dict(zip(dirty, choice[len(pending) :], strict=True))
            tree = _tree(_after(names, choice[: len(pending)]), held)
            if (state := (tuple(tree.items()), notes)) not in seen:
                seen.add(state)
                yield tree, notes


def _versions(old: bytes, new: bytes) -> list[bytes]:
    """What a file can hold that had `old` when it was synced, and has `new` in memory."""
    middle = ((len(old) if new.startswith(old) else 0) + len(new)) // 2
    return [new, new[:middle] + old[middle:], new[: len(old)] + bytes(max(0, len(new) - len(old))), old]


def _choices(options: list[list[Any]], most: int, draw: random.Random) -> list[Sequence[Any]]:
    """All ways to take one of each; if they are too many: the first ones, the last ones, and some that differ from
    these in one or two places."""
    if math.prod(map(len, options)) <= most:
        return list(itertools.product(*options))
    ends, numbers = [[option[end] for option in options] for end in (0, -1)], range(len(options))
    places = [where for count in (1, 2) for where in itertools.combinations(numbers, count)]
    drawn = [(end, where) for end in ends for where in places]
    drawn = draw.sample(drawn, min(most, len(drawn)))
    return ends + [[draw.choice(options[n]) if n in where else end[n] for n in numbers] for end, where in drawn]


def _after(names: Names, changes: Sequence[Names]) -> Names:
    """Directories after changes; one that moves or removes what is not there, because another was lost, is lost too."""
    names = dict(names)
    for change in changes:
        if all(names.get(key) is not None for key, node in change.items() if node is None):
            names |= change
    return names


def _tree(names: Names, contents: dict[int, bytes]) -> Tree:
    tree, unread = Tree(), [(0, "")]
    for folder, prefix in unread:
        for (parent, name), node in sorted(names.items()):
            if parent == folder and node is not None:
                tree[prefix + name] = contents.get(node)
                unread += [] if node in contents else [(node, f"{prefix}{name}/")]
    return tree


def restore(tree: Tree, root: Path) -> None:
    """Make the folder hold this and nothing else."""
    shutil.rmtree(root)
    root.mkdir()
    for name, data in tree.items():
        (root / name).mkdir() if data is None else (root / name).write_bytes(data)
