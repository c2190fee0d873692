"""How long a first run takes on a machine without a GPU: hours that nobody should find out by waiting. Torch-free."""

from __future__ import annotations

from tunesmith.config.doctor_machine import usable_cores
from tunesmith.config.nvidia_smi import ask_nvidia_smi
from tunesmith.config.plan_model import cached_config, find_config
from tunesmith.config.starter import Sizes
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.model_folder import local_folder
from tunesmith.planning.known_models import published_config
from tunesmith.planning.read_facts import read_facts

CORE_RATES = (5e10, 1.6e10)
"""Operations a second of a core at its best, and of one that has other work: 190 and 60 tokens/s of LoRA runs of
135M parameters on two cores, at 4 operations for each parameter and token."""


def seconds_on_cpu(model: str, adapter: str, sizes: Sizes) -> tuple[float, float] | None:
    """Seconds that the steps of a run take on this machine's CPU: at least, and where it has other work.

    None where there is a GPU, where the number of steps is not known, and where the model's sizes are not on this
    machine.

    Args:
        model: as `model.name` has it, and so have the others.
    """
    if sizes.steps is None or ask_nvidia_smi():
        return None
    try:
        here = local_folder(model) or cached_config(model, None) or published_config(model)
        if here is None:
            return None  # the hub is not asked for this
        parameters = read_facts(find_config(model).values, model).parameters
    except UserError:  # of a kind that no plan knows
        return None
    tokens = sizes.steps * sizes.global_batch * sizes.sequence_length
    each = 6 if adapter == "none" else 4  # frozen weights have no gradients
    best, busy = (each * parameters * tokens / (rate * usable_cores()) for rate in CORE_RATES)
    return best, busy
