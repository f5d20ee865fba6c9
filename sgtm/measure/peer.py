"""Unmasked training steps of Hugging Face's model of the same shape, to compare ours with.

They run in a separate process, so that our process-wide settings do not affect them: `Peer` starts it and requests one
step at a time. glibc keeps freed memory there too, which gains them more than us. Attention is SDPA where transformers
has it for the family (for GPT-Neo it has eager attention only).
"""

from __future__ import annotations

import multiprocessing

import torch

from sgtm.config import Config
from sgtm.distributed.env import keep_freed_memory
from sgtm.measure.rounds import LocalStep, Took

PRECISIONS = ("bf16 autocast", "bf16 weights")
NAME = "Hugging Face"


class Peer:
    """A process that takes one step per request.

    precision  `bf16 autocast` over fp32 weights, or `bf16 weights`
    """

    def __init__(self, config: Config, precision: str):
        context = multiprocessing.get_context("spawn")
        self.ask, theirs = context.Pipe()
        arguments = (theirs, config, precision, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()

    def step(self) -> Took:
        """One step; its CPU time is that of the process."""
        return self._answer("step")

    def peak(self) -> float:
        """MiB by which memory grows at most during a step."""
        return self._answer("peak")

    def attention(self) -> str:
        """The implementation that transformers has chosen."""
        return self._answer("attention")

    def _answer(self, question: str):
        try:
            self.ask.send(question)
            answer = self.ask.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"the process of Hugging Face's model exited with {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def peers(config: Config) -> dict[str, Peer]:
    return {f"{NAME}, {precision}": Peer(config, precision) for precision in PRECISIONS}


def _serve(pipe, config: Config, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        call, attention = hugging_face_step(config, precision)
    except Exception as error:
        pipe.send(RuntimeError(str(error)))
        return
    step = LocalStep(call)
    answers = {"step": step.step, "peak": step.peak, "attention": lambda: attention}
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(answers[question]())


def hugging_face_step(config: Config, precision: str):
    """The step, with torch's fused AdamW, on the shape of `config`, which returns the loss; and its attention."""
    model, attention = _model(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    autocast = precision == "bf16 autocast"
    if not autocast:
        model = model.bfloat16()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    ids = torch.randint(config.model.vocab_size, (config.sequences_per_step, config.model.context), device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, attention


def _model(config: Config):
    """Hugging Face's model, and the name of its attention: SDPA, or eager where SDPA is refused."""
    from transformers import AutoModelForCausalLM

    from sgtm.hf.config import hf_config

    m = config.model
    shape = hf_config(m, heads=m.heads, kv_heads=m.num_kv_heads, experts=m.experts)
    for name in ("attention_dropout", "embed_dropout", "resid_dropout"):
        if hasattr(shape, name):
            setattr(shape, name, 0.0)
    try:
        return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa"), "sdpa"
    except ValueError:
        return AutoModelForCausalLM.from_config(shape, attn_implementation="eager"), "eager"
