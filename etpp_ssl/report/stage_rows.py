"""What each stage of a run came to, from its log."""

from __future__ import annotations

from typing import Any

from etpp_ssl.config import as_pair, show_size
from etpp_ssl.report.differences import ABSENT
from etpp_ssl.report.history import History, number


def stage_titles() -> list[str]:
    """Of the columns of `stage_rows`."""
    return [
        "stage",
        "bandwidth",
        "steps",
        "images",
        "eq. epochs",
        "time",
        "images/s",
        "first loss",
        "last loss",
    ]


def stage_rows(history: History) -> list[list[str]]:
    """One row per stage that is logged, as text.

    Steps, images and compute are counted from the end of the stage before, as the log has it.
    """
    rows: list[list[str]] = []
    before: dict[str, Any] = {}
    for index in dict.fromkeys(row.get("stage") for row in history.rows):
        inside = [row for row in history.rows if row.get("stage") == index]
        last = inside[-1]
        spent = {
            key: _since(before, last, key) for key in ("step", "images_seen", "equivalent_epochs", "seconds")
        }
        seconds, images = spent["seconds"], spent["images_seen"]
        bandwidth = last.get("bandwidth")
        rows.append(
            [
                ABSENT if index is None else str(index + 1),
                show_size(as_pair(bandwidth)) if bandwidth else ABSENT,
                _count(spent["step"]),
                _count(images),
                ABSENT if spent["equivalent_epochs"] is None else f"{spent['equivalent_epochs']:.3g}",
                ABSENT if seconds is None else duration(seconds),
                _count(images / seconds) if images is not None and seconds else ABSENT,
                f"{inside[0]['loss']:.4f}",
                f"{last['loss']:.4f}",
            ]
        )
        before = last
    return rows


def duration(seconds: float) -> str:
    """`7 s`, `12 min 5 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _since(before: dict[str, Any], now: dict[str, Any], key: str) -> float | None:
    end = number(now.get(key))
    return None if end is None else end - (number(before.get(key)) or 0.0)


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"
