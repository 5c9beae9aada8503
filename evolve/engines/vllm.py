"""vLLM in this process: requests join its batch as they come, prefixes are cached, tokens are drawn by draw.py.

It sets threads, seeds and environment of the process it is in, and gives little back; so a stage runs it in a process
of its own (parts.py), with new weights each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # read when it is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor

from evolve.config import VLLM, Sampling
from evolve.engines import Codec, Completion, Request, Task, memory, too_long
from evolve.engines.draw import Sampler, only


def arguments(settings: VLLM, task: Task) -> dict[str, Any]:
    """What generation and classification tell vLLM alike; sets what it takes from the environment."""
    common = {
        "model": str(task.folder),
        "dtype": task.read.dtype,
        "trust_remote_code": task.read.trust_remote_code,
        "max_model_len": task.max_length,
        "max_num_seqs": settings.batch_size,
        "tensor_parallel_size": settings.tensor_parallel,
        "quantization": settings.quantization,
        "gpu_memory_utilization": settings.memory_share,
        "skip_tokenizer_init": not task.until,
        "disable_log_stats": True,
        "seed": 0,
    }
    if task.device == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size, sizes = memory.head_size(task), CPUAttentionBackend.get_supported_head_sizes()
        if size not in sizes:
            raise ValueError(f"engine=vllm: on a CPU it runs heads of {sizes}, the model has {size}; take engine=hf")
        # One process: the scheduler has no device to run ahead of. Threads are resources.threads, bound to no core.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        block = 32  # tokens; its own 128 are too many to share a prompt's start
        each = block * memory.per_token(task)
        sequence = -(-task.max_length // block) * each
        most = memory.available(settings, task.device) - memory.weights(settings, task)
        cache = max(min(settings.batch_size * sequence, most), sequence) + each  # one block stays empty
        # Compiling takes a minute and gains nothing on a CPU.
        common |= {"enforce_eager": True, "block_size": block, "kv_cache_memory_bytes": cache}
    return common


class VLLMEngine:
    def __init__(self, settings: VLLM, task: Task):
        self.codec = Codec(task)
        given = arguments(settings, task) | {
            "generation_config": "vllm",  # the model's own sampling habits are not part of the experiment
            "enable_prefix_caching": True,
            "async_scheduling": False,  # a draw counts the tokens before it, so they have to be there
            "logits_processors": ["evolve.engines.vllm:Draw"] if task.sampling.temperature > 0 else None,
        }
        self.engine = LLMEngine.from_engine_args(EngineArgs(**given))
        self._parameters = lambda seed: SamplingParams(
            temperature=0,
            max_tokens=task.max_new_tokens,
            stop_token_ids=self.codec.ends,
            stop=list(task.until),
            detokenize=bool(task.until),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"seed": seed, "sampling": task.sampling.model_dump()},
        )
        self._under_way: dict[str, tuple[Request, int]] = {}
        self._refused: list[Completion] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            ids = self.codec.encode(request)
            if ids is None:
                self._refused.append(too_long(request))
                continue
            name = "-".join(map(str, request.key))
            self._under_way[name] = (request, len(ids))
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=ids), self._parameters(request.seed))

    def poll(self) -> list[Completion]:
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        done: list[Completion] = []
        while self._under_way and not done:
            for output in self.engine.step():
                request, read = self._under_way.pop(output.request_id)
                outputs: Any = output.outputs
                done.append(self.codec.completion(request, read, outputs[0].token_ids))
        return done

    def close(self) -> None:
        self.engine.engine_core.shutdown()


class Draw(LogitsProcessor):
    """Leaves one token possible in each row, the drawn one.

    vLLM says which requests join, leave or move in its batch; a request's step is the count of its tokens so far.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.rows: dict[int, tuple[int, list[int]]] = {}  # of the batch: seed and tokens so far
        self.sampler: Sampler | None = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, parameters, _, output in batch_update.added:
            self.rows.pop(index, None)
            if parameters.extra_args:  # a warm-up's has none
                self.rows[index] = parameters.extra_args["seed"], output
                self.sampler = self.sampler or Sampler(Sampling(**parameters.extra_args["sampling"]))
        for one, other, how in batch_update.moved:
            first, second = self.rows.pop(one, None), self.rows.pop(other, None)
            if first is not None:
                self.rows[other] = first
            if second is not None and how.name == "SWAP":
                self.rows[one] = second

    def apply(self, logits: Any) -> Any:
        if self.sampler is None:
            return logits
        rows = [self.rows.get(index, (0, [])) for index in range(len(logits))]
        seeds = torch.tensor([seed for seed, _ in rows], device=self.device)
        steps = torch.tensor([len(output) for _, output in rows], device=self.device)
        return only(logits, self.sampler(logits, seeds, steps))
