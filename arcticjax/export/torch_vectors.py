"""A script: vectors of texts by sentence-transformers, in a process of its own.

It is run by its path, so that torch never enters the training process and nothing of this package
is needed here. Arguments: JSON file of [side, text, alone] entries, .npz file to write, model
folders. A text that is alone has a batch of its own, after the others. The result has, for folder
N, float32 [texts, D] as `N/exact` (computed in float32), and as `N/as_loaded` where the folder asks
for another type; the last line printed is the library's version. Vectors that a folder cuts are
scaled to unit length again.
"""

import json
import sys

MISSING = 3


def main(probes_file: str, output: str, *folders: str) -> int:
    """Exit status: 0, or 3 when sentence-transformers cannot be imported."""
    try:
        import numpy as np
        import sentence_transformers
        import torch
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    with open(probes_file, encoding="utf-8") as file:
        probes = json.load(file)

    def vectors(model):
        sides = {"query": model.encode_query, "document": model.encode_document}
        batches = [
            [index for index, (which, _, alone) in enumerate(probes) if which == side and not alone]
            for side in sides
        ]
        batches += [[index] for index, (_, _, alone) in enumerate(probes) if alone]
        rows = {}
        for batch in filter(None, batches):
            found = sides[probes[batch[0]][0]](
                [probes[index][1] for index in batch],
                show_progress_bar=False,
                convert_to_tensor=True,
                normalize_embeddings=model.truncate_dim is not None,
            )
            rows.update(zip(batch, found.float().numpy(), strict=True))
        return np.stack([rows[index] for index in range(len(probes))])

    result = {}
    for number, folder in enumerate(folders):
        model = sentence_transformers.SentenceTransformer(
            folder, device="cpu", trust_remote_code=False, local_files_only=True
        )
        if next(model.parameters()).dtype != torch.float32:
            result[f"{number}/as_loaded"] = vectors(model)
        result[f"{number}/exact"] = vectors(model.float())
    np.savez(output, **result)
    print(sentence_transformers.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
