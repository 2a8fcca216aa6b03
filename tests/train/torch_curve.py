"""The losses of fifty steps as PyTorch has them, which `loss_curve.json` keeps.

    uv run --group test python -m tests.train.torch_curve

Transformers' BERT, torch's AdamW and clipping, a softmax over the whole matrix, padded batches, all
in float64: nothing of arcticjax but the files that a run starts from and the draw of its batches.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import tokenizers
import torch
from transformers import BertModel

from arcticjax.config import load_config
from arcticjax.config.schema import RunConfig
from arcticjax.data.draw import Draw
from tests.train.test_loss_curve import CURVE, STEPS, WARM_UP, config_file


def losses(config: RunConfig) -> list[float]:
    """The loss before each step."""
    folder = Path(config.model.init)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    named = dict(model.named_parameters())
    undecayed = [name for name in named if name.endswith("bias") or "LayerNorm" in name]
    rest = [name for name in named if name not in undecayed]
    adam = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in rest], "weight_decay": adam.weight_decay},
            {"params": [named[name] for name in undecayed], "weight_decay": 0.0},
        ],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.epsilon,
    )
    fall = STEPS - WARM_UP
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / WARM_UP if step < WARM_UP else 1 - (step - WARM_UP) / fall,
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tables = [pyarrow.parquet.read_table(one.path).to_pydict() for one in config.data.sources]
    sizes = [len(table["query"]) for table in tables]
    draw = Draw(sizes, config.train.global_batch, config.run.seed)

    def embed(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer.encode_batch(texts)
        ids, mask = (torch.tensor([getattr(one, name) for one in encoded])
                     for name in ("ids", "attention_mask"))  # fmt: skip
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1)

    found = []
    for step in range(STEPS):
        drawn = draw.at(step)
        queries, documents = (
            [tables[drawn.source][side][record] for record in drawn.records]
            for side in ("query", "document")
        )
        assert len(set(documents)) == len(set(queries)) == len(drawn.records)
        scores = embed(queries) @ embed(documents).T / config.loss.temperature
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adam.clip_norm)
        optimizer.step()
        schedule.step()
        found.append(float(loss.detach()))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = losses(load_config(config_file(Path(folder))))
    assert np.mean(found[-5:]) < np.mean(found[:5]) / 2, "nothing is learned"
    CURVE.write_text(json.dumps({"torch": torch.__version__, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
