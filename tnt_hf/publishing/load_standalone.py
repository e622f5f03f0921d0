"""
Load a folder in a process that cannot import tnt_hf, and print logits and the class of an image as JSON.

    python -P tnt_hf/publishing/load_standalone.py FOLDER PIXEL_VALUES.safetensors IMAGE

Part of the verification in `tnt_hf.publishing.staging`, which runs it.
"""

import json
import sys


def main(folder: str, inputs: str, image: str) -> None:
    sys.modules["tnt_hf"] = None  # any import of the package now fails
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification, pipeline

    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        pixel_values = load_file(inputs)["pixel_values"]
        logits = model(pixel_values, generator=torch.Generator().manual_seed(0)).logits.float()
    answers = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")(image)
    print(json.dumps({"logits": logits.tolist(), "label": answers[0]["label"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
