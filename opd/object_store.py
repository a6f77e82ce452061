"""Ray's object store, through which rollouts and scores go: whether it is full, and still takes anything."""

from __future__ import annotations

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

FULL_ERRORS = (ObjectStoreFullError, OutOfDiskError)
HIGH_USE = 0.8  # from here on Ray moves objects to disk, so a store that stays above it may be unable to
ADVICE = (
    "make room in the folder that Ray spills to (ray start --object-spilling-directory, below /tmp/ray by default) and let it be "
    "written, end other jobs of the cluster (`ray memory` lists who holds what), give the store more memory (ray start "
    "--object-store-memory), or lower train.batch_size, loss.top_k or rollout.max_new_tokens; complete checkpoints are "
    "untouched, and the same command with the same run_dir goes on"
)


class StoreFull(RuntimeError):
    """The object store has no room and makes none. New workers would meet the same."""


def full_error(what: str, place: str, error: BaseException) -> StoreFull:
    """For what Ray itself gave up on. place: who met it, or where."""
    disk = ", and so is the disk that it spills to" if isinstance(error, OutOfDiskError) else ""
    return StoreFull(f"{what} failed: Ray's object store on {place} is full{disk} ({type(error).__name__}): {ADVICE}")


def high_use() -> dict[str, str]:
    """What is used of the store, by id of node, where that is more than HIGH_USE of it."""
    free = ray._private.state.available_resources_per_node()
    found = {}
    for node in ray.nodes():
        size = node["Resources"].get("object_store_memory", 0.0)
        left = free.get(node["NodeID"], {}).get("object_store_memory", size)
        if node["Alive"] and size and left < (1 - HIGH_USE) * size:
            found[node["NodeID"]] = f"{1 - left / size:.0%} of {size / 1e6:,.0f} MB on {node['NodeManagerAddress']}"
    return found


def stuck_stores(limit_s: float) -> list[str]:
    """Uses of the stores that are nearly full and took not one byte within limit_s seconds.

    Ray itself waits for ever where a store is full and cannot be spilled (a folder that cannot be written, say).
    """
    used = high_use()
    probes = {node: _put.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in used}
    refs = {node: probe.remote() for node, probe in probes.items()}
    # An error is an answer too: whoever puts more gets it as well.
    done = ray.wait(list(refs.values()), num_returns=len(refs), timeout=limit_s)[0] if refs else []
    return [used[node] for node, ref in refs.items() if ref not in done]


@ray.remote(num_cpus=0, max_retries=0)
def _put() -> None:
    # Not in a thread of the driver, which could not be ended. (A worker that is started anew needs the store as well.)
    ray.put(b"")
