"""The Hugging Face Hub: what one commit of a repository holds, and files of it that arrive whole and verified or not at all.

No stage imports this. Files travel over plain HTTP: huggingface_hub 2.4.0 throws away what an interrupted download has received, its Xet transfer
needs servers that a mirror need not have, and neither compares what arrived with the Hub's own sums. huggingface_hub is imported inside the
functions: `--help` of a tool need not wait for it. This downloader goes once the library resumes an interrupted file and compares it with the
Hub's sum.
"""

import hashlib
import os
import re
import reprlib
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

import orjson
from tqdm import tqdm

from qlora.core.errors import InputError, MachineError
from qlora.core.files import BUFFER_BYTES, READ_BYTES
from qlora.core.hashing import sha256_of
from qlora.core.text import nfc
from qlora.delivery.bounds import BoundedBackend, TooLongError, TooSlowError

if TYPE_CHECKING:
    import httpx2

LFS_POINTER = b"version https://git-lfs"
ATTEMPTS = 5
"""Tries without progress before a download or a request is given up."""
PAUSE_SECONDS = 1.0
"""Before the second try; doubled for each further one."""
TIMEOUT_SECONDS = 20.0
"""For a connection, and for each next piece of an answer."""
LONGEST_WAIT_SECONDS = 120
"""A server that asks for more patience than this is left, with a message that says how long it wants."""
WINDOW_SECONDS = 30.0
"""Of waiting for the server, over which its rate is measured."""
LEAST_RATE = 10_000
"""Bytes per second. A slower download is given up: 1 GB would take more than a day, and a server may keep one open on purpose."""
LEAST_PROGRESS_BYTES = 1 << 16
"""A connection that breaks before it has sent this much counts as a try without progress."""
ANSWER_BYTES = 1 << 24
"""Limit of an answer that is not a file: headers, a page of a listing, an error. A page of the Hub has under 1 MB."""
LISTING_SECONDS = 600.0
"""For all pages of a listing."""
LISTING_ENTRIES = 200_000
"""The Hub itself advises against repositories of more than 100,000 files."""
PATH_BYTES, NAME_BYTES = 1000, 200
"""Limits of a path and of each name in it: file systems end at 255, and a download adds `.DIGEST.partial`."""
LICENSE_CHARACTERS = 200
MESSAGE_CHARACTERS = 400
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
MOST_BYTES = "most_bytes"
"""Extension of a request: how many bytes its answer may send."""


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


class _LongWaitError(Exception):
    """The server asks for more patience than there is."""


def read_commit(repo_id: str, revision: str, repo_type: Literal["dataset", "model"]) -> Commit:
    """What the Hub lists at one commit; files and folders whose name begins with a dot are left out.

    A branch or tag is looked up once: the commit that it names now is what the returned one says, and what is read.

    Raises:
        InputError: no such repository or commit, no right to read it, or a name that can't be a path of it.
        MachineError: the Hub can't be reached, or what answers is not a Hub.
    """
    if not REVISION.fullmatch(revision):
        raise InputError("pin-revision", f"--revision {revision!r} is not a commit, branch or tag")
    connect()
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    with translate_hub_errors(repo_id, revision):
        validate_repo_id(repo_id)
        place = f"{endpoint()}/api/{repo_type}s/{repo_id}"
        info, _ = _ask(f"{place}/revision/{quote(revision, safe='')}")
        if not isinstance(info, dict):
            raise ValueError("its answer is not a commit")
        found, card = info.get("sha"), info.get("cardData")
        if not isinstance(found, str) or not COMMIT.fullmatch(found):
            raise ValueError(f"its commit is called {reprlib.repr(found)}")
        if COMMIT.fullmatch(revision) and found != revision:
            raise ValueError(f"asked for {revision} it answers with the commit {found}")
        license = _license(card)
        listed = [_listed(entry, repo_id) for entry in _entries(f"{place}/tree/{found}")]
    files = [file for file in listed if file and not _is_hidden(file.path)]
    return Commit(repo_id, found, repo_type, license, tuple(sorted(files, key=lambda file: file.path)))


def _ask(url: str) -> tuple[Any, str | None]:
    """An answer of the Hub's API, and the query of its link to a next page.

    Raises:
        ValueError: it is not JSON.
    """
    import httpx2  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # noqa: PLC0415

    # HfApi does not try again. Where nothing listens, waiting does not help.
    passing = (httpx2.RemoteProtocolError, httpx2.ReadError)
    answer = http_backoff("GET", url, headers=build_hf_headers(), max_retries=ATTEMPTS - 1, base_wait_time=PAUSE_SECONDS, retry_on_exceptions=passing)
    hf_raise_for_status(answer)
    link = answer.links.get("next", {}).get("url")
    # orjson has a limit of depth, and takes neither NaN nor lone surrogates.
    return orjson.loads(answer.content), urlsplit(link).query if link else None


def _entries(url: str) -> Iterator[Any]:
    """The entries of a folder and all below it, page by page.

    Raises:
        ValueError: they are none, or do not end.
    """
    query: str | None = "recursive=true&expand=false"
    asked: set[str] = set()
    count, deadline = 0, time.monotonic() + LISTING_SECONDS
    while query is not None:
        asked.add(query)
        # Of a link the query alone: its address could be another host, which must not get the token.
        page, query = _ask(f"{url}?{query}")
        if not isinstance(page, list):
            raise ValueError("its listing is not a list")
        yield from page
        count += len(page)
        if query is not None and (query in asked or not page or count > LISTING_ENTRIES or time.monotonic() > deadline):
            raise ValueError(f"its listing does not end, after {len(asked):,} pages with {count:,} entries")


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
    _require_room(commit, file, partial)
    with translate_hub_errors(commit.repo_id, commit.revision, file.path):
        _receive(commit, file, partial)
    if not holds(partial, file):
        raise _not_as_listed(commit, file, partial)
    if _is_pointer(partial):
        partial.unlink()
        raise InputError("hub-pointer", f"{commit.repo_id} itself holds a Git-LFS pointer in place of {file.path}: choose another commit")
    partial.replace(target)


def require_distinct(repo_id: str, files: Iterable[HubFile]) -> None:
    """Raises InputError when two of the files would be one place, here or on a file system that ignores case or Unicode forms."""
    places: dict[str, str] = {}
    for file in files:
        key = _key(file.path)
        if key in places:
            raise InputError(
                "hub-path", f"{repo_id} lists both {places[key]!r} and {file.path!r}, which can be one file: leave one out, or choose another commit"
            )
        places[key] = file.path
    for key, path in places.items():
        if folder := next((places[str(parent)] for parent in PurePosixPath(key).parents if str(parent) in places), None):
            raise InputError("hub-path", f"{repo_id} lists {folder!r} both as a file and as the folder of {path!r}: choose another commit")


def _key(path: str) -> str:
    return nfc(nfc(path).casefold())


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
        raise InputError("hub-endpoint", "HF_ENDPOINT is not an address like https://HOST or http://HOST:PORT; a password in it needs %2F for each /")
    from huggingface_hub import set_client_factory  # noqa: PLC0415

    set_client_factory(_bounded_client)


def _bounded_client() -> "httpx2.Client":
    from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers  # noqa: PLC0415

    def limit(request: "httpx2.Request") -> None:
        # Most calls of HfApi ask for no limit at all.
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {kind: asked.get(kind) or TIMEOUT_SECONDS for kind in ("connect", "read", "write", "pool")}
        # A compressed answer can't be resumed, and a small one can be gigabytes.
        request.headers["Accept-Encoding"] = "identity"

    def check(response: "httpx2.Response") -> None:
        limits = parse_ratelimit_headers(response.headers)
        after = response.headers.get("Retry-After", "")
        wait = limits.reset_in_seconds if limits and limits.remaining == 0 else int(after) if after.isdigit() else 0
        if response.status_code in (408, 429, 500, 502, 503, 504) and wait > LONGEST_WAIT_SECONDS:
            raise _LongWaitError(f"asks to wait {wait} s")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ValueError("it compresses its answer, unasked")
        # The bodies of redirects and errors are read too.
        most = response.request.extensions.get(MOST_BYTES, ANSWER_BYTES) if response.is_success else ANSWER_BYTES
        response.extensions["network_stream"].allow(most)

    client: Any = default_client_factory()
    client.event_hooks = {"request": [*client.event_hooks["request"], limit], "response": [check]}
    # The one for direct connections, and those for proxies; None where the environment names none. httpx has no public way in.
    for transport in filter(None, (client._transport, *client._mounts.values())):
        transport._pool._network_backend = BoundedBackend(transport._pool._network_backend, WINDOW_SECONDS, LEAST_RATE, ANSWER_BYTES)
    return client  # type: ignore[no-any-return]


@contextmanager
def translate_hub_errors(repo_id: str, revision: str = "main", path: str | None = None) -> Iterator[None]:
    """Failures of huggingface_hub become one message each, in which no token stands.

    Args:
        path: The repository's file that is being downloaded.

    Raises:
        InputError: the repository is gated, absent, or not this account's to use.
        MachineError: anything else that came from the network.
    """
    import httpx2  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled  # noqa: PLC0415

    what = f"{repo_id}: {path}" if path else repo_id
    try:
        yield
    except HFValidationError as error:
        raise InputError("hub-name", f"{repo_id!r} can't be a repository of the Hub: {plain(error)}") from None
    except OfflineModeIsEnabled:
        raise MachineError("hub-unreachable", f"HF_HUB_OFFLINE forbids to ask the Hub for {repo_id}: unset it") from None
    except TooSlowError as error:
        raise MachineError(
            "hub-slow", f"{what}: {shown_endpoint()} {error}. Run again to resume: what arrived is kept. Or set HF_ENDPOINT to a nearer mirror."
        ) from None
    except _LongWaitError as error:
        raise MachineError("hub-unreachable", f"{what}: {shown_endpoint()} {plain(error)}: run again after that; what arrived is kept") from None
    except (httpx2.HTTPError, httpx2.StreamError, _ShortBodyError) as error:
        raise _explained(error, what, repo_id, revision) from None
    # Of huggingface_hub too, which takes an answer to be of the form that it expects.
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, httpx2.InvalidURL, TooLongError) as error:
        said = plain(error) if isinstance(error, ValueError | TooLongError | httpx2.InvalidURL) else f"{type(error).__name__}, {plain(error)}"
        raise MachineError("hub-unreachable", f"{what}: {shown_endpoint()} does not answer as the Hub does: {said}. Is HF_ENDPOINT right?") from None
    except RuntimeError as error:
        # An upload's own error is the cause of the one that comes out of its thread.
        if error.__cause__ is None:
            raise
        with translate_hub_errors(repo_id, revision, path):
            raise error.__cause__ from None


def _explained(error: BaseException, what: str, repo_id: str, revision: str) -> InputError | MachineError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError  # noqa: PLC0415

    if isinstance(error, GatedRepoError):
        return InputError("hub-gated", f"{repo_id} is gated: accept its terms on its page and set HF_TOKEN ({plain(error)})")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    # A private repository is hidden from a stranger as if it were not there, by 401 or by 404.
    if status == 404 or (status == 401 and error.response.headers.get("X-Error-Code") == "RepoNotFound"):  # type: ignore[attr-defined]
        return InputError("hub-not-found", f"the Hub has no {repo_id} at {revision} that this account may read: {plain(error)}")
    if status in (401, 403):
        return InputError("hub-denied", f"the Hub refuses {repo_id} to this account: set HF_TOKEN to a token that may ({plain(error)})")
    return MachineError("hub-unreachable", f"{what}: {shown_endpoint()} fails: {plain(error)}. Try again; what arrived is kept.")


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
    """Fill `partial` to the file's size, over as many connections as it takes while each makes progress."""
    import httpx2  # noqa: PLC0415

    most, idle = partial.stat().st_size, 0
    with tqdm(total=file.size, desc=file.path, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        while True:
            try:
                return _receive_once(commit, file, partial, bar)
            except (httpx2.TransportError, _ShortBodyError):
                if _is_pointer(partial):
                    raise _not_as_listed(commit, file, partial) from None
                arrived = partial.stat().st_size
                most, idle = max(most, arrived), 0 if arrived >= most + LEAST_PROGRESS_BYTES else idle + 1
                if idle >= ATTEMPTS:
                    raise
                time.sleep(PAUSE_SECONDS * 2 ** max(idle - 1, 0))


def _receive_once(commit: Commit, file: HubFile, partial: Path, bar: Any) -> None:
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # noqa: PLC0415

    have = partial.stat().st_size
    if have >= file.size:
        return
    url = hf_hub_url(commit.repo_id, file.path, repo_type=commit.repo_type, revision=commit.revision, endpoint=endpoint())
    # The client leaves the token out where an answer leads to another host.
    headers = {**build_hf_headers(), **({"Range": f"bytes={have}-"} if have else {})}
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        max_retries=ATTEMPTS - 1,
        base_wait_time=PAUSE_SECONDS,
        retry_on_exceptions=(),
        # An answer in chunks sends more bytes than the file has.
        extensions={MOST_BYTES: 2 * file.size + ANSWER_BYTES},
    ) as answer:
        hf_raise_for_status(answer)
        part = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", answer.headers.get("Content-Range", ""), re.ASCII)
        if answer.status_code == 206 and (part is None or int(part[1]) != have or part[2] not in ("*", str(file.size))):
            raise ValueError(f"asked for byte {have:,} of {file.size:,} on, it sends {answer.headers.get('Content-Range')!r}")
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


def _require_room(commit: Commit, file: HubFile, partial: Path) -> None:
    missing, free = file.size - partial.stat().st_size, shutil.disk_usage(partial.parent).free
    if missing > free:
        raise MachineError(
            "disk-space",
            f"{partial.parent} has {free / 1e6:,.0f} MB left, {file.path} of {commit.repo_id} needs {missing / 1e6:,.0f} MB more: make room, then "
            "run again",
        )


def _not_as_listed(commit: Commit, file: HubFile, partial: Path) -> MachineError:
    """The error for what arrived; it is removed, because it can't be resumed."""
    what = "is a Git-LFS pointer, not the file" if _is_pointer(partial) else f"is not what the Hub lists ({file.size:,} bytes, {file.digest[:12]}...)"
    partial.unlink()
    return MachineError(
        "hub-damaged",
        f"{commit.repo_id}: {file.path}: what {shown_endpoint()} sent {what}. Nothing of it was kept: run again, or from another HF_ENDPOINT.",
    )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(len(LFS_POINTER)) == LFS_POINTER


def _listed(entry: Any, repo_id: str) -> HubFile | None:
    """A file of the listing; None for a folder.

    Raises:
        InputError: its name is none that a file in a folder can have everywhere.
        ValueError: the entry is not of the Hub's form. A digest becomes a file's name.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise ValueError(f"its listing holds {reprlib.repr(entry)}")
    if entry["type"] != "file":
        return None
    path, lfs = entry.get("path"), entry.get("lfs")
    if not isinstance(path, str):
        raise ValueError("its listing holds a file without a name")
    if problem := _path_problem(path):
        raise InputError("hub-path", f"{repo_id} lists a file {_short(path)}: {problem}. Choose another commit or repository.")
    source = entry if lfs is None else lfs
    if not isinstance(source, dict):
        raise ValueError(f"its listing says for {path}: lfs = {reprlib.repr(lfs)}")
    size, digest = source.get("size"), source.get("oid")
    # A bool is an int.
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise ValueError(f"its listing says for {path}: size = {reprlib.repr(size)}")
    if not isinstance(digest, str) or not (SHA1 if lfs is None else SHA256).fullmatch(digest):
        raise ValueError(f"its listing says for {path}: oid = {reprlib.repr(digest)}")
    return HubFile(path, size, digest, lfs is not None)


def _path_problem(path: str) -> str | None:
    parts = PurePosixPath(path).parts
    if not path.isprintable() or "\\" in path:
        return "a name with a backslash or a character that can't be printed"
    if not parts or path.startswith("/") or ".." in parts or "/".join(parts) != path:
        return "such a name could lie outside its folder"
    if len(path.encode()) > PATH_BYTES or any(len(part.encode()) > NAME_BYTES for part in parts):
        return f"a path of more than {PATH_BYTES} bytes, or a name in it of more than {NAME_BYTES}"
    if path.endswith(".partial"):
        return "a half-written file has such a name"
    return None


def _short(path: str) -> str:
    return repr(path) if len(path) <= LICENSE_CHARACTERS else f"{path[:LICENSE_CHARACTERS]!r}..."


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _license(card: Any) -> str | None:
    """`other` alone says nothing: the name beside it does. None for what is not the name of a licence: nothing depends on it."""
    if not isinstance(card, dict):
        return None
    found = card.get("license")
    names = [name for name in (found if isinstance(found, list) else [found]) if name]
    if names == ["other"] and card.get("license_name"):
        names = [card["license_name"]]
    if not all(isinstance(name, str) and name.isprintable() for name in names) or len(license := ", ".join(names)) > LICENSE_CHARACTERS:
        return None
    return license or None
