"""What a training step computes and moves beside its decoder layers. Torch-free."""

from __future__ import annotations

from tunesmith.planning.amounts import NOTHING, Amount
from tunesmith.planning.bytes import head_rows
from tunesmith.planning.facts import LayerFacts, ModelFacts, Work, trained_parameters
from tunesmith.planning.fit import STATE_BYTES

SOFTMAX_PASSES = 3.6
"""Passes over a chunk of logits that softmax and gradient take the time of. They read it twice and write it once, and
take 0.080 ms for 256 × 128,256 on one H100, 55% of copying (benchmarks/RESULTS.md)."""

CODED_SHARE = 0.4
"""What an update reaches of the memory's rate where moments are held in codes of 8 bits or fewer, for coding is
arithmetic. Not timed alone, but chosen so that 8B full fine-tuning with `adamw_8bit` comes out (9,674, 8,708 and
8,135 tokens/s there); other such optimizers are taken to be like it."""

MUON_STEPS = 5
"""Iterations that make a matrix orthogonal, three products each."""


def head(model: ModelFacts, work: Work) -> Amount:
    """Logits, losses and gradients of the supervised rows, chunk by chunk (`kernels.linear_logprob`)."""
    rows, weights = work.supervised, model.hidden * model.vocabulary
    chunks = -(-rows // head_rows(model, work)) if rows else 0
    found = Amount(
        products=2.0 * 2 * rows * weights,
        # the gradient of the rows is summed and scaled in float32
        moved=rows * (SOFTMAX_PASSES * model.vocabulary * work.itemsize + 12.0 * model.hidden),
        kernels=8 * chunks,
    )
    if not work.full:
        return found
    # ∂W is summed in float32 over the chunks, from zeros, and rounded at the end
    moved = weights * (8.0 * chunks + 4 + 4 + work.trained_itemsize)
    return found + Amount(products=2.0 * rows * weights, moved=moved, kernels=chunks + 2)


def embeddings(model: ModelFacts, work: Work) -> Amount:
    """Rows looked up, the last norm forward and backward, and the gradient of all rows where they train."""
    elements = work.tokens * model.hidden
    found = Amount(moved=8.0 * elements * work.itemsize, kernels=4)
    if work.full:
        table = model.vocabulary * model.hidden
        found += Amount(moved=(table + 3.0 * elements) * work.trained_itemsize, kernels=4)
    return found


def optimizer(model: ModelFacts, work: Work) -> Amount:
    """Norm of the gradients and update: parameters and state read and written, gradients read twice."""
    name = work.optimizer
    moved = trained_parameters(model, work) * (4.0 * work.trained_itemsize + 2 * STATE_BYTES[name])
    if name.endswith(("8bit", "4bit", "fp8")):
        moved /= CODED_SHARE
    found = Amount(moved=moved, kernels=4)
    if name == "muon":
        for layer in model.layers:
            found += _orthogonal(layer)
    return found


def _orthogonal(layer: LayerFacts) -> Amount:
    """The products that make the steps of a layer's matrices orthogonal, each from its smaller side."""
    found = NOTHING
    for name, (_, inputs) in layer.matrices.items():
        for rows in layer.outputs(name):
            short, long = sorted((rows, inputs))
            products = MUON_STEPS * (4.0 * short**2 * long + 2.0 * short**3)
            found += Amount(products=products, kernels=4 * MUON_STEPS)
    return found


def accumulation(model: ModelFacts, work: Work) -> Amount:
    """Gradients of a further micro-batch added to those that are there."""
    return Amount(moved=3.0 * work.trained_itemsize * trained_parameters(model, work), kernels=1)
