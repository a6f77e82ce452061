"""Waiting for remote calls and for room: always with a limit, and with an error that says what was waited for, and who failed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from opd.object_store import ADVICE, FULL_ERRORS, StoreFull, full_error, high_use, stuck_stores
from opd.survival import WorkerDied, WorkerHung

LOOK_S = 60.0  # this long without an answer, and it is looked whether the object store still takes anything
PUT_S = 60.0  # for an empty object, and a worker that may have to start for it; a slow disk makes the store slow
SETTLE_S = 5.0  # a rank that dies takes others with it; this long after the first error it is seen who is dead
# What a rank raises when another is gone or silent in the middle of a collective; other errors are its own, and the ranks
# that wait for it then are neither dead nor hung.
COLLECTIVE_ERRORS = ("DistBackendError", "DistNetworkError")
COLLECTIVE_WORDS = ("timed out", "timeout", "closed by peer", "connection reset", "gloo", "nccl", "broken pipe")


class WorkerError(RuntimeError):
    """A remote call failed. `kind` is the type of what the worker raised."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def wait(refs: Any, what: str, timeout_s: float, names: Sequence[str] = ()) -> Any:
    """`ray.get` of a reference or a list of them.

    names   who answers each of them, for the error

    Raises WorkerHung, WorkerDied, WorkerError where a worker failed, StoreFull where Ray's object store is, and ValueError
    where the worker raised one (something the user can mend). As soon as one of several calls fails, the others are not
    waited for.
    """
    several = refs if isinstance(refs, list) else [refs]
    called = list(names) if len(names) == len(several) else ["a worker"] * len(several)
    try:
        return _get(refs, what, timeout_s)
    except RayTaskError as error:  # first: Ray raises it as its cause's type as well
        raise _of_a_call(error, several, called, what) from error
    except GetTimeoutError as error:
        silent = _listed(_state(several, called, 0.0)[1])
        used = "".join(f"; of the object store is used {use}" for use in high_use().values())
        raise WorkerHung(
            f"waited {timeout_s:g} s for {what}; no answer from {silent}; the limits are cluster.*_timeout_s{used}"
        ) from error
    except FULL_ERRORS as error:
        raise full_error(what, "the driver's node", error) from error
    except RayError as error:  # a dead actor, a dead node, an object that was lost with its node
        dead = _state(several, called, SETTLE_S)[0] or ["a worker"]
        raise WorkerDied(f"{_listed(dead)} died during {what}: {_short(error)}") from error


def wait_for_placement(groups: list[PlacementGroup], what: str, bundle: dict[str, float], timeout_s: float) -> None:
    """Waits until Ray has set the resources aside. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + timeout_s
    for group in groups:
        if not group.wait(max(0.1, deadline - time.monotonic())):
            for other in groups:
                remove_placement_group(other)
            raise TimeoutError(
                f"waited {timeout_s:g} s for Ray to place {what} ({bundle} each); "
                f"free now: {ray.available_resources()}; raise cluster.placement_timeout_s or free resources"
            )


def _of_a_call(error: RayTaskError, refs: list[Any], names: list[str], what: str) -> Exception:
    """What `wait` raises where a worker raised an error in a call."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    kind = type(cause).__name__
    if isinstance(cause, FULL_ERRORS):
        node = re.search(r"ip=([^,)\s]+)", str(error))  # Ray has it nowhere else by now
        return full_error(what, f"node {node[1]}" if node else "a worker's node", cause)
    if isinstance(cause, ValueError):
        return ValueError(str(cause))
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        # The worker is well: what it was to work on was with another one (a rank holds the rollouts that it wrote).
        dead = _state(refs, names, SETTLE_S)[0]
        who = f"{_listed(dead)} died" if dead else "a worker that held what others need was lost"
        return WorkerDied(f"{who} during {what}: {kind}: {_short(cause)}")
    if _is_of_a_collective(kind, cause) and len(refs) > 1:
        dead, silent = _state(refs, names, SETTLE_S)
        if dead:
            return WorkerDied(f"{_listed(dead)} died during {what}")
        if silent:
            return WorkerHung(f"{_listed(silent)} hung during {what} ({kind}: {_short(cause)})")
    return WorkerError(f"{what} failed: {kind}: {cause}", kind)


def _get(refs: Any, what: str, timeout_s: float) -> Any:
    """`ray.get` that looks, now and then, whether it is waiting for a full object store. Raises GetTimeoutError, StoreFull."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            return ray.get(refs, timeout=min(max(left, 0.0), LOOK_S, timeout_s / 3))
        except RayTaskError:  # may be a GetTimeoutError too, a worker's
            raise
        except GetTimeoutError:
            if time.monotonic() >= deadline:
                raise
            stuck = stuck_stores(PUT_S)
        if stuck:
            raise StoreFull(f"{what}: Ray's object store takes nothing more, used is {', '.join(stuck)}: {ADVICE}")


def _state(refs: list[Any], names: list[str], settle_s: float) -> tuple[list[str], list[str]]:
    """Names of those that are dead, and of those that have not answered."""
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=settle_s, fetch_local=False)
    dead = []
    for ref, name in zip(refs, names, strict=True):
        if ref in ready:
            try:
                ray.get(ref, timeout=settle_s)
            except RayActorError as error:
                if not isinstance(error, RayTaskError):  # else it was raised in a worker, of another one
                    dead.append(name)
            except Exception:  # what else went wrong is told by the first error
                pass
    return dead, [name for ref, name in zip(refs, names, strict=True) if ref not in ready]


def _is_of_a_collective(kind: str, cause: BaseException) -> bool:
    text = str(cause).lower()
    return kind in COLLECTIVE_ERRORS or (kind == "RuntimeError" and any(word in text for word in COLLECTIVE_WORDS))


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "nobody in particular"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
