"""What a run leaves on disk, made in one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from opd.arkasr import load_model
from opd.checkpoint import RunDir
from opd.config import load_config
from opd.metrics import MetricsLog
from opd.resolve import portable

RESULT = {"num_utterances": 12, "num_ref_words": 40, "normaliser": "opd-basic-1"}


def rates(wer: float) -> dict[str, Any]:
    return {"wer": wer, "cer": wer / 2, **RESULT}


def stopped_run(path: Path, student: Path) -> Path:
    """A run that evaluated every 10 steps, stopped early after step 30 and exported the better step 20.

    The weights of checkpoint N are those of the arkasr folder `student`, with N added to the last norm.
    """
    model = load_model(student)
    overrides = ["eval.eval_every=10", "eval.patience=1", "train.num_steps=100", "export.dtype=bfloat16"]
    config = portable(load_config(["recipe=tiny", f"student.path={student}", *overrides]).to_dict())
    config["checkpoint"]["keep_last"] = 9
    run = RunDir.open(path, config)
    log = MetricsLog(path, config, "disabled", "", 100, 100)
    before = {"seen_voices": rates(1.5)}
    log.log_eval(0, "seen_voices", before["seen_voices"])
    for step, wer in ((10, 0.4), (15, None), (20, 0.2), (30, 0.3)):
        state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        state["model.model.norm.weight"] += step
        folder = run.begin_save(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({"model": state}, checkpoint_id=folder / "state", no_dist=True)
        run.commit_save(step, {"eval_before": before, "eval_teacher": {"seen_voices": rates(0.03)}})
        if wer:
            log.log_eval(step, "seen_voices", rates(wer))
    final = {"seen_voices": {"before": rates(1.5), "after": rates(0.21), "teacher": rates(0.03)}}
    log.log_eval(30, "seen_voices", rates(0.21))  # as opd.run does: the exported step's, under the last step
    log.close()
    run.write_summary({"steps": 30, "exported_step": 20, "eval": final, "languages": ["English"]})
    run.close()
    return path
