"""Post-hoc detectors of other papers, as functions of logits and features."""
