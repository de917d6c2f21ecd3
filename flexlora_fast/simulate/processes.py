"""How a process that trains is set up."""

from __future__ import annotations

import warnings

import torch
import transformers

from flexlora_fast.errors import OptionError


def base_dtype(dtype: str = "auto", *, cuda: bool = False) -> torch.dtype:
    """What frozen weights are kept in: a dtype by its name.

    "auto" is bfloat16 on a GPU and where the CPU multiplies it in hardware (2 to 3 times faster there, slower
    elsewhere), else float32. Raises ``OptionError`` for what is no floating-point dtype.
    """
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise OptionError(f"model.dtype {dtype!r} is none of torch's; take auto, float32, bfloat16 or float16")
        return named
    if cuda:
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def settle() -> None:
    """Make this process quiet and single-threaded."""
    torch.set_num_threads(1)  # one process per core: threads across them would only wait for each other
    transformers.logging.set_verbosity_error()  # not the list of weights (pooler, head) that this model does not share
    transformers.logging.disable_progress_bar()
    # PEFT asks transformers for a property that it has deprecated; no user of this package can do anything about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
