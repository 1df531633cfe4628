"""The picture model's words: a CLIP tokenizer learned from the captions and two small CLIP text encoders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.tiny.pictures.objects import OBJECTS
from atedm.tiny.pictures.scenes import BACKGROUNDS, RELATIONS, SIZES

TOKENS = 24
"""Tokens of a padded caption."""
WIDTH = 64
"""Width of each text encoder; the U-Net sees both side by side."""

_SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary, save it in ``folder`` and open it as a `CLIPTokenizer`."""
    phrases = ["a an and", *OBJECTS, *BACKGROUNDS.values(), *RELATIONS, *SIZES]
    return learn_tokenizer(folder, phrases, tokens=TOKENS, vocab_size=2000)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build the two untrained encoders: see `text_encoders`."""
    return text_encoders(tokenizer, width=WIDTH, heads=2, intermediate=2 * WIDTH, tokens=TOKENS)


def learn_tokenizer(folder: Path, phrases: Iterable[str], *, tokens: int, vocab_size: int) -> CLIPTokenizer:
    """Learn a vocabulary in which every word of ``phrases`` is one token, save it and open it as a `CLIPTokenizer`.

    Args:
        folder: Where it goes; made if missing.
        phrases: What captions are made of.
        tokens: Of a padded caption.
        vocab_size: At most so many tokens are learned.
    """
    words = sorted({word for phrase in phrases for word in phrase.split()})
    # Every word often enough that it becomes one token, and every letter once.
    corpus = [" ".join(words)] * 50 + [" ".join("abcdefghijklmnopqrstuvwxyz")]
    learned = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            end_of_word_suffix="</w>",
            initial_alphabet=list(_SIGNS),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
        ),
    )
    model = json.loads(learned.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for sign in _SIGNS:
        vocab.setdefault(sign + "</w>", len(vocab))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_encoders(
    tokenizer: CLIPTokenizer, *, width: int, heads: int, intermediate: int, tokens: int
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build two untrained encoders: the first gives words, the second words and a pooled caption.

    SDXL reads the last layer but one, so three layers are two in effect.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)
