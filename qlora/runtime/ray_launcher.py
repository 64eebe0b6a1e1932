"""The processes of one stage on the machines of a Ray cluster that exists already (docs/cluster.md).

Ray chooses the machines, gives each process its GPU, forwards its output and reports when a process or machine is lost. The rest is as on one machine
(launcher.py): torchrun's variables, the environment of the launching process, exit codes, messages. All machines see one checkout at one path.
"""

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from qlora.core.errors import MachineError
from qlora.core.hashing import project_root
from qlora.params.hardware import HardwareParams
from qlora.runtime import gpus, ray_actor, ray_session
from qlora.runtime.launcher import rank_variables, serve_store
from qlora.runtime.ranks import TAIL_CHARS, Ranks, explain_failure
from qlora.runtime.signals import DEATH_SIGNAL, LAUNCHER, SIGNALS, handle

logger = logging.getLogger(__name__)

PLACEMENT_SECONDS = 300.0
"""How long a cluster that is too small is waited for: its machines may still be starting. For those in use by others there is no limit."""
QUIET_SECONDS = 3.0
"""A wait that is as short as Ray's own work is not mentioned."""
END_SECONDS = 10.0
"""How long an actor may take to tell of the end of a process that was killed."""
POLL_SECONDS = 0.2


class Layout(NamedTuple):
    """How many processes are on how many machines, and with how many GPUs."""

    machines: int
    places: int
    """Processes of a machine."""
    gpus: int
    """Of a process; none on the CPU, all that it may use where one process splits the model."""

    @property
    def bundle(self) -> dict[str, int]:
        """What Ray reserves on each machine."""
        return {"CPU": self.places} | ({"GPU": self.places * self.gpus} if self.gpus else {})


def layout(hardware: HardwareParams, count: int) -> Layout:
    """The layout of `count` processes, as many on each machine; one alone has the GPUs of one machine."""
    machines = min(hardware.num_machines, count)
    places = count // machines
    return Layout(machines, places, hardware.processes_per_machine // places if hardware.device == "cuda" else 0)


def launch(module: str, arguments: Sequence[str], hardware: HardwareParams, count: int) -> NoReturn:
    """Run `python -m MODULE ARGUMENTS` as `count` processes of a Ray cluster and end as they end.

    Raises:
        MachineError: there is no cluster, it is too small, its machines see different checkouts, or a process or machine was lost.
        StoppedError: a signal ended them before they could say so.
    """
    ranks = Ranks()
    handle(SIGNALS, ranks.note)
    plan = layout(hardware, count)
    # As it is before Ray writes variables of its own into it.
    environment = dict(os.environ)
    with _connected() as ray, _placed(ray, plan, ranks) as group:
        actors = _actors(ray, group, plan)
        found = _look(ray, actors, ranks)
        store = serve_store(ray.util.get_node_ip_address())
        shared = {**environment, "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), DEATH_SIGNAL: str(int(signal.SIGKILL))}
        try:
            for rank, actor in enumerate(actors):
                machine, place = divmod(rank, plan.places)
                own = found[machine * plan.places : (machine + 1) * plan.places]
                # All of the machine's, as on one machine: LOCAL_RANK chooses, and NCCL copies between cards that both processes see.
                visible = {gpus.VISIBLE: ",".join(name for each in own for name in each.gpus)} if plan.gpus else {}
                variables = shared | visible | rank_variables(rank, count, place, plan.places)
                command = [sys.executable, "-m", module, *arguments]
                ranks.processes.append(_RemoteProcess(ray, rank, actor, actor.run.remote(command, variables, str(Path.cwd()), LAUNCHER)))
            failed = ranks.wait()
        finally:
            ranks.kill()
        sys.exit(_ended(failed, ranks, found))


def _ended(failed: int | None, ranks: Ranks, found: Sequence["_Found"]) -> int:
    if failed is None:
        return 0
    processes: list[Any] = ranks.processes
    where = f" on {found[failed].node}"
    if processes[failed].lost:
        raise MachineError(
            "rank-died",
            f"process {failed} of {len(found)}{where} was lost, the others were ended: run again, a training resumes from its last checkpoint. "
            f"Ray says: {processes[failed].lost}",
        )
    statuses = [process.returncode for process in processes]
    return explain_failure(failed, statuses, ranks.signals, lambda rank: processes[rank].printed.decode("utf-8", "replace"), where)


@contextmanager
def _connected() -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS or to the one that this machine is part of."""
    ray = ray_session.import_ray("hardware.num_machines > 1", "hardware.num_machines: 1")
    hint = ". Begin a cluster: `ray start --head` on this machine, `ray start --address=HOST:6379` on each other one (docs/cluster.md)"
    with ThreadPoolExecutor(1) as thread:
        thread.submit(ray_session.begin, ray, os.environ.get("RAY_ADDRESS", "auto"), hint).result()
    ray_session.restore_sigterm()
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _placed(ray: Any, plan: Layout, ranks: Ranks) -> Iterator[Any]:
    """Resources of as many machines, this one first if it has them, reserved until the end.

    Raises:
        MachineError: the cluster has too few.
        StoppedError: a signal came first.
    """
    bundles: list[dict[str, float]] = [{**plan.bundle} for _ in range(plan.machines)]
    here = f"node:{ray.util.get_node_ip_address()}"
    if any(here in node["Resources"] for node in _fitting(ray, plan)):
        # The first process writes the outputs and DVC hashes them here: on a shared disk another machine's files may be seen seconds later.
        bundles[0][here] = 0.001
    group = ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
    try:
        _wait_for(group, ray, plan, ranks)
        yield group
    finally:
        ray.util.remove_placement_group(group)


def _wait_for(group: Any, ray: Any, plan: Layout, ranks: Ranks) -> None:
    began = time.monotonic()
    said = ""
    while not group.wait(POLL_SECONDS):
        ranks.require_none_came()
        has_enough = len(_fitting(ray, plan)) >= plan.machines
        asked = f"{plan.machines} machine(s) with {_amounts(plan.bundle)} each"
        there = "; ".join(f"{node['NodeManagerAddress']}: {_amounts(node['Resources'])}" for node in _alive(ray)) or "no machine"
        waited = time.monotonic() - began
        if not has_enough and waited > PLACEMENT_SECONDS:
            raise MachineError(
                "ray-too-small",
                f"hardware.num_machines = {plan.machines} asks for {asked}; after {PLACEMENT_SECONDS:.0f} s the Ray cluster has {there}. "
                "`ray start --address=HOST:6379` adds a machine (docs/cluster.md).",
            )
        waiting = f"waiting for {asked}: " + ("they are in use" if has_enough else f"the Ray cluster has {there}")
        if waited > QUIET_SECONDS and waiting != said:
            logger.warning("%s", waiting)
            said = waiting


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _fitting(ray: Any, plan: Layout) -> list[dict[str, Any]]:
    """Machines that have what one bundle takes, in use or not."""
    return [node for node in _alive(ray) if all(node["Resources"].get(name, 0) >= amount for name, amount in plan.bundle.items())]


def _amounts(resources: Any) -> str:
    return ", ".join(f"{resources.get(name, 0):.0f} {name}(s)" for name in ("GPU", "CPU") if name == "GPU" or name in resources)


def _actors(ray: Any, group: Any, plan: Layout) -> list[Any]:
    """One for each process, in the order of ranks: those of a machine follow each other."""
    # By value: a node imports nothing of a checkout that it may not see.
    ray.cloudpickle.register_pickle_by_value(ray_actor)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    # One call runs the process, another one signals it.
    remote = ray.remote(num_cpus=1, num_gpus=plan.gpus, max_concurrency=2, max_restarts=0)(ray_actor.Rank)
    return [
        remote.options(scheduling_strategy=strategy(group, placement_group_bundle_index=machine)).remote()
        for machine in range(plan.machines)
        for _ in range(plan.places)
    ]


class _Found(NamedTuple):
    """What an actor sees."""

    node: str
    gpus: list[str]
    missing: str | None


def _look(ray: Any, actors: Sequence[Any], ranks: Ranks) -> list[_Found]:
    """Where each actor is.

    Raises:
        MachineError: one does not see this checkout, or this Python.
    """
    folder = project_root() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="checkout-", encoding="utf-8") as file:
        token = uuid.uuid4().hex
        file.write(token)
        file.flush()
        # A disk over a network may show others what is written only then.
        os.fsync(file.fileno())
        asked = [actor.look.remote([file.name, str(Path.cwd()), sys.executable], token) for actor in actors]
        try:
            while len(ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)[0]) < len(asked):
                ranks.require_none_came()
            found = [_Found(*answer) for answer in ray.get(asked)]
        except ray.exceptions.RayError as error:
            raise MachineError("rank-died", f"a machine was lost before the stage began: run again. Ray says: {_first_line(error)}") from None
    for here in found:
        if here.missing:
            raise MachineError(
                "ray-checkout",
                f"{here.node} does not see {here.missing} of this machine: all machines of the Ray cluster need this checkout and its Python at the "
                "same path, on a disk that they share (docs/cluster.md)",
            )
    return found


class _RemoteProcess:
    """A process that an actor runs, as subprocess.Popen shows one of this machine; polling it prints what the first rank says."""

    def __init__(self, ray: Any, rank: int, actor: Any, stream: Any) -> None:
        self.returncode: int | None = None
        self.printed = b""
        """The last of it."""
        self.lost = ""
        """Ray's words, where the actor is gone."""
        self._ray, self._rank, self._actor, self._stream = ray, rank, actor, stream

    def poll(self) -> int | None:
        while self.returncode is None and self._ray.wait([self._stream], timeout=0)[0]:
            self._take()
        return self.returncode

    def _take(self) -> None:
        try:
            kind, item = self._ray.get(next(self._stream))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            self.lost, self.returncode = _first_line(error), -signal.SIGKILL
            return
        if kind == ray_actor.EXIT:
            self.returncode = item
        elif self._rank:
            self.printed = (self.printed + item)[-TAIL_CHARS:]
        else:
            stream = sys.stdout if kind == 1 else sys.stderr
            stream.flush()
            stream.buffer.write(item)
            stream.buffer.flush()

    def send_signal(self, sig: int, /) -> None:
        self._actor.send_signal.remote(sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        deadline = time.monotonic() + END_SECONDS
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if self.returncode is None:
            self.returncode = -signal.SIGKILL
        return self.returncode


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
