"""The training loop and its optimizer step; where something is due: read, evaluate, record, save."""

from typing import Any, NamedTuple

import torch
from torch.nn.utils import get_total_norm

from mygpt.compat import full_tensor, update_unless
from mygpt.data.batches import Batch
from mygpt.processes.signals import StopRequest
from mygpt.recipe.tables import Recipe
from mygpt.reports.recorder import Recorder, falls_on, is_printed
from mygpt.runs.held_out import evaluation_line
from mygpt.runs.saver import Saver
from mygpt.runs.schemas import Reason
from mygpt.training.agreement import REMEDY_WHEN_SAVING, check_agreement
from mygpt.training.evaluate import evaluate, record_values
from mygpt.training.failed_step import report_failed_step
from mygpt.training.parts import Parts
from mygpt.training.pending import PendingSteps, Update
from mygpt.training.state import Progress


class Due(NamedTuple):
    """What is to be done after a step: a function of the step alone, and so the same on all processes."""

    evaluation: bool
    line: bool
    """On stdout; a printed step is recorded, too."""
    record: bool
    checkpoint: bool
    reading: bool
    """Whether the host has to know the numbers of the step."""


def due_after(step: int, recipe: Recipe, until: int) -> Due:
    """What the recipe asks for after 1-based `step` of a command that trains until step `until`."""
    steps = recipe.train.steps
    evaluation = falls_on(step, recipe.validation.val_every, steps)
    checkpoint = falls_on(step, recipe.checkpoint.save_every or steps, steps)
    line = is_printed(step, recipe, evaluated=evaluation)
    record = line or checkpoint or falls_on(step, recipe.train.log_every, steps)
    return Due(evaluation, line, record, checkpoint, record or step == until)


def train_loop(
    parts: Parts, progress: Progress, until: int, recorder: Recorder, saver: Saver, stop: StopRequest
) -> int:
    """Train until `progress` is at step `until`, or early stopping ends the run; returns 0. A signal to some process
    ends it before, and is returned.

    All of them end with a save.

    Raises:
        NonFiniteError: a loss, gradient or weight is not finite.
        DiskError: the disk refused a record or a checkpoint.
        DisagreementError: with exact sums, the processes do not hold the same weights.
    """
    pending, stopped, first = PendingSteps(parts.accelerator), 0, progress.step + 1
    while progress.step < until and not progress.ended_by(parts.recipe) and not stopped:
        generators, lr = parts.generators(), parts.learning_rate
        update = train_step(parts, parts.stream.batch(), progress.step + 1)
        parts.scheduler.step()
        progress.step += 1
        if progress.step == first:
            parts.optimizer_state()  # raises now, and not at the first save, what cannot be saved
        pending.add(progress.step, generators, update)
        recorder.step_done()

        now = due_after(progress.step, parts.recipe, until)
        # Until its numbers are needed the host runs ahead of the device.
        if not (now.reading or pending.must_be_read(bool(stop.pending()))):
            continue
        is_time = parts.accelerator.is_main_process and saver.is_time_to_save()
        reading, is_best = pending.read(stop.pending(), save=is_time), False
        if not reading.is_finite:
            saver.wait()
            raise report_failed_step(parts, reading)
        stopped = reading.stop
        if now.record:
            values: dict[str, Any] = {"loss": reading.loss, "grad_norm": reading.grad_norm, "lr": lr}
            if now.evaluation:
                with recorder.paused():
                    evaluation = evaluate(parts, progress.step)
                before = progress.evaluations[-1] if progress.evaluations else None
                values |= record_values(evaluation) | {"evaluation": evaluation_line(evaluation, before)}
                is_best = progress.observe(evaluation, parts.recipe)
            recorder.record(progress.step, printed=now.line, **values)
        is_last = progress.ended_by(parts.recipe) is not None
        ends_here = bool(stopped) or progress.step == until
        reasons: dict[Reason, bool] = {
            "scheduled": now.checkpoint or is_last,
            "best": is_best,
            "interrupted": ends_here,
            "timed": reading.save,
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            with recorder.paused():
                save(parts, progress, saver, reason)
        saver.check()
        pending.restart_clock()
    saver.wait()
    return stopped


def train_step(parts: Parts, batch: Batch, step: int) -> Update:
    """Optimizer step number `step` (1-based), on this process's share of the global batch.

    Gradients are averaged over micro-batches and processes, and clipped to a global L2 norm of the recipe's
    max_grad_norm (0: not clipped). Once a loss or norm is not finite nothing is updated any more; the host does not
    wait to know.
    """
    accelerator, max_grad_norm = parts.accelerator, parts.recipe.train.max_grad_norm
    loss, out_of_range = parts.gradient_sum.backward(accelerator, parts.model, batch, step)
    if max_grad_norm:
        grad_norm = accelerator.clip_grad_norm_(parts.parameters, max_grad_norm)
    else:
        grad_norm = get_total_norm(p.grad for p in parts.parameters if p.grad is not None)
    grad_norm = full_tensor(grad_norm)
    update_unless(parts.optimizer, ~torch.isfinite(grad_norm) | (out_of_range > 0))
    return Update(loss, grad_norm, out_of_range)


def save(parts: Parts, progress: Progress, saver: Saver, reason: Reason) -> None:
    """Take a copy of the weights and the state after this step, for a thread to write. Every process has to call it.

    Raises:
        DisagreementError: with exact sums, the processes do not hold the same weights.
    """
    weights, state = parts.capture(progress.step)
    if parts.gradient_sum.is_exact:
        check_agreement(parts, weights, state, f"step {progress.step}", REMEDY_WHEN_SAVING)
    if parts.accelerator.is_main_process:
        best = progress.best.step if progress.best else None
        saver.save(weights, state, reason, progress.ended_by(parts.recipe), best)
