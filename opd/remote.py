"""Waiting for remote calls: always with a limit, and with an error that says what was waited for."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError


class WorkerError(RuntimeError):
    """A remote call failed. `kind` is the type of what the worker raised."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def wait(refs: Any, what: str, timeout_s: float) -> Any:
    """`ray.get` of a reference or a list of them.

    Raises TimeoutError, RuntimeError where a worker died, WorkerError where it failed, and ValueError where the worker raised one
    (something the user can mend). As soon as one of several calls fails, the others are not waited for.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(f"waited {timeout_s:g} s for {what}; the limits are cluster.*_timeout_s") from error
    except RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(f"a worker died during {what}: {reason}; start again with resume=auto to go on") from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        raise WorkerError(f"{what} failed: {type(cause).__name__}: {cause}", type(cause).__name__) from error
