"""What happens to a soaked run, drawn beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from etpp_ssl.randomness import keyed_random

KINDS = ("kill all", "kill rank", "kill worker", "term launcher", "int group", "pause worker")
"""What a blow does:

- kill all: SIGKILL to torchrun, ranks and data workers, as when a machine is taken away;
- kill rank: SIGKILL to one training process, as the kernel does when memory is short;
- kill worker: SIGKILL to one data worker;
- term launcher: SIGTERM to torchrun, as a scheduler does;
- int group: SIGINT to torchrun's process group, as a terminal's Ctrl-C does;
- pause worker: SIGSTOP to a data worker, and SIGCONT some seconds later: the run must go on.
"""
ALL_KINDS = (*KINDS, "kill launcher")
"""kill launcher, SIGKILL to torchrun alone, makes its ranks orphans; it happens only if asked for."""
STOPS = {"term launcher", "int group"}
"""These leave a run the time to write a checkpoint."""
NEED_WORKER = {"kill worker", "pause worker"}


@dataclass(frozen=True)
class Blow:
    """Something that is done to a run."""

    number: int
    kind: str
    after: float
    """Seconds since the launch, or since the last blow that the run survived."""
    where: float
    """In [0, 1): which of the processes it hits."""
    pause: float
    """Seconds until SIGCONT."""


def plan_blow(seed: int, number: int, every: tuple[float, float], kinds: tuple[str, ...] = KINDS) -> Blow:
    """Blow `number` of a soak, a function of the arguments alone; each round has every kind once.

    Args:
        seed: of the soak.
        number: from 0.
        every: shortest and longest time between two, in seconds.
        kinds: different ones.
    """
    order = list(kinds)
    keyed_random(seed, "soak round", number // len(order)).shuffle(order)
    draw = keyed_random(seed, "soak blow", number)
    return Blow(
        number=number,
        kind=order[number % len(order)],
        after=draw.uniform(*every),
        where=draw.random(),
        pause=draw.uniform(3, 15),
    )


def plan_workers(seed: int, number: int, kinds: tuple[str, ...] = KINDS) -> int:
    """`data.num_workers` of the launch whose first blow is `number`: 0 to 3, or 1 to 3 if one must be hit."""
    until_end = []
    for later in range(number, number + 2 * len(kinds)):
        until_end.append(plan_blow(seed, later, (0, 0), kinds).kind)
        if until_end[-1] != "pause worker":
            break
    least = 1 if NEED_WORKER & {*until_end} else 0
    return keyed_random(seed, "soak workers", number).randint(least, 3)
