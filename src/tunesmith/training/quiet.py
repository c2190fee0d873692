"""Libraries print bars and advice of their own; a run says what matters itself."""

from __future__ import annotations

import logging
import warnings


def quiet_imports() -> None:
    """Silence what is said while libraries are imported; call it before they are.

    Transformers imports torchao where it is installed, which names each of its kernels that this machine cannot load.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silence progress bars and warnings of libraries that a run loads; errors still come through."""
    quiet_imports()
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.utils.disable_progress_bars()
    disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|datasets|torch)\.")
