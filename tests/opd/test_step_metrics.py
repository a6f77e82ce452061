"""What the metrics of a step are made of, where it is more than a division."""

from __future__ import annotations

import pytest

from opd.step_metrics import overhead_seconds


def test_overhead_is_what_no_worker_worked_on() -> None:
    metrics = {"time/step": 1.0, "time/gate": 0.1}
    assert overhead_seconds(metrics, [0.5, 0.3], "sync") == pytest.approx(0.1)
    # Both work at the same time: the longer one is what a step waits for.
    assert overhead_seconds(metrics, [0.5, 0.3], "one_step_off") == pytest.approx(0.4)
    assert overhead_seconds({"time/step": 1.0}, [0.75], "sync") == pytest.approx(0.25)
