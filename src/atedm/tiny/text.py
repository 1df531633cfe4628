"""The shipped model's words: a CLIP tokenizer learned from the captions and two small CLIP text encoders."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, TEXTURES

TOKENS = 20
"""Tokens of a padded caption."""
WIDTH = 48
"""Width of each text encoder; the U-Net sees both side by side."""


def _corpus() -> list[str]:
    """Every word of the captions often enough that each becomes one token, and every letter once."""
    words = ["a", "an", "on", "background", *(word for relation in RELATIONS for word in relation.split())]
    words += [*COLOURS, *SHAPES, *BACKGROUNDS, *TEXTURES]
    return [" ".join(sorted(set(words)))] * 50 + [" ".join("abcdefghijklmnopqrstuvwxyz")]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary, save it in ``folder`` and open it as a `CLIPTokenizer`."""
    learned = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=2,
            end_of_word_suffix="</w>",
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
        ),
    )
    model = json.loads(learned.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-":
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build the two untrained encoders: the first gives words, the second words and a pooled caption.

    SDXL reads the last layer but one, so three layers are two in effect.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)
