"""Pictures: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from atedm.app.pictures.canvas import Cell, draw_sheet
from atedm.app.pictures.comparison import Comparison, PrunedImage, comparison_sheet, difference, psnr
from atedm.app.pictures.maps import importance_overlay, kept_overlay, maps_sheet, mean_kept_overlay
from atedm.hosts.state import Observation
from atedm.record import Recording

WHITE = Image.new("RGB", (64, 64), (255, 255, 255))


def observation(step: int = 0, keep: tuple[int, ...] = (0, 5, 10, 15)) -> Observation:
    importance = torch.linspace(0, 1, 16).expand(2, 16)
    other = tuple(i for i in range(16) if i not in keep)[: len(keep)]
    return Observation("mid_block.attentions.0", 0, step, importance, torch.tensor([other, keep]), (4, 4))


def brightness(image: Image.Image) -> np.ndarray:
    """Mean brightness of each cell of a 4 x 4 grid over a 64 px image."""
    return np.asarray(image.convert("L"), dtype=np.float64).reshape(4, 16, 4, 16).mean(axis=(1, 3)).ravel()


def test_kept_tokens_stay_bright_and_dropped_ones_are_dimmed() -> None:
    cells = brightness(kept_overlay(WHITE, observation()))
    assert set(np.flatnonzero(cells > 250)) == {0, 5, 10, 15}
    assert cells[1] < 100


def test_importance_is_drawn_by_rank() -> None:
    pixels = (
        np.asarray(importance_overlay(WHITE, observation()), dtype=int)
        .reshape(4, 16, 4, 16, 3)[:, 8, :, 8]
        .reshape(16, 3)
    )
    yellow = pixels[:, 0] + pixels[:, 1] - pixels[:, 2]
    assert yellow[15] > yellow[8] > yellow[0]


def test_mean_overlay_is_brightest_where_tokens_were_kept_most() -> None:
    recording = Recording([observation(0, (0, 5)), observation(1, (0, 10))], ("mid_block.attentions.0",))
    cells = brightness(mean_kept_overlay(WHITE, recording))
    assert cells[0] == cells.max()
    assert cells[5] == cells[10] > cells[1]


def test_psnr_and_difference() -> None:
    grey = Image.new("RGB", (64, 64), (245, 245, 245))
    assert psnr(WHITE, WHITE) == float("inf")
    assert psnr(grey, WHITE) == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    assert set(np.unique(difference(WHITE, WHITE))) == {255}
    assert set(np.unique(difference(grey, WHITE))) == {235}


def test_sheets_hold_every_picture_and_grow_with_rows() -> None:
    recording = Recording([observation()], ("mid_block.attentions.0",), [0.25])
    red = Image.new("RGB", (64, 64), (200, 0, 0))
    way = PrunedImage("AT-EDM", red, recording)
    rows = [Comparison("a prompt that is long " * 20, WHITE, (way,))] * 2
    sheet = comparison_sheet(rows, "headline")
    one = comparison_sheet(rows[:1], "headline")
    assert sheet.width == one.width >= 4 * 256
    assert comparison_sheet([Comparison("two ways", WHITE, (way, way))]).width >= 7 * 256
    assert sheet.height > 1.7 * one.height
    red_pixels = (np.asarray(sheet) == (200, 0, 0)).all(-1).sum()
    assert red_pixels >= 2 * 256 * 256
    maps = np.asarray(maps_sheet(red, recording, "a prompt"))
    assert (maps == (200, 0, 0)).all(-1).sum() > 0.7 * 104**2 * 4 / 16  # four kept cells, edges soft


def test_pictures_keep_their_shape() -> None:
    wide = draw_sheet([[Cell(Image.new("RGB", (128, 64), (9, 9, 9)))]], side=256)
    assert (np.asarray(wide) == 9).all(-1).sum() == 256 * 128


def test_kept_share_counts_spared_blocks_as_whole() -> None:
    recording = Recording([observation(0), observation(0, (0, 5))], ("mid_block.attentions.0", "other"))
    recording.end_call()  # two pruning layers in one block: the second one's 2 of 16 are left
    assert recording.kept_share == pytest.approx((0.125 + 1) / 2)
    recording.end_call()  # a call in which every block was spared
    assert recording.kept_share == pytest.approx((0.125 + 3) / 4)
    with pytest.raises(ValueError, match="nothing was recorded"):
        _ = Recording().kept_share


def has_ink(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> bool:
    return bool((np.asarray(sheet.convert("L").crop((left, top, right, bottom))) < 200).any())


def test_words_above_pictures_are_cut_where_the_sheet_ends_and_widen_it_before() -> None:
    cells = [[Cell(WHITE, "a title of many words"), Cell(WHITE, "another")]]
    plain = draw_sheet([[Cell(WHITE), Cell(WHITE)]], side=64)
    titled = draw_sheet(cells, ["a row"], side=64)
    assert titled.width == plain.width  # titles are broken by whoever gives them
    long = draw_sheet(cells, ["down_blocks.2.attentions.0   8 x 8 tokens, 24 kept"], side=64)
    assert plain.width < long.width < 560
    endless = draw_sheet(cells, ["x" * 500], headline="one\nline " * 50, side=64)
    assert endless.width == 560
    assert not has_ink(endless, 551, 0, 560, 34)  # nothing runs over the edge
    assert has_ink(endless, 500, 0, 551, 34)
    narrow = Image.new("RGB", (8, 64), (255, 255, 255))
    assert draw_sheet([[Cell(narrow, "AT-EDM, cost"), Cell(narrow, "x")]], side=64).width > 2 * 64


def test_one_step_of_maps_says_which_block_is_which() -> None:
    assert maps_sheet(WHITE, Recording([observation()], ("mid_block.attentions.0",)), "a duck").width > 400


def test_no_word_of_a_method_is_a_box() -> None:
    """The font that comes with Pillow has no dagger."""
    picture = Image.new("RGB", (64, 64))
    with_sign = draw_sheet([[Cell(picture, "AT-EDM†")]], ["AT-EDM†"], headline="AT-EDM†")
    in_words = draw_sheet([[Cell(picture, "AT-EDM dagger")]], ["AT-EDM dagger"], headline="AT-EDM dagger")
    assert with_sign.tobytes() == in_words.tobytes()
