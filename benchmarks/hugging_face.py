"""Training steps of Hugging Face's GPT-Neo, unmasked, in eager attention, as what ours are compared with.

They run in a process of their own, so that what we set for ours (the C library's allocator) does not help or hinder
them: `Peer` starts it and asks it for one step at a time.
"""

from __future__ import annotations

import multiprocessing
import time

import torch

from sgtm.config import Config
from sgtm.distributed.env import keep_freed_memory
from sgtm_kernels.measurement import peak_growth


class Peer:
    """A process that takes a step when it is told to.

    precision  `bf16 autocast` over fp32 weights, or `bf16 weights`
    allocator  `default`, or `kept`: freed memory kept by the process, as in our own training on a CPU
    """

    def __init__(self, config: Config, precision: str, allocator: str = "default"):
        context = multiprocessing.get_context("spawn")
        self.ask, theirs = context.Pipe()
        arguments = (theirs, config, precision, allocator, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()

    def step(self) -> float:
        """Seconds of one step."""
        return self._answer("step")

    def peak(self) -> float:
        """MiB by which memory grows at most during a step."""
        return self._answer("peak")

    def _answer(self, question: str) -> float:
        try:
            self.ask.send(question)
            return self.ask.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"the process of Hugging Face's model ended with {self.process.exitcode}") from None


def _serve(asked, config: Config, precision: str, allocator: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if allocator == "kept":
        keep_freed_memory()
    step = hugging_face_step(config, precision)
    while True:
        try:
            question = asked.recv()
        except EOFError:
            return
        if question == "peak":
            asked.send(peak_growth(step))
        else:
            began = time.perf_counter()
            step()  # its loss.item() waits for a GPU
            asked.send(time.perf_counter() - began)


def hugging_face_step(config: Config, precision: str):
    """The step, with torch's fused AdamW, on the shape of `config`; returns the loss."""
    from transformers import GPTNeoForCausalLM

    from sgtm.model.hf_config import hf_config

    m = config.model
    shape = hf_config(m, heads=m.heads, kv_heads=m.num_kv_heads, neurons=m.intermediate_size)
    shape.attention_dropout = shape.embed_dropout = shape.resid_dropout = 0.0
    shape._attn_implementation = "eager"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPTNeoForCausalLM(shape).to(device)
    autocast = precision == "bf16 autocast"
    if not autocast:
        model = model.bfloat16()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    ids = torch.randint(m.vocab_size, (config.sequences_per_step, m.context), device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
