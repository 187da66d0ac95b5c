"""A BERT of two thin layers, drawn at random, with a vocabulary of its own: what is trained where nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(folder: Path, seed: int = 0, dropout: float = 0.0, width: int = 16, letters: bool = False) -> Path:
    """Tokenizer and weights; texts are words w0 to w59, or any `letters`."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    texts = [chr(i) for i in range(33, 127)] if letters else [f"w{i}" for i in range(60)]
    words = [*special.values(), *texts]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    split = pre_tokenizers.Split(Regex(r"\S"), "isolated") if letters else pre_tokenizers.Whitespace()
    inner.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), **shape, max_position_embeddings=64, **drop)
    BertModel(config).save_pretrained(folder)
    return folder


def model(folder: Path, width: int = 16) -> Any:
    """A `SentenceTransformer` of what is saved."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(width)], device="cpu")
