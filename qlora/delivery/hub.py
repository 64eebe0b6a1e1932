"""The Hugging Face Hub: what one commit of a repository holds, and files of it that arrive whole and verified or not at all.

No stage imports this. Files travel over plain HTTP: huggingface_hub 2.4.0 throws away what an interrupted download has received, its Xet transfer
needs servers that a mirror need not have, and neither compares what arrived with the Hub's own sums. huggingface_hub is imported inside the
functions: `--help` of a tool need not wait for it. This downloader goes once the library resumes an interrupted file and compares it with the
Hub's sum.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from qlora.core.errors import InputError, MachineError
from qlora.core.files import BUFFER_BYTES, READ_BYTES
from qlora.core.hashing import sha256_of

if TYPE_CHECKING:
    import httpx2

LFS_POINTER = b"version https://git-lfs"
ATTEMPTS = 5
"""Tries that bring nothing new before a download or a question is given up."""
PAUSE_SECONDS = 1.0
"""Before the second try; doubled for each further one."""
TIMEOUT_SECONDS = 20.0
"""For a connection, and for each next piece of an answer."""
LONGEST_WAIT_SECONDS = 120
"""A server that asks for more patience than this is left, with a message that says how long it wants."""
MESSAGE_CHARACTERS = 400
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit, as the Hub lists it."""

    path: str
    size: int
    digest: str
    """Hex: sha256 of the content where it is in LFS, else the sha1 that Git names the blob by. Also the file's ETag."""
    is_lfs: bool


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of a repository of the Hub."""

    repo_id: str
    revision: str
    repo_type: Literal["dataset", "model"]
    license: str | None
    """As its card says; None where the card says nothing."""
    files: tuple[HubFile, ...]


class _ShortBodyError(Exception):
    """An answer ended before the file did."""


def read_commit(repo_id: str, revision: str, repo_type: Literal["dataset", "model"]) -> Commit:
    """What the Hub lists at one commit; files and folders whose name begins with a dot are left out.

    A branch or tag is looked up once: the commit that it names now is what the returned one says, and what is read.

    Raises:
        InputError: no such repository or commit, no right to read it, or a name that can't be a path of it.
        MachineError: the Hub can't be reached, or what answers is not a Hub.
    """
    if not REVISION.fullmatch(revision):
        raise InputError("pin-revision", f"--revision {revision!r} is no commit, branch or tag")
    connect()
    import httpx2  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id  # noqa: PLC0415

    with translate_hub_errors(repo_id, revision):
        validate_repo_id(repo_id)
        # HfApi.repo_info does not try again. Where nothing listens, waiting does not help.
        passing = (httpx2.RemoteProtocolError, httpx2.ReadError)
        url = f"{endpoint()}/api/{repo_type}s/{repo_id}/revision/{quote(revision, safe='')}"
        answer = http_backoff(
            "GET", url, headers=build_hf_headers(), max_retries=ATTEMPTS - 1, base_wait_time=PAUSE_SECONDS, retry_on_exceptions=passing
        )
        hf_raise_for_status(answer)
        try:
            info = answer.json()
            found, card = info["sha"], info.get("cardData") or {}
            if not COMMIT.fullmatch(found) or (COMMIT.fullmatch(revision) and found != revision):
                raise ValueError(f"asked for {revision} it answers with the commit {found}")
            tree = HfApi(endpoint=endpoint()).list_repo_tree(repo_id, recursive=True, revision=found, repo_type=repo_type)
            listed = [_listed(entry) for entry in tree if isinstance(entry, RepoFile)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"what it lists can't be read: {error!r}") from None
    files = tuple(file for file in sorted(listed, key=lambda file: file.path) if not _is_hidden(file.path))
    return Commit(repo_id, found, repo_type, _license(card), files)


def download(commit: Commit, file: HubFile, target: Path) -> None:
    """Download a file to `target`, which then holds the Hub's own bytes; an earlier try that was interrupted is resumed.

    Raises:
        InputError: the account may not read it, or the repository itself holds a Git-LFS pointer in its place.
        MachineError: the Hub can't be reached, or what arrived is not what the Hub lists.
    """
    if holds(target, file):
        return
    # With the digest in its name: another commit's interrupted download is never resumed.
    partial = target.with_name(f"{target.name}.{file.digest[:16]}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with translate_hub_errors(commit.repo_id, commit.revision):
        _receive(commit, file, partial)
    if not holds(partial, file):
        raise _not_as_listed(file, partial)
    if _is_pointer(partial):
        partial.unlink()
        raise InputError("hub-pointer", f"{commit.repo_id} itself holds a Git-LFS pointer in place of {file.path}: choose another commit")
    partial.replace(target)


def holds(path: Path, file: HubFile) -> bool:
    """Whether the path is a file with the bytes that the Hub lists."""
    return path.is_file() and path.stat().st_size == file.size and (sha256_of(path) if file.is_lfs else git_sha1(path)) == file.digest


def git_sha1(path: Path) -> str:
    """The name by which Git knows a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while chunk := content.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def endpoint() -> str:
    """The Hub's address, or that of the mirror in HF_ENDPOINT."""
    from huggingface_hub import constants  # noqa: PLC0415

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def shown_endpoint() -> str:
    """The address as messages show it: without a name and password, up to the last "@", however they are written."""
    return re.sub(r"//.*@", "//", endpoint())


def connect() -> None:
    """Give every later request of huggingface_hub a time limit, and none a wait of hours.

    Raises:
        InputError: HF_ENDPOINT is no address. huggingface_hub would show it, password included, in a traceback at its import.
    """
    try:
        address = urlsplit(os.environ.get("HF_ENDPOINT", "https://"))
        is_one = address.scheme in ("http", "https") and (address.port or 1) > 0
    except ValueError:
        is_one = False
    if not is_one:
        raise InputError("hub-endpoint", "HF_ENDPOINT is no address such as https://HOST or http://HOST:PORT; a password in it needs %2F for each /")
    from huggingface_hub import set_client_factory  # noqa: PLC0415

    set_client_factory(_bounded_client)


def _bounded_client() -> "httpx2.Client":
    from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers  # noqa: PLC0415

    def limit(request: "httpx2.Request") -> None:
        # Most calls of HfApi ask for no limit at all.
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {kind: asked.get(kind) or TIMEOUT_SECONDS for kind in ("connect", "read", "write", "pool")}

    def refuse_long_wait(response: "httpx2.Response") -> None:
        limits = parse_ratelimit_headers(response.headers)
        after = response.headers.get("Retry-After", "")
        wait = limits.reset_in_seconds if limits and limits.remaining == 0 else int(after) if after.isdigit() else 0
        if response.status_code in (408, 429, 500, 502, 503, 504) and wait > LONGEST_WAIT_SECONDS:
            raise MachineError("hub-unreachable", f"{shown_endpoint()} asks to wait {wait} s: run again after that; what arrived is kept")

    client = default_client_factory()
    client.event_hooks = {"request": [*client.event_hooks["request"], limit], "response": [refuse_long_wait]}
    return client


@contextmanager
def translate_hub_errors(repo_id: str, revision: str = "main") -> Iterator[None]:
    """Failures of huggingface_hub become one message each, in which no token stands.

    Raises:
        InputError: the repository is gated, absent, or not this account's to use.
        MachineError: anything else that came from the network.
    """
    import httpx2  # noqa: PLC0415
    from huggingface_hub.errors import FileMetadataError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        yield
    except HFValidationError as error:
        raise InputError("hub-name", f"{repo_id!r} can't be a repository of the Hub: {plain(error)}") from None
    except RuntimeError as error:
        # An upload's own error is the cause of the one that comes out of its thread.
        if not isinstance(error.__cause__, OSError | httpx2.HTTPError):
            raise
        raise _explained(error.__cause__, repo_id, revision) from None
    except OfflineModeIsEnabled:
        raise MachineError("hub-unreachable", f"HF_HUB_OFFLINE forbids to ask the Hub for {repo_id}: unset it") from None
    except (httpx2.HTTPError, httpx2.StreamError, LocalEntryNotFoundError, FileMetadataError, _ShortBodyError) as error:
        raise _explained(error, repo_id, revision) from None
    except ValueError as error:
        raise MachineError("hub-unreachable", f"{shown_endpoint()} does not answer as the Hub does: {plain(error)}. Is HF_ENDPOINT right?") from None


def _explained(error: BaseException, repo_id: str, revision: str) -> InputError | MachineError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError  # noqa: PLC0415

    if isinstance(error, GatedRepoError):
        return InputError("hub-gated", f"{repo_id} is gated: accept its terms on its page and set HF_TOKEN ({plain(error)})")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    # A private repository is hidden from a stranger as if it were not there, by 401 or by 404.
    if status == 404 or (status == 401 and error.response.headers.get("X-Error-Code") == "RepoNotFound"):  # type: ignore[attr-defined]
        return InputError("hub-not-found", f"the Hub has no {repo_id} at {revision} that this account may read: {plain(error)}")
    if status in (401, 403):
        return InputError("hub-denied", f"the Hub refuses {repo_id} to this account: set HF_TOKEN to a token that may ({plain(error)})")
    return MachineError("hub-unreachable", f"{repo_id}: {shown_endpoint()} fails: {plain(error)}. Try again; what arrived is kept.")


def plain(error: BaseException) -> str:
    """An error's text in one line without what is secret: the token, signatures in addresses, passwords in them."""
    from huggingface_hub import get_token  # noqa: PLC0415

    text = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    if token:
        text = text.replace(token, "***")
    # The endpoint first, as it was given: a "?" or "/" in a password would hide from the patterns where that ends.
    text = without_userinfo(re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text.replace(endpoint(), shown_endpoint())))
    return text if len(text) <= MESSAGE_CHARACTERS else f"{text[:MESSAGE_CHARACTERS]}..."


def without_userinfo(text: str) -> str:
    """The text with `//name:password@host` in its addresses as `//host`; the password may hold an "@"."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _receive(commit: Commit, file: HubFile, partial: Path) -> None:
    """Fill `partial` to the file's size, over as many connections as it takes while each brings something new."""
    import httpx2  # noqa: PLC0415

    most, idle = partial.stat().st_size, 0
    with tqdm(total=file.size, desc=file.path, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        while True:
            try:
                return _receive_once(commit, file, partial, bar)
            except (httpx2.TransportError, _ShortBodyError):
                if _is_pointer(partial):
                    raise _not_as_listed(file, partial) from None
                arrived = partial.stat().st_size
                most, idle = max(most, arrived), 0 if arrived > most else idle + 1
                if idle >= ATTEMPTS:
                    raise
                time.sleep(PAUSE_SECONDS * 2 ** (idle - 1))


def _receive_once(commit: Commit, file: HubFile, partial: Path, bar: Any) -> None:
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # noqa: PLC0415

    have = partial.stat().st_size
    if have >= file.size:
        return
    url = hf_hub_url(commit.repo_id, file.path, repo_type=commit.repo_type, revision=commit.revision, endpoint=endpoint())
    # The client leaves the token out where an answer leads to another host. A compressed answer could not be resumed.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, max_retries=ATTEMPTS - 1, base_wait_time=PAUSE_SECONDS, retry_on_exceptions=()
    ) as answer:
        hf_raise_for_status(answer)
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError(f"asked for {file.path} from byte {have} on, it sends {answer.headers.get('Content-Range')!r}")
        begun = have if answer.status_code == 206 else 0
        bar.update(begun - bar.n)
        with partial.open("ab" if begun else "wb", buffering=BUFFER_BYTES) as content:
            # In the pieces in which it arrives: a size would hold back, and at a break lose, what does not fill it.
            for chunk in answer.iter_bytes():
                content.write(chunk)
                bar.update(len(chunk))
                if content.tell() > file.size:
                    return
    if partial.stat().st_size < file.size:
        raise _ShortBodyError(f"{file.path} ends after {partial.stat().st_size:,} of {file.size:,} bytes")


def _not_as_listed(file: HubFile, partial: Path) -> MachineError:
    """The error for what arrived; it is removed, because it can't be resumed."""
    what = "is a Git-LFS pointer, not the file" if _is_pointer(partial) else f"is not what the Hub lists ({file.size:,} bytes, {file.digest[:12]}...)"
    partial.unlink()
    return MachineError(
        "hub-damaged", f"{file.path}: what {shown_endpoint()} sent {what}. Nothing of it was kept: run again, or from another HF_ENDPOINT."
    )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(len(LFS_POINTER)) == LFS_POINTER


def _listed(entry: Any) -> HubFile:
    path = str(entry.path)
    parts = PurePosixPath(path).parts
    if not path.isprintable() or "\\" in path or PurePosixPath(path).is_absolute() or ".." in parts or "/".join(parts) != path:
        raise InputError("hub-path", f"the repository lists a file {path!r}: such a name could lie outside its folder")
    if entry.lfs:
        return HubFile(path, int(entry.lfs.size), str(entry.lfs.sha256), True)
    return HubFile(path, int(entry.size), str(entry.blob_id), False)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _license(card: dict[str, Any]) -> str | None:
    """`other` alone says nothing: the name that stands beside it does."""
    found = card.get("license")
    names = [str(name) for name in (found if isinstance(found, list) else [found]) if name]
    if names == ["other"] and card.get("license_name"):
        return str(card["license_name"])
    return ", ".join(names) or None
