import torch

from mt_deepspeed.tasks.heatmaps import SIDE, attention_picture


def test_attention_lights_the_patch_that_words_look_at() -> None:
    pixels = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    attention = torch.zeros(2, 2, 4, 5)
    attention[0, :, 1, 4] = 0.5  # a word at the last patch
    attention[0, :, 0, 1] = attention[0, :, 2, 1] = attention[0, :, 3, 1] = (
        0.9  # begin, end and padding do not count
    )
    attention[1, :, 1:3, 2] = 1.0
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    picture = attention_picture(pixels, attention, mask)
    assert picture.shape == (2 * SIDE, 2 * SIDE, 3)
    assert bool((picture[:SIDE] == 200).all())
    lit = picture[SIDE:, :, 0]
    half = SIDE // 2
    assert lit[half:, half:SIDE].unique().tolist() == [200]
    assert lit[:half, :SIDE].unique().tolist() == [30]
    assert lit[:half, SIDE + half :].unique().tolist() == [200]
