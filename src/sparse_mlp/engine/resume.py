"""Which settings a run may have when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sparse_mlp.engine.config import FREE_ON_RESUME, LENGTHS, OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError


def flat_settings(optim: OptimConfig, schedule: ScheduleConfig, train: TrainConfig, **others: Any) -> dict[str, Any]:
    """What the weights depend on, under dotted names; lists for tuples, as JSON returns them."""
    fields = {name: value for name, value in asdict(train).items() if name not in FREE_ON_RESUME}
    groups = {"optim": asdict(optim), "schedule": asdict(schedule), "train": fields}
    flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (flat | others).items()}


def check_settings(stored: Mapping[str, Any], now: Mapping[str, Any], run: object) -> bool:
    """Compare two results of `flat_settings`; returns whether the run was made longer.

    UserError, naming each difference, unless it is a greater length that `check_longer` allows.
    """
    lengths = {f"train.{name}" for name in LENGTHS}
    changed = [
        f"{name} was {stored.get(name)} and is now {now.get(name)}"
        for name in sorted(stored.keys() | now.keys())
        if stored.get(name) != now.get(name) and name not in lengths
    ]
    if changed:
        raise UserError(f"{run} cannot go on as it began: {'; '.join(changed)}")
    before, after = ({name: settings.get(f"train.{name}") for name in LENGTHS} for settings in (stored, now))
    return check_longer(before, after, str(now["schedule.sched"]))


def check_longer(before: Mapping[str, Any], after: Mapping[str, Any], sched: str) -> bool:
    """Whether a run of length `before` becomes longer with `after`; both hold epochs, steps and minutes.

    UserError if it became shorter or is measured in another unit, or if the schedule `sched` is not constant: a decay
    was spread over the length that was planned and reached schedule.min_lr at its end, so that what came out is not the
    beginning of a longer run.
    """
    was, now = ({name: value[name] for name in LENGTHS if value.get(name) is not None} for value in (before, after))
    if was == now:
        return False
    (unit, old), (new_unit, new) = next(iter(was.items())), next(iter(now.items()))
    change = f"train.{unit} was {old} and cannot become "
    if unit != new_unit:
        raise UserError(f"{change}train.{new_unit} {new}: give a run that is resumed a larger train.{unit}")
    if new < old:
        raise UserError(f"{change}{new}: a run that is resumed can be made longer, not shorter")
    if sched != "constant":
        raise UserError(
            f"{change}{new}: the {sched} schedule decays over the planned length down to schedule.min_lr; only a "
            "constant schedule can go on, else start a new run from these weights"
        )
    return True
