"""Curves as PNG files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_runs import events_of, step
from tunesmith.contracts.errors import UserError
from tunesmith.export import plot
from tunesmith.export.plot import draw_comparison, draw_loss_curve

PNG = b"\x89PNG"


def test_the_curve_is_a_png_and_skips_what_is_not_finite(tmp_path: Path) -> None:
    assert draw_loss_curve([*events_of(), step(21, loss="nan")], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert not draw_loss_curve([], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [("one", events_of()), ("$two_{", events_of(40)), ("nothing yet", [])]
    for axis in ("steps", "tokens", "time"):
        draw_comparison(runs, tmp_path / f"{axis}.png", axis)
    pictures = {(tmp_path / f"{axis}.png").read_bytes() for axis in ("steps", "tokens", "time")}

    assert len(pictures) == 3
    assert all(picture.startswith(PNG) for picture in pictures)


def test_without_matplotlib_a_run_goes_on_and_a_comparison_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)

    assert not draw_loss_curve(events_of(), tmp_path / "loss.png")
    with pytest.raises(UserError, match=r"tunesmith\[plot\]"):
        draw_comparison([("one", events_of())], tmp_path / "x.png")


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        draw_comparison([("one", events_of())], tmp_path / "nowhere" / "x.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw_comparison([("one", events_of())], tmp_path)
    assert list(tmp_path.parent.glob(".tmp-*")) == []
