"""`hf://owner/name[@revision][/path]`: the files of a Hugging Face repository that will be read, and no others.

The list of files is asked first; `convert.choose` says which are wanted. They come through the hub's own cache, where
another run finds them again. Without a network, or with HF_HUB_OFFLINE, the cache alone is looked at.
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from convert.choose import Choice, choose, one_file
from convert.folders import INDEX
from convert.tensors import SourceError, read_index, some
from wanjax.writing import absolute

HUB = "hf://"

_ADDRESS = re.compile(
    r"hf://(?:models/)?(?!(?:datasets|spaces|buckets|kernels)/)(?P<repository>[^/@\s]+/[^/@\s]+)"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/[^/]+)|[^/]+))?(?P<path>/.*)?"  # another slash is written %2F
)

T = TypeVar("T")


class Unreachable(SourceError):
    """The hub does not answer, or was not to be asked: what is in the cache may do."""


class NotGiven(Unreachable):
    """The hub answers, but has no such repository or does not show it to this user."""


@dataclass(frozen=True)
class Address:
    """Where on the hub.

    Attributes:
      repository: "owner/name".
      revision: branch, tag or commit; None for the main one.
      path: of a folder or file in it, "" for all of it.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repository}{at}{f'/{self.path}' if self.path else ''}"


def parse(text: str) -> Address:
    """Reads an address.

    Raises:
      SourceError: not one of a model repository.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise SourceError(f"{text}: not a model repository; give {HUB}owner/name, {HUB}owner/name@revision or .../path")
    steps = [step for step in (match["path"] or "").split("/") if step]
    revision = match["revision"] and unquote(match["revision"])
    if {".", ".."} & {*steps, *(revision or "").split("/")}:
        raise SourceError(f"{text}: '.' and '..' mean nothing on the hub; give the path from the repository's top")
    return Address(match["repository"], revision, "/".join(steps))


def place(path: str | os.PathLike[str], only: Sequence[str], noted: Callable[[str], Any]) -> Path:
    """A source's file or folder on this machine, as an absolute path; what lies on the hub is fetched.

    Args:
      path: a path, or an address on the hub.
      only: the parts that are wanted.
      noted: hears of what the user should know.

    Raises:
      SourceError: nothing on the hub under that name, no way to get it, or several models to choose from.
    """
    return fetch(parse(str(path)), only, noted) if str(path).startswith(HUB) else absolute(path)


def fetch(address: Address, only: Sequence[str], noted: Callable[[str], Any]) -> Path:
    """The address's file or folder in the hub's cache, with all that will be read in it.

    Raises:
      SourceError: as in `place`.
    """
    import huggingface_hub.constants  # here: it takes a while, and no other source needs it

    def listing() -> list[str]:
        return [file.rfilename for file in _listing(address)]

    def download(name: str) -> Path:
        return Path(_asked(address, lambda: huggingface_hub.hf_hub_download(
            repo_id=address.repository, filename=name, revision=address.revision)))  # fmt: skip

    try:
        names = _asked(address, listing)
    except Unreachable as error:
        root = _cached(address)
        if root is None:
            raise
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            noted(f"{error}; its files in the cache are taken")
        return _gathered(address, _below(root), only, lambda name: root / name)
    return _gathered(address, names, only, download)


def sizes(address: Address, only: Sequence[str]) -> dict[str, int]:
    """Bytes by part of the files that `fetch` would get, "settings" among them; only the hub's list is asked for.

    Args:
      only: the parts that are wanted.

    Raises:
      SourceError: as in `place`; the cache is not looked at.
    """
    listed = _asked(address, lambda: _listing(address, files_metadata=True))
    files = {file.rfilename: file.size or 0 for file in listed}
    found = {"settings": sum(files.get(name, 0) for name in _chosen(address, files, only).small)}
    for part in only:
        try:
            choice = _chosen(address, files, (part,))
        except SourceError:
            continue  # others are there, or it would have been raised above
        names = {*choice.indexes, *choice.weights, *(name for one in choice.indexes for name in _shards(one, files))}
        found[part] = sum(files.get(name, 0) for name in names)
    return found


def _shards(index: str, names: Collection[str]) -> list[str]:
    """Those that "model.safetensors.index.json" names, as everyone calls them: "model-00001-of-00002.safetensors"."""
    variant = INDEX.search(index)[1] or ""
    stem, _, suffix = INDEX.sub("", index).rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(variant)}\.{re.escape(suffix)}")
    return [name for name in names if pattern.fullmatch(name)]


def _listing(address: Address, **options: Any) -> Sequence[Any]:
    """What the hub says of each file of a repository."""
    import huggingface_hub

    # Not list_repo_files: that tries for half a minute to reach a hub that is not there.
    return huggingface_hub.HfApi().model_info(address.repository, revision=address.revision, **options).siblings or ()


def _gathered(address: Address, names: Sequence[str], only: Sequence[str], get: Callable[[str], Path]) -> Path:
    """The local place of the address, once `get` has given all that is wanted of `names`."""
    choice = _chosen(address, names, only)
    wanted = [*choice.small, *choice.indexes]
    places = {name: get(name) for name in wanted}
    for index in choice.indexes:
        folder = index[: -len(index.rpartition("/")[2])]
        wanted += sorted({folder + shard for shard in read_index(places[index]).values()})
    wanted += choice.weights
    absent = [name for name in wanted if name not in names]
    if absent:
        raise SourceError(f"{address}: {some(absent, 4)} missing; it is incomplete there, or in the cache")
    for name in wanted:
        places[name] = places.get(name) or get(name)
    if not places:
        raise SourceError(f"{address}: nothing in it is read")
    roots = {Path(*file.parts[: len(file.parts) - len(name.split("/"))]) for name, file in places.items()}
    if len(roots) != 1:
        raise SourceError(f"{address}: changed on the hub while it was fetched; run it again")
    return absolute(roots.pop() / address.path)


def _chosen(address: Address, names: Collection[str], only: Sequence[str]) -> Choice:
    """What will be read of the files of an address's repository."""
    if address.path in names:
        return one_file(names, address.path, str(address))
    prefix = f"{address.path}/" if address.path else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not inside:
        raise SourceError(f"{address}: no such file or folder in it; it holds {some(_tops(address, names), 12)}")
    return choose(inside, only, str(address)).under(prefix)


def _tops(address: Address, names: Collection[str]) -> list[str]:
    """What lies in the deepest folder of the address's path that is there."""
    steps = address.path.split("/")
    for k in range(len(steps) - 1, -1, -1):
        prefix = "/".join([*steps[:k], ""])
        tops = {prefix + name[len(prefix) :].partition("/")[0] for name in names if name.startswith(prefix)}
        if tops:
            return sorted(tops)
    return ["nothing"]


def _below(root: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def _cached(address: Address) -> Path | None:
    """The folder that holds a revision in the hub's cache, as its documentation lays it out; None without one."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{address.repository.replace('/', '--')}"
    revision = address.revision or "main"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def _asked(address: Address, question: Callable[[], T]) -> T:
    """What the hub answers.

    Raises:
      SourceError: why it does not; `Unreachable` where the cache may help.
    """
    from huggingface_hub import errors

    repository = address.repository
    try:
        return question()
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise NotGiven(f"{address}: asks for its terms to be accepted; do so on {page}, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        text = f"{address}: no such repository, or a private one; check the name, or log in with hf auth login"
        raise NotGiven(text) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{address}: no revision {address.revision!r} of it; leave it away for the main one"
        ) from error
    except errors.HFValidationError as error:
        raise SourceError(f"{address}: not a repository's name; give {HUB}owner/name") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else "no connection"
        raise Unreachable(f"{address}: cannot be had from the hub ({reason}) or its cache") from error
    except OSError as error:
        if isinstance(error, errors.HfHubHTTPError) or error.errno is None:
            raise Unreachable(f"{address}: the hub does not answer ({_line(error)}); try again later") from error
        raise SourceError(f"{address}: cannot be stored ({error.strerror}); free some space, or set HF_HOME") from error
    except Exception as error:  # its HTTP library's own, which is another one from version to version
        raise Unreachable(f"{address}: the hub cannot be reached ({_line(error)}); check the network") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
