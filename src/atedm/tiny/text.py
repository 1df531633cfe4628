"""The shapes model's words: the tokenizer of its captions and two small CLIP text encoders."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.tiny.pictures.text import learn_tokenizer, text_encoders
from atedm.tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, TEXTURES

TOKENS = 20
"""Tokens of a padded caption."""
WIDTH = 48
"""Width of each text encoder; the U-Net sees both side by side."""


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary, save it in ``folder`` and open it as a `CLIPTokenizer`."""
    phrases = ["a an on background", *RELATIONS, *COLOURS, *SHAPES, *BACKGROUNDS, *TEXTURES]
    return learn_tokenizer(folder, phrases, tokens=TOKENS, vocab_size=1000)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build the two untrained encoders: see `text_encoders`."""
    return text_encoders(tokenizer, width=WIDTH, heads=3, intermediate=4 * WIDTH, tokens=TOKENS)
