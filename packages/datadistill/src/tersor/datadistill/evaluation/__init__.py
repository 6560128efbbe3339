"""How good a small set is: fresh networks are trained on it."""

from tersor.datadistill.evaluation.convnet import ConvNet
from tersor.datadistill.evaluation.evaluator import Accuracy, Evaluator

__all__ = ["Accuracy", "ConvNet", "Evaluator"]
