"""The comparison of runs on different numbers of ranks: a figure that is no number is a difference."""

import json
import math

import pytest

from scripts.trust import ranks


def metrics(folder, *rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("loss", "expected"), [(2.0, 0.0), (2.002, 1e-3), (None, math.nan)])
@pytest.mark.parametrize("last", [True, False])
def test_difference(loss, expected, last, tmp_path):
    rest = {"val/loss": 3.0, "grad_norm": 1.0}
    equal, other = ({"iter": i, "train/loss": 2.0} | rest for i in (0, 1))
    whole = metrics(tmp_path / "whole", equal, other)
    changed = [equal, other | {"train/loss": loss}] if last else [equal | {"train/loss": loss}, other]
    figures = ranks.compare(metrics(tmp_path / "split", *changed), whole)
    assert figures == {"train": pytest.approx(expected, nan_ok=True), "val": 0, "norm": 0}
    worst = ranks.largest([*figures.values(), 0.0])
    assert worst == pytest.approx(expected, nan_ok=True)
    assert (worst <= 1e-5) == (loss == 2.0)


def test_rows_that_one_run_lacks(tmp_path):
    row = {"iter": 0, "train/loss": 2.0, "val/loss": 3.0, "grad_norm": 1.0}
    whole = metrics(tmp_path / "whole", row, row | {"iter": 1})
    with pytest.raises(RuntimeError, match="in one run only"):
        ranks.compare(metrics(tmp_path / "split", row), whole)
