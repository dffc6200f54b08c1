"""How good an SAE is: reconstruction, special tokens, the model's loss with it spliced in, and a report to read."""

from fastsae.evaluate.reconstruction import Evaluation, evaluate, evaluate_many
from fastsae.evaluate.report import write_report

__all__ = ["Evaluation", "evaluate", "evaluate_many", "write_report"]
