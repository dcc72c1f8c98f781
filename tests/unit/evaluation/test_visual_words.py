"""Visual words: a model that reads the picture scores under one condition, one that guesses under all."""

import torch
from torch import Tensor

from mt_deepspeed.evaluation.visual_words import majority_share, mask_one_visual_word, visual_word_report


def averages(report: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in report.items()}


MASK, VOCAB = 9, 10
CLASSES = {5: "colour", 6: "colour", 7: "shape"}


def batch(rows: int = 8) -> dict[str, Tensor]:
    """Row i shows a picture of constant value 5 or 6 and says so in its text."""
    values = torch.tensor([5, 6]).repeat_interleave(rows // 2)
    ids = torch.stack([torch.tensor([0, 3, int(value), 2]) for value in values])
    pixels = values.float()[:, None, None, None].expand(rows, 3, 2, 2).clone()
    return {
        "pixels": pixels,
        "text_ids": ids,
        "text_mask": torch.ones_like(ids),
        "sample_ids": torch.arange(rows),
    }


def looking(pixels: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    assert (ids[chosen] == MASK).all()
    answer = pixels[:, 0, 0, 0].long().clamp(max=VOCAB - 1)[chosen.nonzero()[:, 0]]
    return torch.nn.functional.one_hot(answer, VOCAB).float()


def guessing(pixels: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.full((int(chosen.sum()),), 5), VOCAB).float()


def test_one_word_is_masked_and_the_choice_depends_on_the_row_alone() -> None:
    ids = torch.tensor([[0, 5, 3, 7, 2], [0, 3, 3, 3, 2]])
    seeds = torch.tensor([11, 12])
    masked, chosen = mask_one_visual_word(ids, CLASSES, MASK, seeds)
    assert chosen.sum(dim=1).tolist() == [1, 0]
    assert (masked[chosen] == MASK).all()
    assert torch.equal(masked[~chosen], ids[~chosen])
    alone, _ = mask_one_visual_word(ids[:1], CLASSES, MASK, seeds[:1])
    assert torch.equal(alone[0], masked[0])
    places = {
        int(mask_one_visual_word(ids[:1], CLASSES, MASK, torch.tensor([s]))[1].nonzero()[0, 1])
        for s in range(20)
    }
    assert places == {1, 3}


def test_conditions_tell_looking_from_guessing() -> None:
    looked = averages(visual_word_report(looking, batch(), CLASSES, MASK))
    assert looked["visual_right_image"] == 1
    assert looked["visual_shuffled_images"] == 0
    assert looked["visual_no_image"] == 0
    assert looked["visual_right_image/colour"] == 1
    guessed = averages(visual_word_report(guessing, batch(), CLASSES, MASK))
    assert (
        guessed["visual_right_image"]
        == guessed["visual_shuffled_images"]
        == guessed["visual_no_image"]
        == 0.5
    )


def test_rows_whose_picture_did_not_change_are_not_counted_as_shuffled() -> None:
    same = batch()
    same["pixels"][:] = 5
    report = visual_word_report(looking, same, CLASSES, MASK)
    assert report["visual_shuffled_images"][1] == 0
    assert report["visual_right_image"][1] == 8


def test_majority_share() -> None:
    assert majority_share({5: 3, 6: 1, 7: 2}, CLASSES) == 5 / 6
