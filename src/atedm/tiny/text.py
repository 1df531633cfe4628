"""The shipped model's words: a CLIP tokenizer learned from the captions and two small CLIP text encoders."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import BACKGROUNDS, RELATIONS, SIZES

TOKENS = 24
"""Tokens of a padded caption."""
WIDTH = 64
"""Width of each text encoder; the U-Net sees both side by side."""

_SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn a vocabulary in which every word of a caption is one token, save it and open it as a `CLIPTokenizer`.

    Args:
        folder: Where it goes; made if missing.
    """
    phrases = ["a an and", *OBJECTS, *BACKGROUNDS.values(), *RELATIONS, *SIZES]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    # Every word often enough that it becomes one token, and every letter once.
    corpus = [" ".join(words)] * 50 + [" ".join("abcdefghijklmnopqrstuvwxyz")]
    learned = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=2000,
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
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build two untrained encoders: the first gives words, the second words and a pooled caption.

    SDXL reads the last layer but one, so three layers are two in effect.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)
