"""A script: hidden states of one text by transformers, after the embeddings and after each layer.

It is run by its path, as `torch_vectors.py` is. Arguments: JSON file of the text's token ids, .npz
file to write, model folder. The result has float32 [tokens, D] as `0` for the embeddings and as
`N` for the model that ends with layer N; the last line printed is the library's version. A model
cut short, final norm included, is what can be compared in every family.
"""

import json
import sys

MISSING = 3


def main(tokens_file: str, output: str, folder: str) -> int:
    """Exit status: 0, or 3 when transformers cannot be imported or names its parts otherwise."""
    try:
        import numpy as np
        import torch
        import transformers
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    with open(tokens_file, encoding="utf-8") as file:
        tokens = torch.tensor([json.load(file)])
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False).float().eval()
    stack = next(
        (
            name
            for name, part in model.named_modules()
            if isinstance(part, torch.nn.ModuleList) and len(part) == model.config.num_hidden_layers
        ),
        None,
    )
    if stack is None or not hasattr(model, "embeddings"):
        return MISSING
    place, _, attribute = stack.rpartition(".")
    parent, layers = model.get_submodule(place), list(model.get_submodule(stack))
    states = {}

    def keep(module, inputs, result):
        states["0"] = result

    model.embeddings.register_forward_hook(keep)
    with torch.inference_mode():
        for count in range(1, len(layers) + 1):
            setattr(parent, attribute, torch.nn.ModuleList(layers[:count]))
            states[str(count)] = model(input_ids=tokens).last_hidden_state
    np.savez(output, **{name: state[0].numpy() for name, state in states.items()})
    print(transformers.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
