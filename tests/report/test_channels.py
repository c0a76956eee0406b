"""Any number of channels on a screen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etpp_ssl.data.views import Normalise
from etpp_ssl.report.panels import BLANK, ChannelView


def levels(channels: int) -> torch.Tensor:
    return torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_natural_channels_come_back_as_they_were(channels: int) -> None:
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    image = levels(channels)
    view = ChannelView(mean, std)
    shown = view(Normalise(mean, std, torch.device("cpu"))(image[None])[0])
    assert shown.shape == (5, 7, 3)
    np.testing.assert_array_equal(shown, image.permute(1, 2, 0).expand(5, 7, 3).numpy())
    assert ("grey" in view.caption) == (channels == 1)


@pytest.mark.parametrize(("channels", "order"), [(2, [0, 1, 1]), (4, [0, 1, 2]), (7, [0, 1, 2])])
def test_other_channel_counts_are_false_colour_and_say_so(channels: int, order: list[int]) -> None:
    view = ChannelView((0.1,) * channels, (0.05,) * channels)
    image = 4 * torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(0)) - 2
    expected = (255 * (image[order] + 2) / 4).round().permute(1, 2, 0)
    np.testing.assert_allclose(view(image), expected.numpy(), atol=1)
    assert "false colour" in view.caption
    assert f"of {channels}" in view.caption
    assert ", ".join(str(channel + 1) for channel in order) in view.caption


def test_what_is_not_there_is_a_checkerboard_and_what_overshoots_is_clipped() -> None:
    image = torch.tensor([[[float("nan"), float("nan")], [9.0, -9.0]]])
    shown = ChannelView((0.5,), (0.25,))(image)[:, :, 0]
    assert set(shown[0]) == set(BLANK)
    assert shown[1].tolist() == [255, 0]
