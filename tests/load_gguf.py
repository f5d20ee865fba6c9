"""What llama.cpp makes of GGUF files, as JSON by file, without our code: `load_gguf.py INPUT.json FILE...`.

INPUT.json holds `ids`, lists of token ids, `texts`, and `new`, how many tokens to generate. Needs llama_cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp


def loaded(file: str, ids: list[list[int]], texts: list[str], new: int) -> dict:
    """Logits of lists of ids, what follows the first by greedy choice, ids of texts, and control tokens.

    Keys and values of the attention are fp32 (llama.cpp has fp16 by default), so that only sums round differently.
    """
    model = llama_cpp.Llama(
        file, logits_all=True, n_ctx=0, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
    )
    logits = []
    for tokens in ids:
        model.reset()
        model.eval(tokens)
        logits.append(model.scores[: len(tokens)].tolist())
    model.reset()
    generated = []
    for token in model.generate(ids[0], temp=0.0, repeat_penalty=1.0):
        generated.append(token)
        if len(generated) == new or token == model.token_eos():
            break
    vocabulary = model._model.vocab
    return {
        "logits": logits,
        "generated": generated,
        "ids": [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts],
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "adds": [llama_cpp.llama_vocab_get_add_bos(vocabulary), llama_cpp.llama_vocab_get_add_eos(vocabulary)],
    }


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({file: loaded(file, **content) for file in sys.argv[2:]}))
