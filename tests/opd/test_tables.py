"""What a person reads at the terminal."""

from __future__ import annotations

import pytest

from opd.tables import print_table


def test_the_seconds_of_a_run_add_up(capsys: pytest.CaptureFixture) -> None:
    seconds = {"total": 30.0, "start": 13.5, "start_ray": 2.5, "start_student": 10.2, "update": 12.25, "teacher": 4.0}
    print_table({"recipe": "tiny", "stage": "opd", "steps": 4, "seed": 0, "eval": {}, "seconds": seconds})
    assert capsys.readouterr().out.splitlines()[-1] == (
        "30.0 s in all: start 13.5 (start_ray 2.5, start_student 10.2), teacher 4.0, update 12.2, other 0.2"
    )
