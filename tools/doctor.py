"""Diagnose this checkout and print the commands that fix it.

    python -m tools.doctor                 every finding with its command; exit code 3 if there is one
    python -m tools.doctor --commands      the commands alone, to be read and run

Looks at: a HEAD, an experiment or a lock that a killed run left in the middle, queue tasks without a worker, a shallow clone, the environment,
owners, the base model, dependencies that are missing or that Git does not know, room on the disk, damaged objects of the cache, and what killed runs
left behind. No command loses an edit or a commit.

A note is not a finding: an interrupted run that `dvc repro` resumes, or a wrong value in params.yaml.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from qlora import params
from qlora.core import environment
from qlora.core.dvc_lock import cached, is_cached, md5_of, objects, outputs_in_git, outputs_of, params_values, pipeline_stages, recorded, resolved
from qlora.core.errors import InputError, StoppedError, UserFacingError
from qlora.core.files import is_abandoned, require_file
from qlora.core.text import in_shell
from qlora.model.manifest import find_weights, read_manifest
from qlora.runtime import command
from qlora.runtime.git import git, is_tracked
from qlora.runtime.locks import is_locked
from tools import recipes

LITTLE_BYTES = 100_000_000
"""What a small run writes. A training that needs more says so before it begins."""
FIXES = {
    # What it holds is kept: it may be more than what was committed.
    "lock-damaged": "cp dvc.lock .dvc/tmp/ && git checkout HEAD -- dvc.lock",
    "params-invalid": "git diff params.yaml",
    "params-syntax": "git diff params.yaml",
}
"""By the code of an error that ends a check."""
ARGUMENTS = Path(".dvc/tmp/repro.dat")
"""DVC has it in the index while it begins an experiment; it belongs into no commit."""
NOTES = {"params-invalid"}
"""Codes of what is no damage: a value that somebody set, and that every stage refuses with the same words."""
IN_THE_MIDDLE = tuple(f"refs/exps/exec/EXEC_{name}" for name in ("BASELINE", "MERGE", "BRANCH"))
"""References that DVC removes at the end of each experiment, good or bad. EXEC_HEAD, and EXEC_APPLY after `dvc exp apply`, stay for good."""


class Finding(NamedTuple):
    what: str
    fix: str
    """A command for the shell."""
    is_note: bool = False
    """Worth knowing, but nothing is wrong: the exit code is 0."""


def locks_of_git() -> Iterator[Finding]:
    """Files by which Git, and dvc in its place, keeps others from writing a reference or the index. Only who made one removes it."""
    # A worktree has an index and a HEAD of its own, beside what all worktrees share.
    folders = {Path(git("rev-parse", name) or ".git") for name in ("--git-dir", "--git-common-dir")}
    left = sorted({lock for folder in folders for lock in [*folder.glob("*.lock"), *(folder / "refs").rglob("*.lock")]})
    if left and not _git_or_dvc_works():
        quoted = " ".join(in_shell(path) for path in left)
        yield Finding(f"a killed git or dvc left {', '.join(map(str, left))}: what these lock can't be written", f"rm -f {quoted}")


def detached_head() -> Iterator[Finding]:
    branch = _branch_that_an_experiment_left()
    if branch is None or _git_or_dvc_works():
        return
    # Moves HEAD alone: files and index stay as they are, and what differs from the branch shows as a change.
    fix = f"git symbolic-ref HEAD {in_shell(f'refs/heads/{branch}')}"
    if is_tracked(ARGUMENTS):
        fix += f" && git reset --quiet -- {ARGUMENTS}"
    # Without those that dvc made for an experiment.
    commits = ("--invert-grep", "--grep=^dvc: commit experiment ", "HEAD", "--not", "--branches", "--tags", "--remotes")
    if newest := git("rev-list", "--max-count=1", *commits):
        fix = f"git branch detached-{newest[:12]} {newest} && {fix}"
    yield Finding(
        f"an experiment that was killed in the workspace left HEAD on no branch; it was on {branch} "
        "(an edit that is not in its file is in `git stash list`)",
        fix,
    )


def _branch_that_an_experiment_left() -> str | None:
    """The branch that HEAD was on when a killed experiment detached it; None if it is on one, or somebody checked out a commit.

    By Git's log of HEAD: an experiment detaches it where it is, and names the commit in full, "checkout: moving from main to 40 hex digits".
    `git checkout COMMIT` moves it, `git switch --detach` writes "to HEAD", a rebase "rebase (start)".
    """
    log = Path(git("rev-parse", "--git-path", "logs/HEAD") or ".git/logs/HEAD")
    if git("symbolic-ref", "--quiet", "HEAD") or not Path(".dvc/tmp/exps").is_dir() or not log.is_file():
        return None
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        entry, _, message = line.partition("\t")
        before, after = entry.split()[:2]
        moved = re.fullmatch("checkout: moving from (.+) to (.+)", message)
        if moved and not before == after == moved[2]:
            return None
        # From a commit: an experiment that ran, or was killed too, after HEAD was detached.
        if moved and not re.fullmatch("[0-9a-f]{40}", moved[1]):
            return moved[1] if git("rev-parse", "--verify", "--quiet", f"refs/heads/{moved[1]}") else None
        if re.match(r"rebase|(dvc|scm): Restore HEAD to '(?![0-9a-f]{40}')", message):
            return None
    return None


def experiment_in_the_middle() -> Iterator[Finding]:
    """References that DVC sets while an experiment runs and removes at its end."""
    left = [name for name in git("for-each-ref", "--format=%(refname)", *IN_THE_MIDDLE).splitlines() if name]
    if not left or _running("exp", "run") or _running("exp", "exec-run"):
        return
    commands = [f"git update-ref -d {in_shell(name)}" for name in left]
    aside = "refs/exps/exec/EXEC_MERGE"
    if aside in left and subprocess.run(["git", "diff", "--quiet", aside], capture_output=True, check=False).returncode:
        # Edits that dvc had put aside; perhaps they are nowhere else.
        commands.insert(0, f'git stash store --message "put aside by an experiment that was killed" $(git rev-parse {aside})')
    yield Finding(f"a killed experiment left {', '.join(left)}", " && ".join(commands))


def broken_rwlock() -> Iterator[Finding]:
    """DVC's lists of files in use, cut off by a kill: DVC fixes one that names dead processes, but refuses one that is no JSON."""
    for path in (Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/exps/rwlock")):
        try:
            require_file(path)
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            if not _git_or_dvc_works():
                yield Finding(f"{path} was cut off when dvc was killed: dvc refuses to begin", f"rm -f {path}")


def emptied_params() -> Iterator[Finding]:
    """dvc writes params.yaml where it lies, and a kill in between leaves nothing of it."""
    path = Path("params.yaml")
    if path.is_file() and path.stat().st_size == 0 and not _git_or_dvc_works():
        yield Finding("params.yaml is empty: dvc was killed while it wrote it", f"git checkout HEAD -- {path}")


def dead_queue_tasks() -> Iterator[Finding]:
    if not Path(".dvc/tmp/exps/celery").is_dir() or _running("queue-worker") or _running("exp", "exec-run"):
        return
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "queue", "status"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    for task in re.findall(r"^(\w{7})\b.*\bRunning\s*$", listed, re.MULTILINE):
        yield Finding(
            f"queue task {task} is 'Running', but no worker runs",
            f"dvc queue kill --force {task} && dvc queue remove {task}   # then queue it again",
        )


def shallow_clone() -> Iterator[Finding]:
    if git("rev-parse", "--is-shallow-repository") == "true":
        yield Finding("this is a shallow clone: `dvc exp run --temp` and `--queue` lose what they make", "git fetch --unshallow")


def no_environment() -> Iterator[Finding]:
    found = shutil.which("python")
    if found is None or Path(found).resolve() != Path(sys.executable).resolve() or Path(found).parent != Path(sys.executable).parent:
        folder = Path(sys.executable).parent
        yield Finding(f"stages would run {found or 'no python at all'}, not {sys.executable}", f"source {in_shell(folder / 'activate')}")
    if shutil.which("dvc") is None:
        yield Finding("there is no dvc on PATH", "make setup && source .venv/bin/activate")


def other_versions() -> Iterator[Finding]:
    try:
        environment.require_pinned_versions(Path("requirements.txt"), allow_other=False)
    except UserFacingError as error:
        yield Finding(error.message.partition("\nRun ")[0], "make setup")


def foreign_owner() -> Iterator[Finding]:
    own = os.geteuid()
    places = [Path(name) for name in (".", ".git", ".dvc", ".dvc/cache", ".dvc/tmp", "data", "models", "metrics", "reports")]
    foreign = [place for place in places if place.exists() and place.stat().st_uid != own]
    if foreign:
        yield Finding(
            f"{', '.join(map(str, foreign))} belong to another user", f"{'sudo ' if shutil.which('sudo') else ''}chown -R $(id -u):$(id -g) ."
        )


def base_model() -> Iterator[Finding]:
    name = params.load(Path("params.yaml")).base_model.name
    path, folder = Path("models/base") / f"{name}.json", Path("models/base") / name
    fix = recipes.pin_command(name) or f"python -m tools.pin {in_shell(name)} --path DIR"
    try:
        manifest = read_manifest(path)
        if manifest.repo_id and manifest.revision:
            fix = f"python -m tools.pin {in_shell(name)} --repo-id {in_shell(manifest.repo_id)} --revision {in_shell(manifest.revision)}"
        find_weights(name, manifest)
    except InputError as error:
        deleted = " ".join(in_shell(place) for place in (path, folder) if not place.exists() and is_tracked(place))
        yield Finding(error.message, f"git checkout -- {deleted}" if deleted else fix)


def missing_dependencies() -> Iterator[Finding]:
    """Files without which DVC refuses to begin."""
    # What is wrong in it is another check's finding, as is a base model that is not there.
    manifest = f"models/base/{params.load(Path('params.yaml')).base_model.name}.json"
    pipeline, values = pipeline_stages(), params_values()
    made = {path for stage in pipeline.values() for path in outputs_of(stage)}
    named = {resolved(dep, values) for stage in pipeline.values() for dep in stage["deps"]}
    missing: dict[str, list[str]] = {}
    for path in sorted(named - made):
        if path != manifest and not Path(path).exists():
            missing.setdefault(_way_to(path), []).append(path)
    for fix, paths in missing.items():
        yield Finding(
            f"{', '.join(paths)} {'do' if len(paths) > 1 else 'does'} not exist, and a stage depends on {'them' if len(paths) > 1 else 'it'}", fix
        )


def _way_to(path: str) -> str:
    """The command that gets a missing file: from Git, from DVC, or from the Hub by a recipe's command."""
    if is_tracked(Path(path)):
        return f"git checkout -- {in_shell(path)}"
    pointers = [f"{in_shell(str(place))}.dvc" for place in (Path(path), *Path(path).parents) if Path(f"{place}.dvc").is_file()]
    ways = [f"dvc {action} {pointer}" for pointer in pointers[:1] for action in ("checkout", "pull")]
    fetch = recipes.fetch_command(path)
    return " || ".join([*ways, *([fetch] if fetch else [])]) or "git diff params.yaml dvc.yaml"


def unknown_to_git() -> Iterator[Finding]:
    """What says which raw data there are: everybody else's clone lacks it."""
    # Each name ends with a zero byte.
    others = git("ls-files", "-z", "--others", "--exclude-standard", "--", "data/raw").split("\0")
    pointers = [name for name in others if name.endswith((".dvc", ".source.json"))]
    if pointers:
        ignored = [name for name in others if name == "data/raw/.gitignore"]
        yield Finding(f"Git does not know {', '.join(pointers)}", f"git add {' '.join(in_shell(name) for name in [*pointers, *ignored])}")


def little_room() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    if free < LITTLE_BYTES:
        yield Finding(f"{free / 1e6:.0f} MB are left on this disk", "dvc gc --workspace --all-branches --all-tags --all-experiments")


def damaged_cache() -> Iterator[Finding]:
    """Objects of the outputs of dvc.lock that are not what their name says, or are not there though the output is."""
    in_git = outputs_in_git()
    for entry in recorded():
        if not entry.is_output or entry.path in in_git:
            continue
        path = Path(entry.path)
        is_whole = path.exists() and md5_of(path) == entry.md5
        again = f"dvc commit --force {in_shell(entry.stage)}" if is_whole else f"(dvc fetch {in_shell(entry.path)} || dvc repro --force)"
        damaged = [cached(part) for part in objects(entry.md5) if cached(part).is_file() and md5_of(cached(part)) != part.removesuffix(".dir")]
        if damaged:
            yield Finding(
                f"{', '.join(map(str, damaged))}, of {entry.path}, is damaged",
                f"rm -f {' '.join(in_shell(place) for place in damaged)} && {again}",
            )
        elif is_whole and not is_cached(path):
            yield Finding(f"{path} is not in the cache as a whole: its disk was full, perhaps", again)


def damaged_workspace() -> Iterator[Finding]:
    """Outputs that were changed after they were made."""
    outputs = [entry for entry in recorded() if entry.is_output]
    # DVC removes the outputs of a stage before it runs: one that lacks some was stopped or failed, and runs again anyway.
    stopped = {entry.stage for entry in outputs if not Path(entry.path).exists()}
    for entry in outputs:
        path = Path(entry.path)
        # In the cache: what was made for another commit, as after `git checkout` without `dvc checkout`.
        if entry.stage not in stopped and md5_of(path) != entry.md5 and not is_cached(path):
            yield Finding(f"{path} is not what dvc.lock records", "dvc repro")


def left_behind() -> Iterator[Finding]:
    """What killed runs could not remove."""
    busy = _running("exp", "run") or _running("exec-run") or _running("queue-worker")
    copies = [path for path in Path(".dvc/tmp/exps").glob("tmp*") if path.is_dir()]
    if copies and not busy:
        yield Finding(f"{len(copies)} copies of the workspace in .dvc/tmp/exps, made for experiments that ended", "rm -rf .dvc/tmp/exps/tmp*")
    for folder in Path(".dvc/tmp/checkpoints").glob("*"):
        if list(folder.glob("checkpoint-*")) and not is_locked(folder / "lock"):
            yield Finding(
                f"{folder} holds checkpoints of an interrupted training: a run of the same data, params and code resumes from them, no other does",
                f"dvc repro   # or, to throw them away: rm -rf {in_shell(folder)}",
                is_note=True,
            )
    for folder in Path(".dvc/tmp/answers").glob("*"):
        if not is_locked(folder / "lock"):
            yield Finding(
                f"{folder} holds answers of an interrupted baseline or predict: a run of the same data, params and code resumes from them",
                f"dvc repro   # or, to throw them away: rm -rf {in_shell(folder)}",
                is_note=True,
            )
    downloads = [path for path in Path("data/raw").glob(".*.fetch") if not is_locked(path.with_suffix(".lock"))]
    for folder in downloads:
        name = folder.name[1:].removesuffix(".fetch")
        yield Finding(
            f"{folder} holds an interrupted download: the same `python -m tools.fetch` resumes it",
            f"rm -rf {in_shell(folder)}   # discards what was downloaded: {in_shell(f'data/raw/{name}')}",
            is_note=True,
        )
    places = [path for place in ("data", "models", "metrics", "reports") for path in Path(place).rglob("*.partial")]
    # As our writers call them, which no process is writing and Git does not know.
    partial = [path for path in places if not any(part.endswith(".fetch") for part in path.parts) and is_abandoned(path) and not is_tracked(path)]
    if partial and not _running("stages."):
        yield Finding(f"{len(partial)} half-written files, such as {partial[0]}", f"rm -rf {' '.join(in_shell(path) for path in partial)}")


def _git_or_dvc_works() -> bool:
    # As programs, or `python -m dvc`.
    return bool({Path(part).name for line in _processes() for part in line[:3]} & {"git", "dvc"})


def _running(*words: str) -> bool:
    """Whether a process of this user with these words in its command line works in this repository."""
    return any(all(any(word in part for part in line) for word in words) for line in _processes())


def _processes() -> Iterator[list[str]]:
    """The command lines of this user's other processes that work in this repository, in whichever worktree: they share all references."""
    listed = git("worktree", "list", "--porcelain", "-z").split("\0")
    places = [Path.cwd(), *(Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree "))]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            place = (process / "cwd").resolve()
        except OSError:
            continue
        if int(process.name) != os.getpid() and any(place.is_relative_to(one) for one in places):
            yield line


def _found(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Findings of one check; a file that it can't read is one, and no other check is lost for it."""
    try:
        return list(check())
    except StoppedError:
        raise
    except UserFacingError as error:
        # No command of the message is taken: it may name what stands in a file.
        return [Finding(error.message, FIXES.get(error.code, "git diff params.yaml dvc.yaml dvc.lock"), is_note=error.code in NOTES)]
    except Exception as error:
        name = check.__name__.replace("_", " ")
        return [Finding(f"can't look for: {name} ({type(error).__name__}: {error})", "git diff params.yaml dvc.yaml dvc.lock .dvc/config")]


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    no_environment,
    other_versions,
    foreign_owner,
    locks_of_git,
    detached_head,
    experiment_in_the_middle,
    broken_rwlock,
    emptied_params,
    dead_queue_tasks,
    shallow_clone,
    base_model,
    missing_dependencies,
    unknown_to_git,
    little_room,
    damaged_cache,
    damaged_workspace,
    left_behind,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="print the commands alone")
    arguments = parser.parse_args()
    if not Path("dvc.yaml").is_file():
        raise InputError("pipeline-damaged", "there is no dvc.yaml here")
    said = list(dict.fromkeys(finding for check in CHECKS for finding in _found(check)))
    found = [finding for finding in said if not finding.is_note]
    for finding in found if arguments.commands else said:
        what = f"{'note: ' if finding.is_note else ''}{finding.what}"
        command.say(finding.fix if arguments.commands else f"{what}\n    {finding.fix}\n")
    if not found and not arguments.commands:
        command.say(f"{len(CHECKS)} checks, nothing found")
    sys.exit(3 if found else 0)


if __name__ == "__main__":
    command.run(main)
