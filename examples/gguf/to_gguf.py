"""Convert an exported Llama to GGUF with llama.cpp's own converter.

    python examples/gguf/to_gguf.py LLAMA_CPP FOLDER OUT.gguf [f32|f16|bf16|q8_0]

LLAMA_CPP is a checkout of llama.cpp; needs its packages gguf and sentencepiece. The converter recognises a BPE
tokenizer by a hash of what it makes of a test text, and refuses a newly trained one. A tokenizer that `sgtm prepare`
has trained cuts words as GPT-2's does, which this script sets. With a tokenizer that was given to `sgtm prepare
--tokenizer`, run the converter as it is.
"""

import runpy
import sys
from pathlib import Path

llama_cpp, folder, out, *kind = sys.argv[1:]
sys.path[:0] = [llama_cpp, str(Path(llama_cpp) / "gguf-py")]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", *(kind or ["f32"])]
runpy.run_path(str(Path(llama_cpp) / "convert_hf_to_gguf.py"), run_name="__main__")
