"""What transformers makes of exports, as JSON by folder, without our code: `load_export.py TEXTS.json FOLDER...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def loaded(folder: str | Path, texts: list[str]) -> dict:
    """Ids and logits of texts, as a user's `model(**tokenizer(text))`, and the names of control tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    config, batches = model.config, [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        logits = [model(**batch).logits[0].tolist() for batch in batches]
        generated = model.generate(**batches[0], max_new_tokens=3, do_sample=False)
    return {
        "version": transformers.__version__,
        "architecture": config.model_type,
        "ids": [batch["input_ids"][0].tolist() for batch in batches],
        "decoded": [tokenizer.decode(batch["input_ids"][0]) for batch in batches],
        "logits": logits,
        "generated": generated.shape[1] - batches[0]["input_ids"].shape[1],
        "ids_of_roles": {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")},
        "ids_of_config": {role: getattr(config, f"{role}_token_id") for role in ("bos", "eos", "pad")},
        "unk": tokenizer.unk_token,
        "tokens": len(tokenizer),
    }


if __name__ == "__main__":
    sys.modules["sgtm"] = sys.modules["sgtm_kernels"] = None  # type: ignore[assignment]  # importing them fails
    torch.set_num_threads(1)
    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({folder: loaded(folder, texts) for folder in sys.argv[2:]}))
