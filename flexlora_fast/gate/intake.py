"""Where an upload comes from: opened once, without following links, looked at, then copied to a private file."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from flexlora_fast.errors import AdapterError, RefusedError, sentence, shown
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.tensorfile import LONGEST_HEADER, BadFileError, Index, LongHeaderError, TensorFile, read_index

# O_NONBLOCK: opening a pipe must not wait for its writer. It changes nothing for regular files.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip (torch.save) and pickle protocols
_CHUNK = 1 << 20
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this machine, whatever a client sent
_SAVE = "save it with peft's save_pretrained"
_SAFE = "have the client save with save_pretrained(..., safe_serialization=True)"


# Where copies go: a folder; a function that makes each new file and returns its descriptor and path; or None for the
# folder of temporary files, where a copy has no name any more once it is made.
Spool = str | os.PathLike[str] | Callable[[], tuple[int, str]] | None


@dataclass(frozen=True)
class Upload:
    """The weights as they came, and the config beside them, if any.

    ``read``: as ``os.pread``, from (count, offset). ``size``: bytes of the weights.
    """

    read: Callable[[int, int], bytes]
    size: int
    config: bytes | None = None


@contextlib.contextmanager
def opened(source: object, longest_config: int) -> Iterator[Upload]:
    """The upload at a path (a PEFT folder or a safetensors file), or in ``bytes``; an ``Upload`` as it is.

    Raises ``RefusedError``: not-found, not-a-file, pickle, config (longer than ``longest_config``), content.
    """
    if isinstance(source, Upload):
        yield source
        return
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        yield Upload(lambda count, offset: data[offset : offset + count], len(data))
        return
    if not isinstance(source, str | os.PathLike):
        raise RefusedError(
            f"it is a {type(source).__name__}",
            code=Reason.CONTENT,
            value=type(source).__name__,
            remedy="give a path, bytes or an Adapter",
        )
    path = os.fspath(source)
    with contextlib.ExitStack() as stack:
        descriptor = _open(path, stack)
        config = None
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folder = descriptor
            descriptor = _open_weights(folder, stack)
            config = _read_all(_open(CONFIG_NAME, stack, folder), CONFIG_NAME, longest_config)
        else:
            _refuse_pickle_name(path)
        size = _size(descriptor, path)
        yield Upload(partial(os.pread, descriptor), size, config)


def index_of(upload: Upload, longest_file: int, longest_header: int) -> Index:
    """The checked header; bytes beyond it are not read.

    Raises ``RefusedError``: file-size, pickle, header-size, header.
    """
    if upload.size > longest_file:
        raise RefusedError(
            f"its weights have {upload.size} bytes, the policy takes {longest_file}",
            code=Reason.FILE_SIZE,
            value=upload.size,
            remedy="send the expected tensors alone, at a rank and dtype that the policy allows",
        )
    try:
        return read_index(upload.read, upload.size, longest_header)
    except BadFileError as error:
        raise _bad_header(upload.read(8, 0), error, longest_header) from None


def _bad_header(first: bytes, error: BadFileError, longest: int) -> RefusedError:
    length = int.from_bytes(first, "little")
    if first.startswith(_MAGIC) and length > LONGEST_HEADER:  # a smaller one is a header's length that looks alike
        return RefusedError(
            "its weights are a zip or a pickle, and opening a client's pickle can run its code",
            code=Reason.PICKLE,
            value=first,
            remedy=_SAFE,
        )
    if isinstance(error, LongHeaderError):
        return RefusedError(
            f"{error}, and the policy takes {longest}",
            code=Reason.HEADER_SIZE,
            value=length,
            remedy="send the expected tensors alone, without metadata",
        )
    text = sentence(error)
    return RefusedError(f"its weights are not a readable safetensors file: {text}", code=Reason.HEADER, value=text)


def copied(upload: Upload, index: Index, spool: Spool) -> TensorFile:
    """A private copy, which nobody but this user can read, under a name of its own (see ``Spool``).

    The upload is read once, in order, from its first byte on, and those bytes are what is written.

    Raises ``RefusedError`` (changed) where the copy is not what ``index`` said; ``OSError`` where it cannot be written.
    """
    descriptor, path = _new_file(spool)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as target:
            at = 0
            while at < upload.size:
                chunk = upload.read(min(_CHUNK, upload.size - at), at)
                if not chunk:
                    raise _changed("it became shorter")
                at += len(chunk)
                _write(target.fileno(), chunk)
        try:
            file = TensorFile(path, hold=spool is None)
        except AdapterError as error:
            if isinstance(error.__cause__, OSError):  # of this machine: the copy is ours
                raise error.__cause__ from None
            raise _changed("its header became another") from error
        if file.index.digest != index.digest:
            raise _changed("its header became another")
    except BaseException:
        os.unlink(path)
        raise
    if spool is None:
        os.unlink(path)
    return file


def _new_file(spool: Spool) -> tuple[int, str]:
    """A new, empty file of this user alone; nothing of its name comes from a client."""
    if callable(spool):
        return spool()
    if spool is None:
        return tempfile.mkstemp(prefix="flexlora-")
    path = os.path.join(os.fspath(spool), f"{secrets.token_hex(16)}.safetensors")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path


def _write(descriptor: int, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(descriptor, left) :]


def _changed(how: str) -> RefusedError:
    return RefusedError(
        f"its weights changed while they were copied: {how}",
        code=Reason.CHANGED,
        value=how,
        remedy="have it sent again, and add it once it is complete",
    )


def _open(name: str | bytes, stack: contextlib.ExitStack, folder: int | None = None) -> int:
    try:
        descriptor = os.open(name, _FLAGS, dir_fd=folder)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if getattr(error, "errno", None) in SHORTAGES:
            raise
        link = _is_link(name, folder)
        reason = "it is a link" if link else getattr(error, "strerror", None) or str(error)
        raise RefusedError(
            f"{shown(name)} cannot be opened ({reason})",
            code=Reason.NOT_A_FILE if link else Reason.NOT_FOUND,
            value=name,
            remedy="send the file itself" if link else _SAVE,
        ) from None
    stack.callback(os.close, descriptor)
    return descriptor


def _is_link(name: str | bytes, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except (OSError, ValueError):
        return False


def _open_weights(folder: int, stack: contextlib.ExitStack) -> int:
    try:
        return _open(WEIGHTS_NAME, stack, folder)
    except RefusedError as error:
        if error.code == Reason.NOT_FOUND:
            with os.scandir(folder) as entries:
                for entry in itertools.islice(entries, 100):
                    _refuse_pickle_name(entry.name)
        raise


def _refuse_pickle_name(name: str | bytes) -> None:
    if PurePath(os.fsdecode(name)).suffix.lower() in _PICKLES:
        raise RefusedError(
            f"{shown(name)} is by its name a pickle, and opening a client's pickle can run its code",
            code=Reason.PICKLE,
            value=name,
            remedy=_SAFE,
        )


def _size(descriptor: int, path: str | bytes) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(
            f"{shown(path)} is no regular file ({stat.filemode(status.st_mode)})",
            code=Reason.NOT_A_FILE,
            value=path,
            remedy="send a file",
        )
    return status.st_size


def _read_all(descriptor: int, name: str, longest: int) -> bytes:
    _size(descriptor, name)
    content = bytearray()
    while len(content) <= longest:
        more = os.pread(descriptor, longest + 1 - len(content), len(content))
        if not more:
            break
        content += more
    return bytes(content)  # one byte too many where it is longer: the reader of configs refuses that
