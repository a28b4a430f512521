"""The sentences of the synth corpus: commands to a house, and digit strings, over about eighty words."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
ROOMS = ("KITCHEN", "BEDROOM", "BATHROOM", "OFFICE", "GARAGE")
DEVICES = ("LIGHT", "FAN", "HEATER", "RADIO")
STYLES = ("JAZZ", "ROCK", "CLASSICAL MUSIC", "PIANO MUSIC", "MUSIC")
GROCERIES = ("MILK", "BREAD", "COFFEE", "SUGAR", "BUTTER")
DAYS = ("MONDAY", "TUESDAY", "WEDNESDAY", "THURSDAY", "FRIDAY", "SATURDAY", "SUNDAY")
TENS = ("TWENTY", "THIRTY", "FORTY")


def _digits(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(DIGITS[i] for i in rng.integers(0, 10, rng.integers(low, high + 1)))


def _number(rng: np.random.Generator) -> str:
    """A number of minutes: 2 to 10, 15, or 20 to 49 in words."""
    kind = rng.random()
    if kind < 0.4:
        return ("TEN", "FIFTEEN", *DIGITS[2:])[rng.integers(10)]
    tens = TENS[rng.integers(len(TENS))]
    return tens if kind < 0.6 else f"{tens} {DIGITS[rng.integers(1, 10)]}"


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]


def _device(rng: np.random.Generator) -> str:
    return f"TURN {_pick(rng, 'ON', 'OFF')} THE {_pick(rng, *ROOMS)} {_pick(rng, *DEVICES)}"


def _timer(rng: np.random.Generator) -> str:
    return f"SET A TIMER FOR {_number(rng)} {_pick(rng, 'SECONDS', 'MINUTES', 'MINUTES', 'HOURS')}"


def _play(rng: np.random.Generator) -> str:
    return f"PLAY SOME {_pick(rng, *STYLES)} IN THE {_pick(rng, *ROOMS)}"


def _weather(rng: np.random.Generator) -> str:
    when = _pick(rng, "TODAY", "TODAY", "TOMORROW", "TOMORROW MORNING", *(f"ON {day}" for day in DAYS))
    hour = f" AT {_pick(rng, *DIGITS[1:], 'TEN')}" if "MORNING" not in when and rng.random() < 0.4 else ""
    return f"WHAT IS THE WEATHER {when}{hour}"


def _open(rng: np.random.Generator) -> str:
    return f"{_pick(rng, 'OPEN', 'CLOSE')} THE {_pick(rng, *ROOMS)} {_pick(rng, 'WINDOW', 'DOOR')}"


def _wake(rng: np.random.Generator) -> str:
    minutes = _pick(rng, "", " FIFTEEN", " THIRTY", " TWENTY FIVE", " FORTY FIVE")
    when = _pick(
        rng, "TOMORROW", "TOMORROW MORNING", *(f"ON {day}" for day in DAYS), *(f"ON {day} MORNING" for day in DAYS)
    )
    return f"WAKE ME AT {_pick(rng, *DIGITS[4:], 'TEN')}{minutes} {when}"


def _shopping(rng: np.random.Generator) -> str:
    items = [GROCERIES[i] for i in rng.permutation(len(GROCERIES))[: rng.integers(1, 4)]]
    what = " ".join([*items[:-1], "AND", items[-1]]) if len(items) > 1 else items[0]
    return f"ADD {what} ON MY LIST"


def _volume(rng: np.random.Generator) -> str:
    return f"TURN THE VOLUME {_pick(rng, 'UP', 'DOWN')} IN THE {_pick(rng, *ROOMS)}"


def _stop(rng: np.random.Generator) -> str:
    return f"STOP THE {_pick(rng, *ROOMS)} {_pick(rng, 'TIMER', 'MUSIC', 'RADIO')}"


COMMANDS: tuple[tuple[Callable[[np.random.Generator], str], float], ...] = (
    (_device, 0.18),
    (_timer, 0.16),
    (_play, 0.12),
    (_weather, 0.12),
    (_open, 0.10),
    (_wake, 0.12),
    (_shopping, 0.10),
    (_volume, 0.05),
    (_stop, 0.05),
)


def _command(rng: np.random.Generator) -> str:
    weights = np.array([weight for _, weight in COMMANDS])
    return COMMANDS[int(rng.choice(len(COMMANDS), p=weights / weights.sum()))][0](rng)


def sentence(rng: np.random.Generator) -> str:
    """One sentence in upper case, without punctuation: a command, two commands, a call, or a digit string."""
    kind = rng.random()
    if kind < 0.12:
        return _digits(rng, 3, 7)
    text = f"CALL {_digits(rng, 3, 7)}" if kind < 0.24 else _command(rng)
    if kind > 0.8:
        text = f"{text} AND {_command(rng)}"
    if rng.random() < 0.15:
        text = f"PLEASE {text}" if rng.random() < 0.5 else f"{text} PLEASE"
    return text


def sentences(count: int, rng: np.random.Generator, taken: Set[str], *, distinct: bool) -> list[str]:
    """``count`` sentences outside ``taken``; ``distinct`` refuses repetitions too."""
    made: list[str] = []
    used = set(taken)
    while len(made) < count:
        text = sentence(rng)
        if text in used:
            continue
        made.append(text)
        if distinct:
            used.add(text)
    return made
