"""How good an SAE is: reconstruction, special tokens, the model's loss with it spliced in, and a report to read."""

from fastsae.evaluate.page import write_report
from fastsae.evaluate.reconstruction import Evaluation, evaluate, evaluate_many

__all__ = ["Evaluation", "evaluate", "evaluate_many", "write_report"]
