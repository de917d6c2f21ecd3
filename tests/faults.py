"""Faults of a disk and of a power supply, at any of the calls that a program makes to one folder.

``Disk`` stands between this process and everything that changes something below a folder: it counts the calls, and at
one of them kills the process, cuts the power, or says that the disk is full. Reading is left alone.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from flexlora_fast import tensorfile

KILLED = 137
# Calls that name a path, and those that name an open file.
_PATHS = ("replace", "rename", "unlink", "remove", "mkdir", "chmod", "rmdir", "truncate", "link", "symlink")
_FILES = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
_WRITES = ("write", "pwrite")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at call number ``step``, counted from 0; ``half`` of a write is done before it does.

    kind: "kill"; "power" (nothing that was not flushed stays) or "power:SEED" (some of it does); "ENOSPC", "EIO" …:
    the call fails; with ``lasting`` so do all later ones, until the disk is ``mended``.
    """

    step: int
    kind: str = "kill"
    half: bool = False
    lasting: bool = False


class Disk:
    """In a ``with`` block. ``trace``: what was called so far, each as (name, path below the folder)."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root, self.fault = os.path.abspath(root), fault
        self.trace: list[tuple[str, str]] = []
        self.fired = self.mended = False
        self._flushed = _Flushed(self.root)

    def __enter__(self) -> Disk:
        self._stack = contextlib.ExitStack()
        real = {name: getattr(os, name) for name in (*_PATHS, *_FILES, "open")}
        for name in _PATHS:
            self._patch(name, lambda *args, _call=real[name], _name=name, **kw: self._path(_name, _call, *args, **kw))
        for name in _FILES:
            self._patch(name, lambda *args, _call=real[name], _name=name: self._file(_name, _call, *args))
        self._patch("open", lambda *args, **kw: self._open(real["open"], *args, **kw))
        self._stack.enter_context(mock.patch.object(tensorfile, "open", self._opened, create=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _patch(self, name: str, call: Callable[..., Any]) -> None:
        self._stack.enter_context(mock.patch.object(os, name, call))

    # -- the calls ---

    def _path(self, name: str, call: Callable[..., Any], path: Any, *args: Any, **kw: Any) -> Any:
        if not self._ours(path):
            return call(path, *args, **kw)
        return self._step(name, os.fspath(path), lambda: call(path, *args, **kw))

    def _open(self, call: Callable[..., Any], path: Any, flags: int, *args: Any, **kw: Any) -> Any:
        if not flags & (os.O_CREAT | os.O_TRUNC) or not self._ours(path):
            return call(path, flags, *args, **kw)
        return self._step("open", os.fspath(path), lambda: call(path, flags, *args, **kw))

    def _file(self, name: str, call: Callable[..., Any], descriptor: int, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not self._ours(path) and not (name == "fsync" and path == os.path.dirname(self.root)):
            return call(descriptor, *args)
        half = None
        if name in _WRITES:
            data = bytes(args[0])
            half = lambda: call(descriptor, data[: len(data) // 2], *args[1:])  # noqa: E731
        result = self._step(name, path, lambda: call(descriptor, *args), half)
        if name in ("fsync", "fdatasync"):
            self._flushed.take(path, descriptor)
        return result

    def _opened(self, path: Any, mode: str = "r", *args: Any, **kw: Any) -> Any:
        """``open`` of the writer of updates, whose own calls would not be seen."""
        return _Writer(path) if mode == "wb" and self._ours(path) else builtins.open(path, mode, *args, **kw)

    def _ours(self, path: Any) -> bool:
        where = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return where == self.root or where.startswith(self.root + os.sep)

    def _step(self, name: str, path: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        number = len(self.trace)
        self.trace.append((name, os.path.relpath(path, self.root)))
        fault = self.fault
        if fault is None or self.mended or not (number == fault.step or (fault.lasting and number > fault.step)):
            return call()
        if number == fault.step and fault.half and half is not None:
            half()
        self.fired = True
        if fault.kind.startswith("power"):
            self._stack.close()
            self._flushed.cut(fault.kind.partition(":")[2])
        if fault.kind.startswith("power") or fault.kind == "kill":
            os._exit(KILLED)
        number = getattr(errno, fault.kind)
        raise OSError(number, os.strerror(number), path)


class _Writer:
    """A file whose writes are calls of ``os.write``, one each."""

    def __init__(self, path: Any) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def seek(self, at: int) -> None:
        os.lseek(self._descriptor, at, os.SEEK_SET)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


@dataclasses.dataclass(frozen=True)
class _Kept:
    content: bytes
    mode: int


class _Flushed:
    """What of a folder is on disk for good: of each file what it held when it was last flushed, of each folder the
    names that it had then. A file that was never flushed is empty.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: dict[int, _Kept] = {}
        self._names: dict[str, dict[str, int]] = {}
        self._there = os.path.exists(root)
        if self._there:  # what is there before has been there for long
            for folder, _, _ in os.walk(root):
                self._take_folder(folder)
                for name in self._names[folder]:
                    path = os.path.join(folder, name)
                    if not os.path.isdir(path):
                        self._take_file(path)

    def take(self, path: str, descriptor: int) -> None:
        if path == os.path.dirname(self.root):
            self._there = os.path.exists(self.root)
        elif stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._take_folder(path)
        else:
            self._take_file(f"/proc/self/fd/{descriptor}")

    def _take_folder(self, path: str) -> None:
        with os.scandir(path) as entries:
            self._names[path] = {entry.name: entry.inode() for entry in entries}

    def _take_file(self, path: str) -> None:
        status = os.stat(path)
        self._files[status.st_ino] = _Kept(_content(path), stat.S_IMODE(status.st_mode))

    def cut(self, seed: str) -> None:
        """Leave in the folder what a power cut would; with a seed some of what was not flushed as well."""
        chance = random.Random(seed) if seed else None
        now = {os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names}
        current = {os.stat(path).st_ino: _Kept(_content(path), os.stat(path).st_mode & 0o777) for path in now}
        made = f"{self.root}.after"
        if self._there:
            os.mkdir(made)
            self._rebuild(self.root, made, current, chance)
        shutil.rmtree(self.root, ignore_errors=not os.path.exists(self.root))
        if self._there:
            os.rename(made, self.root)

    def _rebuild(self, folder: str, made: str, current: dict[int, _Kept], chance: random.Random | None) -> None:
        old, new = self._names.get(folder, {}), dict[str, int]()
        with os.scandir(folder) as entries:
            new = {entry.name: entry.inode() for entry in entries}
        for name in sorted(old | new):
            inode = (new if chance is not None and chance.random() < 0.5 else old).get(name)
            if inode is None:
                continue
            inner = os.path.join(folder, name)
            if os.path.isdir(inner):
                os.mkdir(os.path.join(made, name), 0o700)
                self._rebuild(inner, os.path.join(made, name), current, chance)
                continue
            kept = self._files.get(inode, _Kept(b"", 0o600))
            if chance is not None and inode in current and chance.random() < 0.5:
                there = current[inode]
                kept = _Kept(there.content[: chance.randint(0, len(there.content))], there.mode)
                if (
                    inode in self._files
                    and kept.content[: len(self._files[inode].content)] != self._files[inode].content
                ):
                    kept = self._files[inode]  # a file that grew does not become shorter than it was
            with builtins.open(os.path.join(made, name), "wb") as file:
                file.write(kept.content)
            os.chmod(os.path.join(made, name), kept.mode)


def _content(path: str) -> bytes:
    with builtins.open(path, "rb") as file:
        return file.read()


def in_child(work: Callable[[], None]) -> int:
    """Run it in a fork of this process, which must not have threads; the exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def points(trace: list[tuple[str, str]], kind: str, lasting: bool = False) -> Iterator[Fault]:
    """A fault before every call, and in the middle of every write."""
    for step, (name, _) in enumerate(trace):
        yield Fault(step, kind, lasting=lasting)
        if name in _WRITES:
            yield Fault(step, kind, half=True, lasting=lasting)
