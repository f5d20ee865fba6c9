"""What vLLM makes of exported folders, without our code: `load_vllm.py INPUT.json OUT.json FOLDER...`.

OUT.json has it by folder. INPUT.json holds `ids`, lists of token ids, `texts`, and `new`, how many tokens to generate.
Needs vllm.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams


def loaded(folder: str, ids: list[list[int]], texts: list[str], new: int) -> dict:
    """By list of ids, log-probabilities of all tokens at every position but the last; what follows the first list by
    greedy choice; ids of texts."""
    model = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=2, max_logprobs=-1, seed=0)
    every = SamplingParams(temperature=0.0, max_tokens=new, prompt_logprobs=-1, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": tokens} for tokens in ids], every, use_tqdm=False)
    tokenizer = model.get_tokenizer()
    return {
        "logprobs": [[by_token(position) for position in output.prompt_logprobs[1:]] for output in outputs],
        "generated": list(outputs[0].outputs[0].token_ids),
        "ids": [tokenizer(text)["input_ids"] for text in texts],
    }


def by_token(position: dict) -> list[float]:
    return [position[token].logprob for token in range(len(position))]


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    facts = {folder: loaded(folder, **content) for folder in sys.argv[3:]}
    Path(sys.argv[2]).write_text(json.dumps(facts), encoding="utf-8")
