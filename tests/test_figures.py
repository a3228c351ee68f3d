"""Figures are drawn from what a run left, whatever it trained."""

import pandas as pd
import pytest

from stages import figures


def curve(steps, **columns):
    return pd.DataFrame({"step": range(1, steps + 1), "lm_loss": 2.0, **columns})


@pytest.mark.parametrize("kl", [True, False])
def test_training_curves_of_many_layers_and_of_a_frozen_indexer(tmp_path, monkeypatch, kl):
    """Layer 10 is not layer 2, whatever the order of the columns; `-S ablation=no_kl` has no KL in sparse training."""
    columns = {"kl": 0.5} | {f"mass_layer_{i}": i / 12 for i in sorted(range(12), key=str)}
    curves = {"dense": curve(4), "window": curve(4), "warmup": curve(3, **columns)}
    curves["sparse"] = curve(4, **(columns if kl else {}))
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.training_curves(curves, tmp_path / "curves.png")
    _, middle, right = drawn[0].axes
    assert len(middle.get_lines()) == 1 + kl
    masses = {line.get_label(): line for line in right.get_lines() if line.get_label().startswith("layer")}
    assert len(masses) == 12
    for i in range(12):
        line = masses[f"layer {i}"]
        assert set(line.get_ydata()) == {i / 12} and list(line.get_xdata()) == list(range(1, 8 if kl else 4))
