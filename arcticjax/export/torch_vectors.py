"""A script: vectors of texts by sentence-transformers, in a process of its own.

It is run by its path, so that torch never enters the training process and nothing of this package
is needed here. Arguments: JSON file of [side, text] pairs, .npy file to write, model folders. The
result is float32 [folders, texts, D]; the last line printed is the library's version.
"""

import json
import sys

MISSING = 3


def main(probes_file: str, output: str, *folders: str) -> int:
    """Exit status: 0, or 3 when sentence-transformers cannot be imported."""
    try:
        import numpy as np
        import sentence_transformers
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    with open(probes_file, encoding="utf-8") as file:
        probes = json.load(file)
    vectors = []
    for folder in folders:
        model = sentence_transformers.SentenceTransformer(
            folder, device="cpu", trust_remote_code=False, local_files_only=True
        ).float()
        rows = {}
        for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
            chosen = [index for index, probe in enumerate(probes) if probe[0] == side]
            if chosen:
                texts = [probes[index][1] for index in chosen]
                found = encode(texts, show_progress_bar=False, convert_to_numpy=True)
                rows.update(zip(chosen, found, strict=True))
        vectors.append(np.stack([rows[index] for index in range(len(probes))]))
    np.save(output, np.stack(vectors).astype(np.float32))
    print(sentence_transformers.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
