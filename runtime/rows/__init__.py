"""Whether the rows of a batch are independent, from the graph of a model alone: nothing is run.

The way: `walk` follows the batch from the inputs to the outputs (its theory of operation is there), with the
rule that `operators` names for each operator, and returns a `judgement`.

To change:

- what is known of a tensor, and what a rule is given: `values`; lengths that a graph computes: `sizes`
- an operator, or a new version of one: its line in `operators`, and its rule: by element (`elements`),
  shapes and axes (`shapes`), selection (`selection`), joining, repeating (`joining`), along axes (`axes`),
  layers of networks (`layers`), sequences (`sequences`), `ai.onnx.ml` and ONNX Runtime's own (`contributed`)
- bodies of If, Loop and Scan, functions, bounds, reasons: `walk`

It needs numpy, and neither `onnx` nor ONNX Runtime: a worker runs it beside its model, `check` without one.
"""
